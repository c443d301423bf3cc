"""`study.yaml`: the head of a study's folder, with a checksum by which a cut one is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, YamlFile
from ekd_ray.config.phrases import command_text, several
from ekd_ray.config.yaml_files import MOST_BYTES, dump_yaml, parse_yaml
from ekd_ray.errors import Damaged, UserError, shorten
from ekd_ray.files import read_text, write_text

STUDY_FILE = "study.yaml"
CHECKSUM = "checksum"  # first in the file, so that what is cut from its end is missed
_MOST_LINES = 40  # that a value cut in its middle may make illegal
_MOST_NAMED = 3


def write_study_file(folder: Path, header: Mapping[str, Any]) -> None:
    """Write `study.yaml` atomically, with the checksum of its values."""
    values = {name: value for name, value in header.items() if name != CHECKSUM}
    write_text(folder / STUDY_FILE, dump_yaml({CHECKSUM: _checksum(values), **values}))


def read_study_file(path: Path) -> YamlFile:
    """The head of a study; one of an older ekd_ray has no checksum.

    Raises:
        Damaged: it is empty, cut or changed; says what is lost. UserError: it cannot be read.
    """
    try:
        file = YamlFile.read(path)
    except Damaged:
        raise
    except UserError as error:
        if not _may_be_damaged(path):
            raise
        raise _damaged(path, str(error)) from None
    given = file.values.get(CHECKSUM)
    if given is not None and given != _checksum(file.values):
        raise _damaged(path, "its checksum is not that of its content")
    return file


def describe_other_settings(
    path: Path, header: Mapping[str, Any], config: StudyConfig
) -> str | None:
    """A sentence on a file without a checksum whose settings are not those of its fingerprint."""
    known = header.get("fingerprint")
    if CHECKSUM in header or known is None or known == (found := config.fingerprint()):
        return None
    return (
        f"{path} was changed by hand in settings that decide results: their fingerprint is "
        f"{found}, that of the study is {shorten(known)}, so that its trials may have had others"
    )


def leading_values(path: Path) -> dict[str, Any]:
    """The values of a study's file before the place where it is cut; empty where it has none."""
    lines = read_text(path, most=MOST_BYTES).splitlines()
    for count in range(len(lines), max(0, len(lines) - _MOST_LINES), -1):
        try:
            values = parse_yaml("\n".join(lines[:count]), where=str(path))
        except UserError:
            continue
        if isinstance(values, dict):
            return values
    return {}


def lost_settings(values: Mapping[str, Any]) -> list[str]:
    """The settings of a study that a cut file lacks, in the order of the file."""
    study = values.get("study")
    study = study if isinstance(study, Mapping) else {}
    shared = study.get("distill")
    shared = shared if isinstance(shared, Mapping) else {}
    lost = [f"distill.{name}" for name in DistillConfig.names() if name not in shared]
    if len(lost) == len(DistillConfig.names()):
        lost = ["distill"]
    return lost + [n for n in StudyConfig.names() if n not in study and n != "distill"]


def _checksum(values: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in values.items() if name != CHECKSUM}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _may_be_damaged(path: Path) -> bool:
    """Whether a file was ours: it has a checksum, or nothing but blanks and zeros, which a disk
    leaves that lost its power."""
    text = read_text(path, most=MOST_BYTES)
    return not text.strip("\0 \t\n") or text.startswith(f"{CHECKSUM}:")


def _damaged(path: Path, reason: str) -> Damaged:
    lost = lost_settings(leading_values(path))
    names = ", ".join(lost[:_MOST_NAMED]) + (", ..." if len(lost) > _MOST_NAMED else "")
    what = f"{several(len(lost), 'setting')} lost: {names}" if lost else "a value is another one"
    repair = command_text("tune", "--resume", "--repair", "--out", path.parent)
    return Damaged(
        path,
        f"{reason.rstrip('.')} ({what}); `{repair}` rebuilds it from the trials, or put a copy in "
        "its place; if you have changed it yourself, and nothing that decides results, remove its "
        f"line {CHECKSUM}",
    )


def describe_missing(folder: Path) -> str | None:
    """The remedy for trials beside which there is no `study.yaml`; None where there are none."""
    if not any(folder.glob("trials/[0-9]*")):
        return None
    repair = command_text("tune", "--resume", "--repair", "--out", folder)
    return (
        f"{folder} has trials, and its {STUDY_FILE} is missing: `{repair}` rebuilds it from them, "
        "or put a copy in its place."
    )
