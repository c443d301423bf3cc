"""A few test images that say most of a model: its surest mistakes, its largest differences to the
teacher. Kept small by the final evaluation, because nothing reads the test split again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from ekd_ray.data import Stage
from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.errors import UserError, require
from ekd_ray.files import atomic_path, check_plain

FILE = "gallery.safetensors"
MOST_SHOWN = 12  # of each kind
SIDE = 64  # pixels, at most: 12 KB an image


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """K test images: `mistakes` surest mistakes, then others that the teacher sees otherwise.

    `images` int64 [K], indices in the order of `Predictions`; `thumbnails` uint8 [K, 3, S, S];
    `teacher` int64 [K], the teacher's class, -1 without a teacher; `distances` float32 [K], half
    the sum of the absolute differences between the probabilities of student and teacher, in [0, 1].
    """

    mistakes: int
    images: Tensor
    thumbnails: Tensor
    teacher: Tensor
    distances: Tensor

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically."""
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, Tensor)}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, {"mistakes": str(self.mistakes)}))

    @classmethod
    def load(cls, path: Path, *, count: int, classes: int) -> Self:
        """Read what `save` wrote of a split of `count` images.

        Raises:
            UserError: the file holds anything else.
        """
        check_plain(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = cls(**tensors, mistakes=int(file.metadata()["mistakes"]))
            found._check(count, classes)
        except Exception as error:  # damage comes as errors of every kind
            raise UserError(
                f"{path} is damaged: remove it, and the report does without its images."
            ) from error
        return found

    def _check(self, count: int, classes: int) -> None:
        shown, side = len(self.images), self.thumbnails.shape[-1]
        sound = (
            0 <= self.mistakes <= shown <= 2 * MOST_SHOWN
            and self.images.shape == self.teacher.shape == self.distances.shape == (shown,)
            and self.thumbnails.shape == (shown, 3, side, side)
            and 0 < side <= SIDE
            and self.thumbnails.dtype == torch.uint8
            and self.images.dtype == self.teacher.dtype == torch.int64
            and bool(((self.images >= 0) & (self.images < count)).all())
            and bool(((self.teacher >= -1) & (self.teacher < classes)).all())
            and bool(((self.distances >= 0) & (self.distances <= 1)).all())
        )
        require(sound, "no gallery")


def find_mistakes(logits: Tensor, labels: Tensor, *, log_prior: float | None) -> Tensor:
    """Indices int64 [<= 12] of the images that a model gets wrong, the surest first.

    Args:
        logits: [N, C]; labels: int64 [N].
    """
    confidence, predicted = log_probabilities(logits.float(), log_prior).max(dim=1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    return wrong[confidence[wrong].argsort(descending=True, stable=True)[:MOST_SHOWN]]


def measure_distances(
    student: Tensor, teacher: Tensor, *, log_prior: float | None, teacher_log_prior: float | None
) -> Tensor:
    """Total variation between the class probabilities of two networks' logits [M, C]: [M]."""
    ours = log_probabilities(student.float(), log_prior).exp()
    theirs = log_probabilities(teacher.float(), teacher_log_prior).exp()
    return ((ours - theirs).abs().sum(dim=1) / 2).clamp(0, 1)


def shrink_images(stage: Stage, sample_ids: np.ndarray) -> Tensor:
    """Evaluation views of a stage's images, at most 64 pixels a side: uint8 [K, 3, S, S]."""
    with contextlib.closing(stage.evaluation(sample_ids, max(1, len(sample_ids)))) as batches:
        parts = [images.cpu() for images, _ in batches]
    if not parts:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    images = torch.cat(parts)
    if images.shape[-1] <= SIDE:
        return images
    small = functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)
