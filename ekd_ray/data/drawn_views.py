"""Views that are drawn: operations, an erased rectangle, another picture mixed in, on the device.

Here a view is a number of a bounded pool: (seed, sample id, view id) names one picture, in whatever
run it is asked for, so that a teacher's answer to it can be kept. Under it lies a view of the data
set's scheme. On that come, in this order, the operations of RandAugment (Cubuk et al., CVPR
workshops 2020) or TrivialAugment (Mueller and Hutter, ICCV 2021), random erasing (Zhong et al.,
AAAI 2020), and mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) with another
training picture, which has gone through the same. The numbers are drawn on the host, in
torchvision's ranges.

torchvision's own transforms draw for one picture at a time, from one state: with the state set for
each picture they take 5 to 20 times as long (docs/speed.md#drawn-views).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data.counter import STREAM_DRAWN, Int64Array, UInt64Array, bounded, counter_hash
from ekd_ray.data.strong_views import (
    STRONG_OPS,
    Float64Array,
    apply_operations,
    fill_boxes,
    inside_boxes,
)
from ekd_ray.data.transfer import to_device
from ekd_ray.data.views import view_count

_STRENGTHS = 30  # of an operation, from 0
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)
# Mixup weighs in whole 256ths, so that a picture and its label are the same on every machine.
_WHOLE = 256
_MIXING = ("mixup_alpha", "cutmix_alpha", "mix_share")
# Second counter of a view's draws: what they decide.
_BASE, _PARTNER, _OPERATIONS, _ERASING, _MIX = range(5)


class _Values(NamedTuple):
    """An operation's value that changes nothing, and how far those at full strength are from it.

    Translations are in fractions of the side, TrivialAugment's in pixels.
    """

    start: float = 0.0
    randaugment: float = 0.0
    trivialaugment: float = 0.0
    signed: bool = True


_ENHANCED, _SHEARED = _Values(1.0, 0.9, 0.99), _Values(0.0, 0.3, 0.99)
_TRANSLATED = _Values(0.0, 150 / 331, 32.0)
_VALUES = {
    "Brightness": _ENHANCED,
    "Color": _ENHANCED,
    "Contrast": _ENHANCED,
    "Posterize": _Values(8.0, -4.0, -6.0, signed=False),
    "Rotate": _Values(0.0, 30.0, 135.0),
    "Sharpness": _ENHANCED,
    "ShearX": _SHEARED,
    "ShearY": _SHEARED,
    "Solarize": _Values(255.0, -255.0, -255.0, signed=False),
    "TranslateX": _TRANSLATED,
    "TranslateY": _TRANSLATED,
}
_NAMES = [op.name for op in STRONG_OPS]
_POSTERIZE = _NAMES.index("Posterize")
_TRANSLATE = [_NAMES.index(name) for name in ("TranslateX", "TranslateY")]
_TABLE = [_VALUES.get(name, _Values()) for name in _NAMES]


def count_views(config: DistillConfig, scheme: str) -> int:
    """Number of views of each sample that a run has, of a data set with that scheme."""
    if config.draws_views:
        return config.view_pool
    return view_count(config.augment or scheme, config.view_pool)


def drawn_settings(config: DistillConfig) -> dict[str, Any]:
    """The settings that decide what is drawn; empty where nothing is."""
    found: dict[str, Any] = {}
    if config.auto_augment != "none":
        found["auto_augment"] = config.auto_augment
    if config.auto_augment == "randaugment":
        found["randaugment_ops"] = config.randaugment_ops
        found["randaugment_magnitude"] = config.randaugment_magnitude
    if config.random_erasing:
        found["random_erasing"] = config.random_erasing
    if config.mixes_pictures:
        found |= {name: getattr(config, name) for name in _MIXING}
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnViews:
    """The drawn views of a run.

    Attributes:
        config: the run, whose settings say what is drawn (`DistillConfig.draws_views`).
        base_views: number of views of the scheme below.
        image_size: side of the pictures in pixels.
        num_classes: of the data set.
        partners: int64 [N], the samples that may be mixed in: those that are trained on.
    """

    config: DistillConfig
    base_views: int
    image_size: int
    num_classes: int
    partners: Int64Array

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values that decide a view, beside seed, scheme, size and the data."""
        found = drawn_settings(self.config)
        if self.config.mixes_pictures:
            # Those of another split are other pictures.
            ids = self.partners.astype("<i8").tobytes()
            found["partners"] = hashlib.sha256(ids).hexdigest()[:16]
        return found

    def below(self, sample_ids: Int64Array, view_ids: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The samples, and their views in the scheme, that the views [B] are made of.

        int64 [B] each, or [2 B] where pictures are mixed: those that are mixed in come last.
        """
        bases = bounded(self._bits(sample_ids, view_ids, _BASE, 1)[:, 0], self.base_views)
        if self.config.mixes_pictures:
            bits = self._bits(sample_ids, view_ids, _PARTNER, 1)[: len(sample_ids), 0]
            partners = self.partners[bounded(bits, len(self.partners))]
            sample_ids = np.concatenate([sample_ids, partners])
        return sample_ids, bases

    def finish(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        sample_ids: Int64Array,
        view_ids: Int64Array,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The views and their labels, from the pictures that are `below` them.

        Args:
            images: uint8 [B or 2 B, 3, S, S], which are changed; labels: int64, one for each.
            sample_ids, view_ids: int64 [B] on the host.

        Returns:
            Views uint8 [B, 3, S, S], labels int64 [B], of a mix that of the larger part, and its
            classes' shares float32 [B, C], None where nothing is mixed.
        """
        if self.config.auto_augment != "none":
            bits = self._bits(sample_ids, view_ids, _OPERATIONS, 3 * self._num_ops)
            images = apply_operations(images, *self._operations(bits))
        if self.config.random_erasing:
            images = fill_boxes(images, self._erased(self._bits(sample_ids, view_ids, _ERASING, 5)))
        if not self.config.mixes_pictures:
            return images, labels, None
        bits = self._bits(sample_ids, view_ids, _MIX, 5)[: len(sample_ids)]
        return self._mix(images, labels, bits)

    def _bits(
        self, sample_ids: Int64Array, view_ids: Int64Array, purpose: int, count: int
    ) -> UInt64Array:
        """Random bits uint64 [B or 2 B, count], for each picture that is `below` the views."""
        part = np.arange(1 + self.config.mixes_pictures)[:, None, None]
        samples, views = np.asarray(sample_ids)[:, None], np.asarray(view_ids)[:, None]
        bits = counter_hash(
            self.config.view_seed, STREAM_DRAWN, purpose, samples, views, part, np.arange(count)
        )
        return bits.reshape(-1, count)

    @property
    def _num_ops(self) -> int:
        return self.config.randaugment_ops if self.config.auto_augment == "randaugment" else 1

    def _operations(self, bits: UInt64Array) -> tuple[Int64Array, Float64Array]:
        """Positions in STRONG_OPS and values, [n, K] each, from bits [n, 3 K]."""
        config = self.config
        which, sign, strength = np.split(bits, 3, axis=1)
        ops = bounded(which, len(_TABLE))
        if config.auto_augment == "randaugment":
            strengths: Any = config.randaugment_magnitude
        else:
            strengths = bounded(strength, _STRENGTHS + 1)
        start, span, signed = (
            np.array([getattr(values, name) for values in _TABLE])[ops]
            for name in ("start", config.auto_augment, "signed")
        )
        moved = span * strengths / _STRENGTHS
        moved = np.where(ops == _POSTERIZE, np.rint(moved), moved)
        pixels = moved * (self.image_size if config.auto_augment == "randaugment" else 1)
        moved = np.where(np.isin(ops, _TRANSLATE), np.trunc(pixels) / self.image_size, moved)
        return ops, start + np.where(signed & (bounded(sign, 2) == 1), -moved, moved)

    def _erased(self, bits: UInt64Array) -> Int64Array:
        """Boxes [n, 4] as `fill_boxes` takes them, from bits [n, 5]."""
        side, drawn = self.image_size, _uniform(bits)
        low, high = _ERASED_AREA
        area = (low + (high - low) * drawn[:, 1]) * side**2
        low, high = np.log(_ERASED_RATIO)
        ratio = np.exp(low + (high - low) * drawn[:, 2])
        # A rectangle may be too long for a picture once in some hundred: it is cut off.
        sides = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=1)))
        sides = sides.clip(1, side - 1).astype(np.int64)
        first = np.floor(drawn[:, 3:] * (side - sides + 1)).astype(np.int64)
        last = first + sides - 1
        last[drawn[:, 0] >= self.config.random_erasing] = -1
        return np.stack([first, last], axis=2).reshape(-1, 4)

    def _mix(
        self, images: torch.Tensor, labels: torch.Tensor, bits: UInt64Array
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `finish`, from bits [B, 5]."""
        from scipy.special import betaincinv  # slow import

        config, side = self.config, self.image_size
        drawn = _uniform(bits)
        cut = drawn[:, 1] < (0.5 if config.mixup_alpha and config.cutmix_alpha else 1.0)
        cut &= config.cutmix_alpha > 0
        alpha = np.where(cut, config.cutmix_alpha, config.mixup_alpha)
        own = np.where(drawn[:, 0] < config.mix_share, betaincinv(alpha, alpha, drawn[:, 2]), 1.0)
        weights = np.where(cut, _WHOLE, np.rint(own * _WHOLE)).astype(np.int32)
        half = np.floor(side * np.sqrt(1 - own) / 2)[:, None] * cut[:, None]
        centre = np.floor(drawn[:, 3:] * side)
        first = (centre - half).clip(0, side).astype(np.int64)
        last = (centre + half).clip(0, side).astype(np.int64) - 1
        covered = (last - first + 1).prod(axis=1) / side**2
        shares = np.where(cut, 1 - covered, weights / _WHOLE).astype(np.float32)

        image, other = images.chunk(2)
        if config.mixup_alpha:
            weight = to_device(weights, images.device).view(-1, 1, 1, 1)
            blended = image.int() * weight + other.int() * (_WHOLE - weight)
            image = (blended + _WHOLE // 2 >> 8).to(torch.uint8)
        if config.cutmix_alpha:
            boxes = np.stack([first, last], axis=2).reshape(-1, 4)
            image = torch.where(inside_boxes(boxes, image)[:, None], other, image)
        label, other_label = labels.chunk(2)
        share = to_device(shares, labels.device)
        of_classes = share.new_zeros(len(label), self.num_classes)
        of_classes.scatter_(1, label[:, None], share[:, None])
        of_classes.scatter_add_(1, other_label[:, None], 1 - share[:, None])
        return image, torch.where(share >= 0.5, label, other_label), of_classes


def _uniform(bits: UInt64Array) -> Float64Array:
    """Uniform in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
