"""Out-of-distribution images as a student sees them: other data sets, folders, noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ekd_ray.config.phrases import joined, short_name
from ekd_ray.data import EncodedImages, ImageArrays, Stage
from ekd_ray.data.decode import fit_bytes, fit_file, fit_picture
from ekd_ray.data.staging import Views
from ekd_ray.engine.rundata import RunData
from ekd_ray.errors import UserError

# Of generated images so many, fewer where they are large.
MOST_GENERATED, LEAST_GENERATED, GENERATED_VALUES = 500, 100, 2**24


class OutsideStage(Stage):
    """N images uint8 [3, S, S] by `read`, of no class."""

    def __init__(
        self, read: Callable[[int], np.ndarray], count: int, size: int, device: torch.device
    ) -> None:
        self.device, self.num_views, self.image_size = device, 1, size
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.read = read

    def views(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None) -> Views:
        ids = np.asarray(sample_ids, dtype=np.int64)
        images = torch.from_numpy(np.stack([self.read(int(index)) for index in ids]))
        return images.to(self.device), self.labels[: len(ids)]


def _noise(draw: np.random.Generator, size: int) -> np.ndarray:
    return draw.integers(0, 256, (3, size, size), dtype=np.uint8)


def _constant(draw: np.random.Generator, size: int) -> np.ndarray:
    return np.broadcast_to(draw.integers(0, 256, (3, 1, 1), dtype=np.uint8), (3, size, size))


# Every value by itself from 0 to 255, and one colour an image.
GENERATED = {"noise": _noise, "constant": _constant}


def generate_images(kind: str, size: int, device: torch.device) -> Stage:
    """Images of `GENERATED`, the same every time: 500, fewer above 105 pixels a side."""
    count = min(MOST_GENERATED, max(LEAST_GENERATED, GENERATED_VALUES // (3 * size**2)))
    make = GENERATED[kind]
    return OutsideStage(lambda index: make(np.random.default_rng(index), size), count, size, device)


def stage_files(files: Sequence[str], size: int, *, margin: bool, device: torch.device) -> Stage:
    """Picture files, cut and resized as by `fit_picture`."""
    return OutsideStage(
        lambda index: fit_file(files[index], size, margin=margin), len(files), size, device
    )


def stage_outside(
    arrays: ImageArrays | EncodedImages, size: int, *, margin: bool, device: torch.device
) -> Stage:
    """A split of another data set, cut and resized as by `fit_picture`."""

    def read(index: int) -> np.ndarray:
        if isinstance(arrays, EncodedImages):
            pictures = arrays.pictures
            return fit_bytes(pictures.read(index), size, margin=margin, name=pictures.name(index))
        image = Image.fromarray(np.ascontiguousarray(arrays.images[index].transpose(1, 2, 0)))
        return fit_picture(image, size, margin=margin)

    return OutsideStage(read, len(arrays), size, device)


def check_other_data(name: str, fingerprint: str, own: Iterable[str | None]) -> None:
    """Raise `UserError` if a set is the data that the student was trained or tested on."""
    if fingerprint in own:
        raise UserError(
            f"the out-of-distribution set {name} is the student's own data set: give another."
        )


def set_names(datasets: Sequence[str]) -> dict[str, str]:
    """Data sets by the names that their figures have: the last part of a path, as letters.

    Raises:
        UserError: two have the same.
    """
    found: dict[str, str] = {}
    for name in datasets:
        last = short_name(name.rstrip("/")).rpartition(":")[2]
        plain = re.sub(r"\W+", "-", last).strip("-") or "set"
        if plain in found:
            both = joined([found[plain], name])
            raise UserError(
                f"out-of-distribution sets must differ by name, got {both}, both called {plain}: "
                "leave one out, or rename its folder."
            )
        found[plain] = name
    return found


def generated_sets(data: RunData) -> dict[str, Stage]:
    """Every kind of `GENERATED` in the size of a run's images."""
    images = data.images
    return {kind: generate_images(kind, images.image_size, images.device) for kind in GENERATED}
