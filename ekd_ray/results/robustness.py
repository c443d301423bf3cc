"""A bundle's student on corrupted pictures of its test split."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ekd_ray.data.corruptions import CORRUPTIONS
from ekd_ray.engine.corrupted import measure_shift
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.measure.shift import FILE, Shift
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.study_file import STUDY_FILE


def measure_corruptions(
    bundle: Bundle,
    *,
    dataset: str | None = None,
    data_root: str | None = None,
    images: int | None = None,
    seed: int = 0,
    published: str | Path | None = None,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shift:
    """Metrics of a bundle's student on its clean test split and under the 15 corruptions.

    Those of a bundle in a study are written to the study too, for its report; there more pictures
    of the same weights are not replaced by fewer.

    Args:
        dataset: where the bundle's data are, if they are a folder that lies elsewhere here.
        images: so many pictures, evenly spaced (all).
        seed: of what the corruptions draw.
        published: folder of the published files, such as those of CIFAR-10-C, to be read in place
            of pictures that are made here.
        corruptions: names of `CORRUPTIONS` (all).
        on_progress: called with (splits done, splits in all).

    Raises:
        UserError: there are no such data, an unknown corruption, published files that are not of
            them, or `images` is not between 1 and their number.
    """
    device, config = pick_device(), bundle.locate_data(dataset)
    data = load_test_data(config, stage=RunStage.FINAL, data_root=data_root, device=device)
    ids = data.validation_ids
    if images is not None and not 1 <= images <= len(ids):
        raise UserError(
            f"images must be 1 to {len(ids)}, the test images of {config.dataset}, got {images}."
        )
    if images is not None:
        ids = ids[np.arange(images) * len(ids) // images]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = bundle.model().to(device).to(memory_format=layout).eval()
    with arithmetic(deterministic=bundle.environment().get("deterministic", False)):
        found = measure_shift(
            model, data, ids, config=config, precision=bundle.config.precision,
            log_prior=bundle.weights.log_prior, seed=seed,
            published=None if published is None else Path(published), corruptions=corruptions,
            on_progress=on_progress,
        )  # fmt: skip
    found = replace(found, weights=sha256_file(bundle.path / WEIGHTS))
    home = bundle.path.absolute().parent
    if (home / STUDY_FILE).is_file():
        _keep(found, home / FILE)
    return found


def _keep(found: Shift, path: Path) -> None:
    """Write a measurement, unless the file holds a fuller one of the same weights."""
    with contextlib.suppress(UserError):  # no such file, or a damaged one
        if (there := Shift.load(path)).covers(found):
            warnings.warn(
                f"{path} stays as it is, because it is of {there.images} pictures: remove it to "
                f"keep these {found.images}.",
                stacklevel=3,
            )
            return
    found.save(path)
