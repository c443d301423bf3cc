"""The out-of-distribution sets and the options of a bundle's evaluation, checked before compute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import check_outside, load_dataset
from ekd_ray.data.registry import FOLDER_PREFIX
from ekd_ray.engine.final import Outside
from ekd_ray.engine.measure.uncertainty import SCORES, score_names
from ekd_ray.engine.outside import (
    GENERATED,
    check_other_data,
    generate_images,
    set_names,
    stage_files,
    stage_outside,
)
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.files import expand_home
from ekd_ray.results.inference import pictures_below, varies_in_size

MOST_RESAMPLES = 100_000
ALL = "all"


def check_options(
    scores: Sequence[str], coverages: Sequence[float], resamples: int, log_prior: float | None
) -> list[str]:
    """The scores by name; `all` stands for all that the student has.

    Raises:
        UserError: a score that it has not, a coverage that is none, or too many resamples.
    """
    legal = score_names(log_prior)
    for name in scores:
        if name not in {*SCORES, ALL}:
            raise unknown_name("score", name, [*SCORES, ALL])
        if name != ALL and name not in legal:
            raise UserError(
                f"the score {name} is of evidential students, and this is none: give one of "
                f"{', '.join(legal)}."
            )
    for share in coverages:
        if not 0 < share <= 1:
            raise UserError(f"a coverage must be above 0 and at most 1, got {share}.")
    if not 0 <= resamples <= MOST_RESAMPLES:
        raise UserError(f"resamples must be 0 to {MOST_RESAMPLES:,}, got {resamples}.")
    return legal if ALL in scores else list(scores)


def find_outside(
    datasets: Sequence[str],
    config: DistillConfig,
    class_names: Iterable[str],
    fingerprints: Iterable[str | None],
    *,
    size: int,
    data_root: str | None,
    device: torch.device,
) -> dict[str, Outside]:
    """The images of out-of-distribution sets, by the names of their figures.

    Args:
        datasets: names of data sets (their test split), `folder:PATH` also of pictures without
            classes, or kinds of `GENERATED`.
        config: the run, by whose rule pictures are cut. class_names, fingerprints: of the
            student's own data. size: pixels a side that its images have before its own resizing.

    Raises:
        UserError: a set that is not there, or that is none from outside.
    """
    own, known = tuple(class_names), tuple(fingerprints)
    margin = varies_in_size(config)
    found: dict[str, Outside] = {}
    for plain, name in set_names(datasets).items():
        folder = expand_home(name.removeprefix(FOLDER_PREFIX))
        if name in GENERATED:
            stage = generate_images(name, size, device)
        elif name.startswith(FOLDER_PREFIX) and not (folder / "train").is_dir():
            files = _list_pictures(name, folder)
            classes = {Path(file).parent.relative_to(folder).name for file in files}
            check_outside(name, classes - {""}, own)
            stage = stage_files(files, size, margin=margin, device=device)
        else:
            arrays = load_dataset(name, "test", data_root=data_root)
            check_other_data(name, arrays.fingerprint, known)
            check_outside(name, arrays.class_names, own)
            stage = stage_outside(arrays, size, margin=margin, device=device)
        found[plain] = (stage, None)
    return found


def _list_pictures(name: str, folder: Path) -> list[str]:
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: give the pictures of {name}.")
    return pictures_below(str(folder))
