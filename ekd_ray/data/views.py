"""A view is an integer that names one augmented form of an image.

Crop and flip, applied on the device: for a scheme with padding p, let s = 2p + 1. View id =
(flip * s + dy) * s + dx, where the crop starts at row dy and column dx of the image padded with
p black pixels on every side, and is mirrored left to right when flip is 1.

"resized_crop", cut while a picture is decoded, has no such list, because its outcomes depend on
the picture's own size: view v of sample i is one rectangle and one coin of a seeded pool. The
rule is that of Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), as torchvision's
RandomResizedCrop states it: an area of 8 % to 100 % of the picture, an aspect ratio of 3/4 to
4/3 (uniform in its logarithm), ten tries to fit it in, and else the largest legal rectangle in
the centre. Mirrored left to right with probability 1/2. With u(k) the k-th uniform number of
`counter_hash(seed, STREAM_CROP, sample id, view id, k)`, try t draws area, aspect ratio, top and
left from k = 4t ... 4t + 3; k = 40 is the coin.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ekd_ray.data.counter import STREAM_CROP, UInt64Array, counter_hash
from ekd_ray.errors import UserError, unknown_name

RESIZED_CROP = "resized_crop"
DEFAULT_POOL = 64  # views of each sample of "resized_crop" where no other number is asked for


@dataclass(frozen=True, kw_only=True)
class ViewScheme:
    """Random crop with `padding` black pixels, and mirroring if `flip`."""

    name: str
    padding: int
    flip: bool

    @property
    def side(self) -> int:
        """Number of crop positions along one axis."""
        return 2 * self.padding + 1

    @property
    def count(self) -> int:
        """Number of views."""
        return self.side**2 * (2 if self.flip else 1)


VIEW_SCHEMES: dict[str, ViewScheme] = {
    scheme.name: scheme
    for scheme in (
        ViewScheme(name="crop_flip", padding=4, flip=True),
        ViewScheme(name="crop8_flip", padding=8, flip=True),
        ViewScheme(name="crop", padding=4, flip=False),
        ViewScheme(name="none", padding=0, flip=False),
    )
}


def view_scheme(name: str) -> ViewScheme:
    """The enumerated scheme of that name.

    Raises UserError for "resized_crop", which is none, and for any other name that is unknown,
    with the nearest known one.
    """
    if name == RESIZED_CROP:
        raise UserError(
            f"the view scheme {name!r} is cut while a picture is decoded; for images of one size "
            f"choose {', '.join(VIEW_SCHEMES)}."
        )
    try:
        return VIEW_SCHEMES[name]
    except (KeyError, TypeError):
        known = [*VIEW_SCHEMES, RESIZED_CROP]
        raise unknown_name("view scheme", name, known, keys=()) from None


def view_count(scheme: str, pool: int = DEFAULT_POOL) -> int:
    """Number of views of a sample.

    162 for "crop_flip", 578 for "crop8_flip", 81 for "crop", 1 for "none", and `pool` for
    "resized_crop". Raises UserError for an unknown scheme.
    """
    return pool if scheme == RESIZED_CROP else view_scheme(scheme).count


def apply_views(images: torch.Tensor, view_ids: torch.Tensor, scheme: str) -> torch.Tensor:
    """View view_ids[b] of images[b] for every b.

    `images` is uint8 [B, 3, H, W] (any number of channels will do), `view_ids` int64 [B] on
    the same device with values in [0, view_count(scheme)); ids are not checked, which would
    make a GPU wait. Returns uint8 [B, 3, H, W]; the images themselves for a scheme with one
    view. Raises UserError for an unknown scheme and for "resized_crop".
    """
    rules = view_scheme(scheme)
    if rules.count == 1:
        return images
    batch, channels, height, width = images.shape
    pad, side = rules.padding, rules.side
    dx = (view_ids % side).view(-1, 1)
    dy = (view_ids // side % side).view(-1, 1)
    # Padding comes before normalisation, as in the published code: black, not the mean.
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    columns = torch.arange(width, device=images.device)
    if rules.flip:
        mirrored = (view_ids // side**2).view(-1, 1).bool()
        columns = torch.where(mirrored, columns.flip(0), columns)
    rows = torch.arange(height, device=images.device) + dy
    # One gather over flat pixels: half the time of indexing all windows, and no flip pass.
    flat = rows.mul_(width + 2 * pad).unsqueeze(2) + (columns + dx).unsqueeze(1)
    index = flat.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.gather(2, index).view(batch, channels, height, width)


def normalize(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool = False,
) -> torch.Tensor:
    """(images / 255 - mean) / std per channel.

    `images` is uint8 [B, 3, H, W]; `mean` and `std` are on the [0, 1] scale. Returns float32
    [B, 3, H, W], in channels_last memory format if asked for.
    """
    scale, shift = _affine(tuple(mean), tuple(std), images.device)
    pixels = images.float().mul_(scale).add_(shift)
    # Reordered last: arithmetic whose innermost axis is three channels is four times slower.
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels


@functools.lru_cache(maxsize=64)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached, because copying six numbers to a GPU makes it wait. In float64 up to here, so that
    # the folded constants cost no accuracy.
    deviations = torch.tensor(std, dtype=torch.float64)
    scale = 1.0 / (255.0 * deviations)
    shift = -torch.tensor(mean, dtype=torch.float64) / deviations
    return tuple(t.float().view(1, -1, 1, 1).to(device) for t in (scale, shift))  # type: ignore[return-value]


# ---- random resized crops

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_COIN = 4 * _TRIES


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    left: int
    top: int
    width: int
    height: int


class Region(NamedTuple):
    """The rectangle between two corners, in pixels that may be fractions."""

    left: float
    top: float
    right: float
    bottom: float


def crop_bits(sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike, seed: int) -> UInt64Array:
    """The random bits of views `view_ids` [B] of samples `sample_ids` [B]: uint64 [B, 41]."""
    samples, views = np.asarray(sample_ids), np.asarray(view_ids)
    return counter_hash(seed, STREAM_CROP, samples[:, None], views[:, None], np.arange(_COIN + 1))


def crop_box(width: int, height: int, bits: UInt64Array) -> Box:
    """Which rectangle of a picture of `width` x `height` pixels a row of `crop_bits` names."""
    log_ratio = (math.log(_RATIO[0]), math.log(_RATIO[1]))
    # As Python integers: numpy's scalars make the loop five times slower.
    draws = bits.tolist()
    for first in range(0, _COIN, 4):
        area = width * height * _uniform(draws[first], *_AREA)
        ratio = math.exp(_uniform(draws[first + 1], *log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = _below(draws[first + 2], height - h + 1)
            return Box(_below(draws[first + 3], width - w + 1), top, w, h)
    return _central_box(width, height)


def crop_flips(bits: UInt64Array) -> bool:
    """Whether a row of `crop_bits` mirrors its picture."""
    return bool(bits[_COIN] >> np.uint64(63))


def short_side(size: int) -> int:
    """Pixels that a picture's short side is resized to, before evaluation cuts out `size`."""
    return round(size * 256 / 224)


def evaluation_region(width: int, height: int, size: int) -> Region:
    """The part of a picture that evaluation at `size` pixels a side looks at, in its own pixels.

    Equals the centre crop of `size` after the short side was resized to size * 256 / 224, with
    torchvision's rounding.
    """
    short = short_side(size)
    if width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return Region(
        left * width / wide,
        top * height / high,
        min((left + size) * width / wide, width),
        min((top + size) * height / high, height),
    )


def _central_box(width: int, height: int) -> Box:
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(w / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(h * _RATIO[1])
    return Box((width - w) // 2, (height - h) // 2, w, h)


def _uniform(draw: int, low: float, high: float) -> float:
    return low + (high - low) * ((draw >> 11) * 2.0**-53)


def _below(draw: int, bound: int) -> int:
    """As `counter.bounded`, of one number."""
    return ((draw >> 32) * bound) >> 32
