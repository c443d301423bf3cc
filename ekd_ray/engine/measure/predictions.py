"""Predictions of a model on every image of a split: the raw material of a report's figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ekd_ray.config import DistillConfig
from ekd_ray.data import check_class_names
from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.engine.measure.uncertainty import uncertainty
from ekd_ray.engine.rundata import RunData
from ekd_ray.engine.teacher.source import live_teacher
from ekd_ray.errors import UserError, require
from ekd_ray.files import atomic_path, check_plain, parse_json
from ekd_ray.losses.methods import method_of

FILE = "predictions.safetensors"
# Logits are kept of some images only: 2 MB at most, whatever the number of classes.
LEAST_LOGITS, MOST_LOGITS, LOGIT_VALUES = 64, 2000, 1 << 20
TEACHER_BATCH = 256
_FLOAT16 = 65504.0


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of one model on N images of a split.

    `labels` and `predicted` int64 [N], `confidence` (probability of the predicted class) and
    `uncertainty` (see `engine.uncertainty`) float32 [N]; of the images `kept` (int64 [M], evenly
    spaced, so that M > 1) the `logits` and, where the method has a teacher, `teacher_logits`
    float16 [M, C], the latter else None.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    uncertainty: Tensor
    kept: Tensor
    logits: Tensor
    teacher_logits: Tensor | None
    class_names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        *,
        log_prior: float | None,
        class_names: tuple[str, ...],
        teacher: Tensor | None = None,
    ) -> Self:
        """From the logits [N, C] of all images, and the teacher's [M, C] of those in `kept`."""
        logits = logits.detach().float().cpu()
        confidence, predicted = log_probabilities(logits, log_prior).exp().max(dim=1)
        kept = kept_images(len(logits), logits.shape[1])
        return cls(
            labels=labels.cpu(),
            predicted=predicted,
            confidence=confidence.float(),
            uncertainty=uncertainty(logits, log_prior).float(),
            kept=kept,
            logits=_half(logits[kept]),
            teacher_logits=None if teacher is None else _half(teacher),
            class_names=class_names,
        )

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically."""
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, Tensor)}
        with atomic_path(path) as temporary:
            names = {"class_names": json.dumps(list(self.class_names))}
            temporary.write_bytes(save(tensors, names))  # save_file makes it private (0600)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; raises `UserError` for any other content."""
        check_plain(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                names = tuple(parse_json(file.metadata()["class_names"]))
            found = cls(**{"teacher_logits": None, **tensors}, class_names=names)
            found._check()
        except Exception as error:  # damage comes as errors of every kind
            raise UserError(
                f"{path} is damaged: remove it, and the figures do without it."
            ) from error
        return found

    def _check(self) -> None:
        """Raise `AssertionError` unless shapes, dtypes and indices are those of the class."""
        count, classes = len(self.labels), len(self.class_names)
        of_all = (self.labels, self.predicted, self.confidence, self.uncertainty)
        logits = [found for found in (self.logits, self.teacher_logits) if found is not None]
        indices = ((self.labels, classes), (self.predicted, classes), (self.kept, count))
        sound = (
            all(found.shape == (count,) for found in of_all)
            and all(found.shape == (len(self.kept), classes) for found in logits)
            and all(found.is_floating_point() for found in (*of_all[2:], *logits))
            and all(found.isfinite().all() for found in (*of_all[2:], *logits))
            and all(i.dtype == torch.int64 and ((i >= 0) & (i < n)).all() for i, n in indices)
            and len(self.kept) > 1
        )
        require(sound, "no predictions")
        check_class_names("predictions", self.class_names)


def kept_images(count: int, classes: int) -> Tensor:
    """Indices int64 [M] of the images whose logits are kept, evenly spaced among `count`."""
    most = min(count, MOST_LOGITS, max(LEAST_LOGITS, LOGIT_VALUES // classes))
    return torch.arange(most) * count // most


def _half(logits: Tensor) -> Tensor:
    return logits.detach().float().cpu().clamp(-_FLOAT16, _FLOAT16).half()


@torch.no_grad()
def teacher_predictions(
    config: DistillConfig, data: RunData, sample_ids: np.ndarray, *, precision: str
) -> Tensor | None:
    """The teacher's logits float32 [M, C] on images of `data`, unaugmented; None without one."""
    if not method_of(config).needs_teacher:
        return None
    device = data.images.device
    network = live_teacher(config, data.num_classes, precision=precision, device=device)
    parts = [
        network(images).cpu() for images, _ in data.images.evaluation(sample_ids, TEACHER_BATCH)
    ]
    return torch.cat(parts)
