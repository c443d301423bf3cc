"""Where a run gets its teacher's logits from: the live network."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data import normalize
from ekd_ray.engine.plan import parse_normalization
from ekd_ray.engine.precision import autocast
from ekd_ray.models import build_model, load_weights


class LiveTeacher:
    """The teacher network itself, frozen and in evaluation mode.

    It normalises its images itself: every teacher keeps the statistics it was trained
    with, whatever the student uses.
    """

    def __init__(
        self, model: nn.Module, normalization: str, *, precision: str, channels_last: bool
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval().requires_grad_(False).to(memory_format=layout)
        self.normalization = parse_normalization(normalization)
        self.precision = precision
        self.channels_last = channels_last

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] float32 of uint8 images [B, 3, H, W], already augmented."""
        mean, std = self.normalization.mean, self.normalization.std
        inputs = normalize(images, mean, std, channels_last=self.channels_last)
        with autocast(self.precision, images.device):
            return self.model(inputs).float()


@functools.lru_cache(maxsize=2)
def _cached(
    name: str, path: str, sha256: str, normalization: str, num_classes: int,
    precision: str, channels_last: bool, device: torch.device,
) -> LiveTeacher:  # fmt: skip
    model = build_model(name, num_classes)
    load_weights(model, path)
    return LiveTeacher(
        model.to(device), normalization, precision=precision, channels_last=channels_last
    )


def load_teacher(
    config: DistillConfig, num_classes: int, *, precision: str, device: torch.device
) -> LiveTeacher:
    """The teacher of a resolved configuration; one copy per process serves all its trials."""
    assert config.teacher and config.teacher_weights and config.teacher_normalization
    return _cached(
        config.teacher, config.teacher_weights, config.teacher_sha256 or "",
        config.teacher_normalization, num_classes, precision, config.channels_last, device,
    )  # fmt: skip
