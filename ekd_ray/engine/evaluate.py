"""Evaluation of a network, on unaugmented images in one pass, and the inputs that it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.data import Stage, normalize
from ekd_ray.engine import ranks
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.precision import autocast
from ekd_ray.engine.rundata import RunData

EVAL_BATCH = 500
# Pixels of a batch of 500 images of 64 x 64; larger images come in smaller batches.
EVAL_PIXELS = EVAL_BATCH * 64 * 64


def student_inputs(images: Tensor, data: RunData, config: DistillConfig) -> Tensor:
    """The student's view of augmented images: normalised, and resized if the student asks.

    Args:
        images: uint8 [B, 3, H, W].

    Returns:
        float32 [B, 3, S, S], S = `config.student_image_size` or H. Enlarging is bicubic, as
        the ViT recipes do it; shrinking is antialiased as well.
    """
    size = config.student_image_size or images.shape[-1]
    if size == images.shape[-1]:
        return normalize(images, data.mean, data.std, channels_last=config.channels_last)
    inputs = normalize(images, data.mean, data.std)
    shrinks = size < images.shape[-1]
    inputs = functional.interpolate(inputs, (size, size), mode="bicubic", antialias=shrinks)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return inputs.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Evaluation:
    """A model on N images: logits float32 [N, C], labels int64 [N] and their metrics."""

    logits: Tensor
    labels: Tensor
    metrics: dict[str, float]


def evaluate_model(
    model: nn.Module,
    data: RunData,
    sample_ids: np.ndarray,
    *,
    config: DistillConfig,
    precision: str,
    log_prior: float | None,
) -> Evaluation:
    """Evaluate a model on the images `sample_ids` [N] of `data`, unaugmented.

    With out-of-distribution images in `data`, metrics also tell how well uncertainty tells them
    apart. Where there are several ranks, all of them must call: each looks at its share of the
    images, and all get the result for all images.
    """
    model.eval()
    logits, labels = predict(model, data, data.images, sample_ids, config, precision)
    outside = None
    if data.ood_images is not None:
        outside, _ = predict(model, data, data.ood_images, data.ood_ids, config, precision)
    metrics = {}
    if ranks.is_first():  # one set of figures must decide
        metrics = classification_metrics(logits, labels, log_prior=log_prior, ood_logits=outside)
    return Evaluation(logits, labels, ranks.from_first(metrics))


@torch.no_grad()
def predict(
    model: nn.Module,
    data: RunData,
    stage: Stage,
    sample_ids: np.ndarray,
    config: DistillConfig,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(logits float32 [N, C], labels int64 [N]) of a stage's images, from all ranks; the model is
    in evaluation mode."""
    total = len(sample_ids)
    # This rank's share: as many on every rank, because they are gathered together.
    own = sample_ids[ranks.rank() :: ranks.world_size()]
    lacks = -(-total // ranks.world_size()) - len(own)
    sample_ids = np.concatenate([own, sample_ids[:lacks]])
    # Written into place: small results kept from every batch would lie between its large
    # buffers, and the allocator could never give these back (24 MB a batch at 224 x 224).
    device = stage.device
    logits = torch.empty((len(sample_ids), data.num_classes), device=device)
    targets = torch.empty(len(sample_ids), dtype=torch.int64, device=device)
    start = 0
    for inputs, target in _batches(data, stage, sample_ids, config):
        with autocast(precision, device):
            output = model(inputs)
        end = start + len(target)
        logits[start:end], targets[start:end] = output, target
        start = end
    return ranks.gather_rows(logits, total), ranks.gather_rows(targets, total)


def _batches(
    data: RunData, stage: Stage, sample_ids: np.ndarray, config: DistillConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    side = max(data.images.image_size, config.student_image_size or 0)
    count = max(1, min(EVAL_BATCH, EVAL_PIXELS // side**2))
    for images, target in sized_images(data, stage, sample_ids, count):
        yield student_inputs(images, data, config), target


def sized_images(
    data: RunData, stage: Stage, sample_ids: np.ndarray, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [B, 3, H, W], labels int64 [B]) of a stage, `count` at once, in the size of
    the images of `data`."""
    native = data.images.image_size
    with contextlib.closing(stage.evaluation(sample_ids, count)) as batches:
        for images, target in batches:
            if images.shape[-1] != native:  # another data set's images
                size = (native, native)
                images = functional.interpolate(
                    images.float(), size, mode="bilinear", antialias=True
                )
                images = images.round().clamp(0, 255).to(torch.uint8)
            yield images, target
