"""Print why a run of a study failed: its reason, and the end of what its processes wrote."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.errors import UserError, meant_name, shorten

if TYPE_CHECKING:
    from ekd_ray.results.records import RunRecord

EXAMPLES = (
    "ekd-ray logs runs/first",
    "ekd-ray logs runs/first 12",
    "ekd-ray logs runs/first teacher",
)
FIRST = ("--json",)
# Below the folder of a study, or of candidates for a teacher.
_PLACES = ("trials/*", "confirm/*", "teacher*", "teacher*/seed-*", "seed-*")
MOST_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="folder of a study, or of a single run, or s3://BUCKET/FOLDER"
    )
    parser.add_argument(
        "trial", nargs="?", metavar="TRIAL",
        help="number of a trial, or the beginning of a folder's name below confirm/ or teacher/ "
        "(default: all that failed)",
    )  # fmt: skip
    flags.add_common(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the log of a run that failed, or list those that did."""
    from ekd_ray.remote.session import open_folder

    folder = open_folder(args.run)
    # Trials by number, then the others by name.
    runs = sorted(_runs_in(folder))
    places = dict(sorted(runs, key=lambda run: int(run[0]) if run[0].isdecimal() else math.inf))
    if args.trial is None and not places:
        places, args.trial = dict(_single_run(folder, args.run)), ""
    if args.trial is not None:
        return _show(_chosen(args.run, args.trial, places), as_json=args.json)
    return _list_failed(args.run, places, as_json=args.json)


def _runs_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each run: `12`, `final-kd-seed-1-0a1b2c`, `teacher`, `teacher/seed-0`."""
    for pattern in _PLACES:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                name = str(path.relative_to(folder)).removeprefix("confirm/")
                kind, _, number = name.partition("/")
                yield (str(int(number)) if kind == "trials" and number.isdecimal() else name), path


def _single_run(folder: Path, given: str) -> Iterator[tuple[str, Path]]:
    from ekd_ray.results.records import CONFIG

    if not (folder / CONFIG).is_file():
        raise UserError(f"{given} holds neither a study nor a run: give the folder of one.")
    yield "", folder


def _chosen(run: str, name: str, places: dict[str, Path]) -> tuple[str, Path]:
    """The run of this name, or the only one whose name begins so; it has failed."""
    found = [known for known in places if known == name]
    found = found or [k for k in places if k.startswith(name) and not name.isdecimal()]
    if len(found) == 1 and _reason(places[found[0]]) is not None:
        return found[0], places[found[0]]
    failed = [known for known, path in places.items() if _reason(path) is not None]
    listed = ", ".join(failed[:MOST_LISTED]) or "none"
    if len(failed) > MOST_LISTED:
        listed += f" and {len(failed) - MOST_LISTED} others"
    if len(found) == 1:
        text = f"{_title(found[0])} has not failed, and so there is no log of it."
    elif found:
        text = f"{shorten(name)} is the beginning of {len(found)} names in {run}: give more of it."
    else:
        text = f"{run} has no run {shorten(name)}.{meant_name(name[:100], failed)}"
    raise UserError(f"{text} Failed in {run}: {listed}.")


def _reason(folder: Path) -> str | None:
    """Why the run in a folder failed; None where it has not."""
    from ekd_ray.results.failure_log import read_failure_log
    from ekd_ray.results.records import FAILURE, failure_reason, read_whole

    record: RunRecord | None = read_whole(folder)
    if record and record.status == "failed":
        return record.reason or failure_reason(folder)
    if record and record.status == "complete":
        return None
    if (folder / FAILURE).exists():
        return failure_reason(folder)
    log = read_failure_log(folder)
    return log and log.strip().splitlines()[-1]  # an error in the study's own process


def _show(found: tuple[str, Path], *, as_json: bool) -> int:
    from ekd_ray.results.failure_log import read_failure_log

    name, folder = found
    reason, log = _reason(folder), read_failure_log(folder)
    if as_json:
        print_json({"name": name, "folder": str(folder), "reason": reason, "log": log})
        return 0
    print_text(f"{_title(name)} failed: {reason}\nfolder: {folder}\n")
    print_text(log or "(no log was kept: the run was refused before it had a process)")
    return 0


def _title(name: str) -> str:
    from ekd_ray.results.progress import CONFIRM_STAGES

    for stage, words in CONFIRM_STAGES.items():
        if name.startswith(f"{stage}-"):
            return f"{name} ({words})"
    return f"trial {name}" if name.isdecimal() else name or "the run"


def _list_failed(run: str, places: dict[str, Path], *, as_json: bool) -> int:
    reasons = {name: _reason(path) for name, path in places.items()}
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    if as_json:
        print_json([{"name": n, "folder": str(places[n]), "reason": r} for n, r in failed.items()])
        return 0
    for name, reason in failed.items():
        print_text(f"{_title(name)} failed: {reason}")
    example = f"; ekd-ray logs {run} {next(iter(failed))} shows its log" if failed else ""
    print_text(f"{len(failed)} of {len(places)} runs failed{example}")
    return 0
