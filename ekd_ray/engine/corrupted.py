"""Accuracy and calibration of a classifier on corrupted pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data import Stage
from ekd_ray.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, published_pictures
from ekd_ray.engine.evaluate import predict
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.measure.shift import METRICS, Shift, ShiftRow
from ekd_ray.engine.rundata import RunData
from ekd_ray.errors import UserError, unknown_name


@dataclass(frozen=True)
class _Corrupted:
    """A split whose evaluation views are spoiled, with what `predict` asks of a `Stage`."""

    stage: Stage
    name: str
    severity: int
    seed: int

    @property
    def device(self) -> torch.device:
        return self.stage.device

    def evaluation(self, ids: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for images, labels in self.stage.evaluation(ids, batch_size):
            part = ids[start : start + len(images)]
            start += len(images)
            spoiled = corrupt(images, self.name, self.severity, seed=self.seed, sample_ids=part)
            yield spoiled.to(images.device), labels


@dataclass(frozen=True)
class _Published:
    """Published pictures of all severities, with what `predict` asks of a `Stage`."""

    images: np.ndarray
    labels: np.ndarray
    device: torch.device

    def evaluation(self, ids: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            images = torch.from_numpy(self.images[part]).permute(0, 3, 1, 2).contiguous()
            yield images.to(self.device), torch.from_numpy(self.labels[part]).to(self.device)


def measure_shift(
    model: nn.Module,
    data: RunData,
    sample_ids: np.ndarray,
    *,
    config: DistillConfig,
    precision: str,
    log_prior: float | None,
    seed: int = 0,
    published: Path | None = None,
    corruptions: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shift:
    """Metrics of a model on clean pictures and on all corruptions at all severities.

    Args:
        model: in evaluation mode, on the device of `data`.
        sample_ids: int64 [N], of the images of `data` that are spoiled; of published files N
            pictures, evenly spaced.
        log_prior: of an evidential model, log of the prior mass per class; None for a softmax.
        seed: of what the corruptions draw.
        published: folder of `NAME.npy` and `labels.npy` to be read in their place; those of
            CIFAR-10-C. The clean pictures are those of `data`.
        corruptions: names of `CORRUPTIONS`, one or more.
        on_progress: called with (splits done, splits in all).

    Raises:
        UserError: an unknown corruption, or published files that are missing, too short or no such
            files; before the first picture is looked at.
    """
    if not corruptions or not {*corruptions} <= {*CORRUPTIONS}:
        strange = next((name for name in corruptions if name not in CORRUPTIONS), "")
        raise unknown_name("corruption", strange, CORRUPTIONS)
    splits: list[tuple[str, int, Any, np.ndarray]] = [("", 0, data.images, sample_ids)]
    for name in corruptions:
        if published is None:
            splits += [
                (name, severity, _Corrupted(data.images, name, severity, seed), sample_ids)
                for severity in SEVERITIES
            ]
        else:
            images, labels = published_pictures(published, name, data.num_classes)
            count = len(labels) // len(SEVERITIES)
            if count < len(sample_ids):
                raise UserError(
                    f"{published} holds {count} pictures a severity, fewer than the "
                    f"{len(sample_ids)} that are measured: give --images {count} at most."
                )
            own = data.images.labels.cpu().numpy()
            if count == len(own) and np.any(np.sort(labels[:count]) != np.sort(own)):
                raise UserError(
                    f"{published / 'labels.npy'} names as many pictures as the test split of "
                    f"{config.dataset} has, with other numbers of each class: give the published "
                    "files of this data set."
                )
            chosen = np.arange(len(sample_ids)) * count // len(sample_ids)
            stage = _Published(images, labels, data.images.device)
            splits += [
                (name, severity, stage, step * count + chosen)
                for step, severity in enumerate(SEVERITIES)
            ]
    rows = []
    for number, (name, severity, split, ids) in enumerate(splits):
        on_progress(number, len(splits))
        logits, target = predict(model, data, cast(Stage, split), ids, config, precision)
        found = classification_metrics(logits, target, log_prior=log_prior)
        rows.append(
            ShiftRow(corruption=name, severity=severity, **{key: found[key] for key in METRICS})
        )
    on_progress(len(splits), len(splits))
    return Shift(
        rows=tuple(rows), images=len(sample_ids), seed=None if published is not None else seed
    )
