"""Where results go and data come from, as a command or a call names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.distill_config import CACHED
from ekd_ray.errors import UserError
from ekd_ray.files import check_name, expand_home, file_name
from ekd_ray.remote.location import Location, is_uri, parse_location, working_copy
from ekd_ray.results.study_file import STUDY_FILE, describe_missing

RUNS = Path("runs")  # results for which no folder was given
# Ray gives it to the program of `ray job submit`, and to nobody else.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def absolute(path: str | Path) -> str:
    """A path as seen from here: trials run in other folders."""
    return str(expand_home(path).absolute())


def find_data_root(given: str | Path | None) -> str | None:
    """The folder of the data sets: as given, else $EKD_DATA_ROOT."""
    root = given or os.environ.get("EKD_DATA_ROOT")
    return absolute(root) if root else None


def absolute_paths(distill: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with absolute paths to checkpoints and folders of data."""
    changes = {}
    for name in ("teacher_weights", "student_weights"):
        weights = distill.get(name)
        if isinstance(weights, str | Path) and weights != CACHED:
            changes[name] = absolute(weights)
    for name in ("dataset", "ood_dataset"):
        kind, colon, path = str(distill.get(name)).partition(":")
        if colon and kind in ("folder", "hf"):
            changes[name] = f"{kind}:{absolute(path)}"
    return {**distill, **changes}


def locate(out: str | Path) -> tuple[Path, Location | None]:
    """The folder of the results on this machine, and the URI that it is a copy of, if any.

    Raises:
        UserError: no such place; inside of a Ray job, a folder that is relative.
    """
    found = parse_location(out) if isinstance(out, str) and is_uri(out) else check_name(out)
    return (
        (check_outlives_job(found), None)
        if isinstance(found, Path)
        else (working_copy(found), found)
    )


def find_header(out: str | Path, name: str) -> Path:
    """The file `name` of a study or run that is to be continued, which says what it is.

    Raises:
        UserError: there is none.
    """
    folder, location = locate(out)
    if location is not None:
        from ekd_ray.remote.session import header_folder  # loads pyarrow

        folder = header_folder(location)
    if not (folder / name).is_file():
        missing = describe_missing(folder) if name == STUDY_FILE and location is None else None
        raise UserError(
            missing
            or f"{folder} holds nothing to resume (no {name}): check --out, or drop --resume."
        )
    return folder / name


def default_folder(config: DistillConfig, *parts: str) -> Path:
    """`runs/<data set>-<parts>`, where no folder is given. As `default_place`."""
    data = config.dataset.rpartition("/")[2]
    return default_place("-".join((data, *map(file_name, parts))))


def default_place(name: str) -> Path:
    """A folder below `runs/`. As `check_outlives_job`."""
    return check_outlives_job(RUNS / name)


def check_outlives_job(out: Path) -> Path:
    """The folder of the results; raises `UserError` if it would go with the Ray job around it."""
    if _JOB in os.environ and not out.is_absolute():
        raise UserError(
            "inside of a Ray job --out must be an absolute folder that all nodes see, or "
            f"s3://BUCKET/FOLDER, got {out}, which is below the job's own folder on one node, and "
            "goes with it: give --out /SHARED/RUN."
        )
    return out
