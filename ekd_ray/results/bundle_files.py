"""The files of a bundle: their names, the manifest, and what is read back of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config.plugins import SOURCES
from ekd_ray.config.settings import MOST_THREADS
from ekd_ray.data import check_class_names
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.measure.calibration import Calibration
from ekd_ray.errors import UserError
from ekd_ray.files import MOST_TEXT, check_format, read_bytes, read_json, sha256_file, write_text
from ekd_ray.results.exports import EXPORTS
from ekd_ray.results.prediction_table import COVERAGES
from ekd_ray.results.records import FORMAT_VERSION, MANIFEST

CARD = "README.md"
FILES = (WEIGHTS, "distill.yaml", "metrics.json", HISTORY, "environment.json", CARD)
_SOURCE = re.compile(rf"{SOURCES}/(\w+/)*\w+\.py")  # a plugin's
# The files of a bundle on the hub; whatever else is there is somebody's own.
PATTERNS = (MANIFEST, *FILES, *EXPORTS.values(), f"{SOURCES}/*.py")


def read_metrics(path: Path) -> dict[str, Any]:
    """Read `metrics.json` of a bundle; raises `UserError` if it is damaged, foreign or newer."""
    metrics = read_mapping(path)
    check_format(path, metrics.get("format_version", 1), FORMAT_VERSION)
    names: Any = metrics.get("class_names")
    model: Any = metrics.get("model")
    test, exports = metrics.get("test"), metrics.get("exports") or {}
    thresholds: Any = metrics.get("coverage_thresholds")
    sound = (
        isinstance(names, list)
        and len(names) > 1
        and all(isinstance(name, str) for name in names)
        and _are_figures(model)
        and 0 <= model.get("test_top1", -1) <= 1
        and isinstance(test, dict)
        and all(_are_figures(entry) for entry in test.values())
        and isinstance(exports, dict)
        and all(isinstance(entry, dict) for entry in exports.values())
        and type(metrics.get("workers")) is int
        and (thresholds is None or _are_thresholds(thresholds))
        and _is_calibration(metrics.get("calibration"))
    )
    if not sound:
        raise damaged(path)
    check_class_names(str(path), names)
    return metrics


def _are_figures(found: Any) -> bool:
    """Whether it is a mapping to numbers."""
    return isinstance(found, dict) and all(type(v) in (int, float) for v in found.values())


def _is_calibration(found: Any) -> bool:
    """Whether it is one, or None, which bundles of an older ekd_ray have."""
    if found is None:
        return True
    try:
        Calibration.from_dict(found)
    except ValueError:
        return False
    return found.get("measured") is None or _are_figures(found["measured"])


def _are_thresholds(found: Any) -> bool:
    return (
        isinstance(found, list)
        and len(found) == len(COVERAGES)
        and all(isinstance(value, float) for value in found)
    )


def read_environment(path: Path) -> dict[str, Any]:
    """Read `environment.json` of a bundle; raises `UserError` if it is damaged."""
    found = read_mapping(path)
    threads, gpus = found.get("threads"), found.get("gpus") or []
    sound = (
        type(threads) is int
        and 0 < threads <= MOST_THREADS
        and isinstance(found.get("packages"), dict)
        and isinstance(gpus, list)
        and all(isinstance(name, str) for name in gpus)
        and isinstance(found.get("deterministic", False), bool)
    )
    if not sound:
        raise damaged(path)
    return found


def read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        json.dumps(found, allow_nan=False)  # refuses 1e999, too
    except (UserError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: copy or export the bundle again.")


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """List files of a folder with their SHA-256, in the form that `sha256sum --check` reads."""
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    write_text(folder / MANIFEST, "".join(lines))


def list_names(folder: Path) -> list[str]:
    """The names in a manifest."""
    lines = read_bytes(folder / MANIFEST, most=MOST_TEXT).decode(errors="replace").splitlines()
    return [line.partition("  ")[2] for line in lines]


def manifest_problems(folder: Path, *, edited: Sequence[str] = ()) -> list[str]:
    """The faults of a bundle's files, a sentence each; empty without any.

    Nothing outside the folder is read, whatever the manifest says. Files that begin with a
    dot, which clones of repositories have, are left out. Those of `edited` may hold anything.
    """
    known = {*FILES, *EXPORTS.values()}
    problems, listed = [], set()
    for line in read_bytes(folder / MANIFEST, most=MOST_TEXT).decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name not in known and not _SOURCE.fullmatch(name):
            problems.append(f"{MANIFEST} lists {name!r}, which does not belong to a bundle.")
            continue
        listed.add(name)
        if name not in edited or not (folder / name).is_file():
            problems += _file_problems(folder, name, digest)
    problems += [f"{MANIFEST} does not list {name}." for name in FILES if name not in listed]
    return problems + [
        f"{name} is there, but {MANIFEST} does not list it." for name in find_unlisted(folder)
    ]


def find_unlisted(folder: Path) -> list[str]:
    """The files and folders in a bundle's folder that are no part of it."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {SOURCES}
    sources = filter(Path.is_file, (folder / SOURCES).rglob("*"))
    there |= {path.relative_to(folder).as_posix() for path in sources}
    return sorted(there - {*list_names(folder), *FILES, MANIFEST})


def _file_problems(folder: Path, name: str, digest: str) -> list[str]:
    if not (folder / name).is_file():
        return [f"{name} is missing."]
    same = sha256_file(folder / name) == digest
    return [] if same else [f"{name} was changed: its SHA-256 is not the one in {MANIFEST}."]
