"""`--repair`: the head of a study (`study.yaml`), rebuilt from what else the study has left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import several
from ekd_ray.errors import Damaged, UserError
from ekd_ray.files import damaged_name
from ekd_ray.results.records import (
    DATA,
    FORMAT_VERSION,
    STUDY_FILE,
    RunRecord,
    read_whole,
    trial_folders,
)
from ekd_ray.results.study_file import (
    CHECKSUM,
    leading_values,
    lost_settings,
    read_study_file,
    write_study_file,
)
from ekd_ray.scale.journal_rebuild import left_in_journal
from ekd_ray.studies.pipeline import lock_folder

_MOST_NAMED = 10


def repair_study(out: Path) -> str:
    """Rebuild `study.yaml` of a study where it is damaged or missing; a sentence on what was done.

    Its settings are those that the journal has; without them what is left of the file, the
    settings that all trials share, and the ranges that were searched. The old file is kept
    (`damaged_name`).

    Raises:
        UserError: no trial is there to rebuild it from, or another process runs the study.
    """
    path = out / STUDY_FILE
    if not out.is_dir():
        raise UserError(f"{out} holds no study to repair: check --out.")
    with lock_folder(out):
        try:
            read_study_file(path)
            return f"{path} is whole: nothing to repair"
        except UserError as error:
            if path.exists() and not isinstance(error, Damaged):
                raise  # a newer one, or one that may not be read
        head = leading_values(path) if path.exists() else {}
        records = [run for f in trial_folders(out).values() if (run := read_whole(f)) is not None]
        settings, ranges = left_in_journal(out)
        told = "the journal"
        if settings is None:
            told = several(len(records), "trial")
            settings = _gathered(out, head, records, ranges)
        config = StudyConfig.from_dict(settings, where=str(path))
        _check_trials(path, config, records)
        header = {
            "format_version": FORMAT_VERSION,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            **{name: value for name, value in head.items() if name not in (CHECKSUM, "study")},
            "fingerprint": config.fingerprint(),
            "study": config.to_dict(),
        }
        lost = lost_settings({"study": settings})
        if lost and head.get("fingerprint") != header["fingerprint"]:
            warnings.warn(
                f"{path} is not what it was: {', '.join(lost[:_MOST_NAMED])} were in no record, "
                "and are the defaults now; where they were others, add them to the command.",
                stacklevel=2,
            )
        if not isinstance(head.get(DATA), Mapping):
            warnings.warn(
                f"{path} has lost the fingerprints of its data: whether they are still those of "
                "its trials is not known, so compare them before you go on.",
                stacklevel=2,
            )
        kept = ""
        if path.exists():
            aside = damaged_name(path)
            os.replace(path, aside)
            kept = f"; the old one is kept as {aside.name}"
        write_study_file(out, header)
    return f"{path} is rebuilt from {told}{kept}"


def _gathered(
    out: Path, head: Mapping[str, Any], records: list[RunRecord], ranges: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that the file's beginning and the trials tell."""
    configs = [run.config for run in records if run.config]
    if not configs:
        raise UserError(
            f"{out} has no whole trial to rebuild {STUDY_FILE} from: put a copy in its place, or "
            "begin again in another --out."
        )
    left = head.get("study")
    known = dict(left) if isinstance(left, Mapping) else {}
    if known:
        known.popitem()  # the last value may be cut in its middle
    first = configs[0]
    shared = {
        name: value
        for name, value in first.items()
        if name not in ranges and all(other.get(name) == value for other in configs)
    }
    return {"space": dict(ranges), **known, "distill": known.get("distill") or shared}


def _check_trials(path: Path, config: StudyConfig, records: list[RunRecord]) -> None:
    """Raise `UserError` if trials have other settings than the study would have."""
    shared, searched = config.distill.to_dict(), {*(config.space or {})}
    for run in records:
        for name in ("dataset", "epochs", "teacher", "student", "seed"):
            if name in searched or name not in run.config or run.config[name] == shared[name]:
                continue
            raise UserError(
                f"{path} cannot be rebuilt: {name} is {shared[name]} in what is left of the study "
                f"and {run.config[name]} in {run.name}; put a copy in its place."
            )
