"""A student ready for use: from pictures to class probabilities and uncertainty."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.data import DATASETS, RESIZED_CROP
from ekd_ray.data.decode import fit_file, fit_picture
from ekd_ray.data.facts import LARGEST_DECODED
from ekd_ray.data.sources import SUFFIXES
from ekd_ray.data.views import VIEW_SCHEMES
from ekd_ray.engine.measure.calibration import make_sets
from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.errors import UserError

BATCH = 64
MOST_DEPTH = 30  # folders below the one that is given; the system follows 40 links


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predictions of a student for B images.

    `probabilities` float32 [B, C]; `labels` int64 [B] the most probable classes, `names`
    their names; `uncertainty` float32 [B] in [0, 1]: the vacuity of an evidential student
    (1 is no evidence at all), 1 minus the largest probability (before calibration) of any other.
    `sets`, where they were asked for: the names of the classes in each image's set, the most
    probable first.
    """

    probabilities: Tensor
    labels: Tensor
    names: tuple[str, ...]
    uncertainty: Tensor
    sets: tuple[tuple[str, ...], ...] | None = None


class Preprocessing(nn.Module):
    """Images in [0, 1], float32 [B, 3, H, W] -> the student's input, [B, 3, S, S].

    Normalised, then resized where the student asks for another size than the data set's. A
    torchvision-style transform of batches: `ToTensor` makes its input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        inputs = (images - self.mean) / self.std
        if images.shape[-1] == self.size:
            return inputs
        shape, shrinks = (self.size, self.size), self.size < images.shape[-1]
        # As in training: enlarged bicubic, and antialiased where it shrinks.
        return functional.interpolate(inputs, shape, mode="bicubic", antialias=shrinks)


class Classifier(nn.Module):
    """Preprocessing and student, with the meaning of its logits.

    Returns `logits` [B, C], `probabilities` [B, C] and `uncertainty` [B], all float32.
    """

    def __init__(
        self, student: nn.Module, preprocessing: nn.Module, *, log_prior: float | None
    ) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.student = student
        self.log_prior = log_prior

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.student(self.preprocessing(images)).float()
        if self.log_prior is None:
            probabilities = logits.softmax(dim=1)
            return logits, probabilities, 1 - probabilities.amax(dim=1)
        # The mean of the Dirichlet a = exp(z) + exp(prior), and the share of the prior in it.
        log_a = torch.logaddexp(logits, torch.full_like(logits, self.log_prior))
        log_mass = self.log_prior + math.log(logits.shape[1])
        vacuity = (log_mass - log_a.logsumexp(dim=1)).exp().clamp(max=1.0)
        return logits, log_a.softmax(dim=1), vacuity


def varies_in_size(config: DistillConfig) -> bool:
    """Whether training pictures had any size, so that evaluation looked at their centre.

    Asks neither for the data nor for the plugin that registered them.
    """
    known = DATASETS.get(config.dataset)
    if known is not None and known.encoded is not None:
        return known.encoded
    if config.augment in VIEW_SCHEMES and config.augment != "none":
        return False
    # Without augmentation by the size, which a data set of one size does not have.
    large = (config.image_size or 0) > LARGEST_DECODED
    return config.augment == RESIZED_CROP or config.dataset.startswith("folder:") or large


def pixels(images: Any, config: DistillConfig) -> list[np.ndarray]:
    """Every image as uint8 [3, S, S], S = `config.image_size`, cut as evaluation cuts it.

    Args:
        images: a PIL image, a path, an array or tensor (see `as_pictures`), or a sequence of them.
            The path of a folder stands for its pictures (see `pictures_below`).

    Raises:
        UserError: anything else, or a file that holds no picture.
    """
    from PIL import Image

    size = config.image_size
    assert size is not None
    margin = varies_in_size(config)
    single = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
    found = []
    listed = [images] if isinstance(images, single) or not isinstance(images, Iterable) else images
    for given in listed:
        if isinstance(given, str | os.PathLike):
            files = pictures_below(str(Path(given))) if os.path.isdir(given) else [str(Path(given))]
            found += [fit_file(file, size, margin=margin) for file in files]
            continue
        if isinstance(given, np.ndarray | Tensor):
            pictures = [Image.fromarray(picture) for picture in as_pictures(given)]
        elif isinstance(given, Image.Image):
            pictures = [given]
        else:
            raise UserError(
                "images must be PIL images, paths, arrays or tensors, got one of type "
                f"{type(given).__name__}."
            )
        name = f"image {len(found)}"
        found += [fit_picture(picture, size, margin=margin, name=name) for picture in pictures]
    return found


def pictures_below(folder: str) -> list[str]:
    """The picture files in a folder and those below it, by name, without hidden ones.

    Raises:
        UserError: there is none, or a folder cannot be read or leads back.
    """
    found = list(_walk(folder))
    if not found:
        raise UserError(f"folder {folder} holds no picture ({', '.join(SUFFIXES)}): name another.")
    return found


def _walk(folder: str, depth: int = 0) -> Iterator[str]:
    if depth > MOST_DEPTH:
        raise UserError(f"{folder} lies {depth} folders deep: remove the link that leads back.")
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror}): make it readable.") from None
    for entry in listed:
        if entry.name.startswith("."):
            continue
        is_folder = False
        with contextlib.suppress(OSError):  # a link to itself
            is_folder = entry.is_dir()
        if is_folder:
            yield from _walk(entry.path, depth + 1)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def as_pictures(images: np.ndarray | Tensor) -> np.ndarray:
    """One image or a batch as uint8 [B, H, W, 3].

    Args:
        images: [H, W, C], [C, H, W], or a batch [B, ...] of them, with C of 3, or 1 for grey;
            [H, W] is grey, too, and [B, H, W] where neither B nor W is 3 or 1. uint8, or floating
            in [0, 1]. Where both ends fit, an array has its channels last and a tensor first.

    Raises:
        UserError: another shape, dtype or range.
    """
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        # NumPy does not know every floating kind.
        array = (images.float() if images.is_floating_point() else images).numpy()
    else:
        array = images
    if array.ndim == 2 or (array.ndim == 3 and not {array.shape[0], array.shape[2]} & {1, 3}):
        array = array[..., None]
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim == 4 and 3 not in (batch.shape[1], batch.shape[3]):  # grey
        ends = (1, 3) if isinstance(images, Tensor) else (3, 1)
        axis = next((axis for axis in ends if batch.shape[axis] == 1), None)
        batch = batch if axis is None else batch.repeat(3, axis=axis)
    first, last = (batch.ndim == 4 and batch.shape[axis] == 3 for axis in (1, 3))
    floating = np.issubdtype(batch.dtype, np.floating)
    outside = floating and batch.size and not (batch.min() >= 0 and batch.max() <= 1)
    if not (first or last) or not (floating or batch.dtype == np.uint8) or outside:
        reach = f" from {batch.min():.3g} to {batch.max():.3g}" if outside else ""
        raise UserError(
            "images must be uint8, or floating in [0, 1], of shape [H, W, 3] or [3, H, W], of one "
            f"channel if grey, or a batch of them, got {batch.dtype} {list(images.shape)}{reach}: "
            "normalised images are for `Bundle.model`."
        )
    if first and (not last or isinstance(images, Tensor)):
        batch = batch.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.rint(batch * 255).astype(np.uint8) if floating else batch)


@torch.no_grad()
def classify(
    classifier: Classifier,
    images: Any,
    config: DistillConfig,
    class_names: Sequence[str],
    *,
    temperature: float = 1.0,
    set_threshold: float | None = None,
) -> Prediction:
    """Run a `Classifier` over pictures, see `pixels`, in batches of 64.

    Args:
        temperature: of the probabilities, see `log_probabilities`.
        set_threshold: of the sets of classes, see `make_sets`; None makes none.
    """
    found = pixels(images, config)
    if not found:
        raise UserError("there is no image to predict: give at least one.")
    batches = (np.stack(found[i : i + BATCH]) for i in range(0, len(found), BATCH))
    parts = [classifier(torch.from_numpy(batch).float() / 255) for batch in batches]
    logits, probabilities, uncertainty = (torch.cat(column) for column in zip(*parts, strict=True))
    labels = probabilities.argmax(dim=1)
    sets = name_sets(logits, classifier.log_prior, class_names, set_threshold)
    if temperature != 1.0:
        probabilities = log_probabilities(logits, classifier.log_prior, temperature).exp()
    return Prediction(
        probabilities=probabilities,
        labels=labels,
        names=tuple(class_names[label] for label in labels.tolist()),
        uncertainty=uncertainty,
        sets=sets,
    )


def name_sets(
    logits: Tensor, log_prior: float | None, class_names: Sequence[str], threshold: float | None
) -> tuple[tuple[str, ...], ...] | None:
    """The names of the classes in the set of each image, the most probable first; None without a
    threshold.

    Args:
        logits: [N, C]; threshold: see `make_sets`.
    """
    if threshold is None:
        return None
    log_probs = log_probabilities(logits, log_prior)
    inside = make_sets(log_probs, threshold)
    order = log_probs.masked_fill(~inside, -math.inf).argsort(dim=1, descending=True, stable=True)
    sizes = inside.sum(dim=1).tolist()
    return tuple(
        tuple(class_names[index] for index in row[:size])
        for row, size in zip(order.tolist(), sizes, strict=True)
    )
