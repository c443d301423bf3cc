"""The strong view of Multi-Level Logit Distillation, as tensor operations on the device.

Jin et al., "Multi-Level Logit Distillation", CVPR 2023, train on a second view of each image:
crop and flip, then RandAugment (two operations out of fourteen) and Cutout, with the
operations and ranges that FixMatch made common. Here a strong view is an integer, like the
views of `ekd_ray.data.views`: (seed, sample id, strong id) always names the same picture, in
whatever batch, on whatever worker and in whatever epoch it is asked for. The numbers are drawn
on the host; so which rows an operation applies to is known there, and a GPU is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ekd_ray.data.counter import STREAM_STRONG, Int64Array, UInt64Array, bounded, counter_hash
from ekd_ray.data.transfer import to_device

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

CUTOUT_FILL = (125, 123, 114)
CUTOUT_LIMIT = 0.5

# Last counter of a strong view's draws.
_OPS = slice(0, 2)
_VALUES = slice(2, 4)
_CUTOUT = slice(4, 7)
_BASE_VIEW = 7
_DRAWS = 8


@dataclass(frozen=True, eq=False)
class StrongDraw:
    """The operations drawn for each of B images, on the host.

    `ops` int64 [B, 2]: positions in STRONG_OPS, applied left to right; `values` float32 [B, 2]:
    their values; `cutout` float32 [B, 3]: the square's side as a fraction of the width, then
    its centre as fractions of width and height.
    """

    ops: Int64Array
    values: Float32Array
    cutout: Float32Array


def strong_draws(sample_ids: npt.ArrayLike, strong_ids: npt.ArrayLike, *, seed: int) -> StrongDraw:
    """The draw that each (sample id, strong id) names under `seed`.

    Both ids are integers [B]; `sample_ids` index the data set, not a split of it. Each of the
    two operations is uniform over STRONG_OPS, with replacement, its value uniform in its range;
    the square's side is uniform in [0, 0.5], its centre in the image. Raises TypeError for ids
    that are not integers.
    """
    bits = _bits(sample_ids, strong_ids, seed)
    ops = bounded(bits[:, _OPS], len(STRONG_OPS))
    values = _LOW[ops] + _SPAN[ops] * _unit(bits[:, _VALUES])
    # The published code means this centre but asks for uniform(low=side, high=1), which leaves
    # out the first pixel.
    cutout = _unit(bits[:, _CUTOUT]) * (CUTOUT_LIMIT, 1.0, 1.0)
    return StrongDraw(ops, values.astype(np.float32), cutout.astype(np.float32))


def strong_base_views(
    sample_ids: npt.ArrayLike, strong_ids: npt.ArrayLike, *, seed: int, num_views: int
) -> Int64Array:
    """The crop and flip below each strong view: int64 [B] in [0, num_views).

    The ids are those of `strong_draws`; `num_views` is `view_count(scheme)`, and the result
    goes to `apply_views(images, ..., scheme)` before `strong_augment`. Raises TypeError for
    ids that are not integers.
    """
    return bounded(_bits(sample_ids, strong_ids, seed)[:, _BASE_VIEW], num_views)


def _bits(sample_ids: npt.ArrayLike, strong_ids: npt.ArrayLike, seed: int) -> UInt64Array:
    """All random bits of the strong views, uint64 [B, _DRAWS]."""
    sample, strong = np.asarray(sample_ids), np.asarray(strong_ids)
    if sample.ndim != 1 or sample.shape != strong.shape:
        raise ValueError(
            f"sample_ids and strong_ids must be of one shape [B], got {sample.shape} and "
            f"{strong.shape}"
        )
    return counter_hash(
        seed, STREAM_STRONG, sample[:, None], strong[:, None], np.arange(_DRAWS, dtype=np.int64)
    )


def _unit(bits: UInt64Array) -> Float64Array:
    """Uniform in [0, 1), with the 24 bits that float32 can hold."""
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24


def strong_augment(images: torch.Tensor, draw: StrongDraw) -> torch.Tensor:
    """Two operations and a Cutout on every image, as `draw` says.

    `images` is uint8 [B, 3, H, W] on any device, already cropped and flipped, and is not
    changed. Returns a new contiguous uint8 [B, 3, H, W] there: the pixels that Pillow's
    ImageOps, ImageEnhance, rotate, transform (nearest neighbour, black outside) and
    ImageDraw.rectangle give. The values of `draw` are not checked against their ranges. Raises
    ValueError for images of another type or shape, or if the draw is for another number of
    them.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    batch, _, height, width = images.shape
    if draw.ops.shape != (batch, 2):
        raise ValueError(f"the draw is for {len(draw.ops)} images, got {batch}")
    result = apply_operations(images, draw.ops, draw.values)
    return fill_boxes(result, _cutout_boxes(draw.cutout, height, width))


def apply_operations(
    images: torch.Tensor, drawn_ops: Int64Array, values: npt.NDArray[np.floating[Any]]
) -> torch.Tensor:
    """K operations on every image of uint8 [B, 3, H, W]: a new contiguous one.

    `drawn_ops` [B, K] are positions in STRONG_OPS, applied left to right, `values` [B, K] theirs.
    """
    _, _, height, width = images.shape
    ops = drawn_ops.T
    kernels = _KERNEL_OF_OP[ops]
    # In each slot the batch is sorted by kernel, so that each takes one slice of it: a gather to
    # each order, and one back, instead of two a kernel.
    order = np.argsort(kernels, axis=1, kind="stable")
    back = np.argsort(order, axis=1)
    numbers = np.take_along_axis(
        _kernel_numbers(ops, values.T, height, width), order[..., None], axis=1
    )
    between = [back[slot - 1][order[slot]] for slot in range(1, len(order))]
    way = to_device(np.stack([order[0], *between, back[-1]]), images.device)
    amounts = to_device(numbers, images.device)
    for slot in range(len(order)):
        sizes = np.bincount(kernels[slot], minlength=len(_KERNELS)).tolist()
        pieces = images.index_select(0, way[slot]).split(sizes)
        images = torch.cat(
            [
                kernel(piece, amount) if kernel is not None and len(piece) else piece
                for kernel, piece, amount in zip(
                    _KERNELS, pieces, amounts[slot].split(sizes), strict=True
                )
            ]
        )
    return images.index_select(0, way[-1])


def _kernel_numbers(
    ops: Int64Array, values: npt.NDArray[np.floating[Any]], height: int, width: int
) -> Float64Array:
    """The numbers of each kernel: a value in column 0, or six coefficients; float64 [K, B, 6]."""
    numbers = np.zeros((*ops.shape, 6))
    numbers[..., 0] = values
    for position, op in enumerate(STRONG_OPS):
        if op.matrix is not None:
            here = ops == position
            matrix = op.matrix(values[here].astype(np.float64), height, width)
            numbers[here] = _fixed_point(matrix)
    return numbers


# ---- affine operations: the source of pixel centre (x, y) is (a x + b y + c, d x + e y + f).


def _matrix(values: Float64Array, **changed: Float64Array) -> Float64Array:
    """The identity, float64 [n, 6], with some of its coefficients a to f changed."""
    matrix = np.zeros((len(values), 6))
    matrix[:, [0, 4]] = 1.0
    for letter, column in changed.items():
        matrix[:, "abcdef".index(letter)] = column
    return matrix


def _rotation(degrees: Float64Array, height: int, width: int) -> Float64Array:
    """Counter-clockwise about the centre of the image."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    return _matrix(
        degrees, a=cos, b=-sin, c=x - cos * x + sin * y, d=sin, e=cos, f=y - sin * x - cos * y
    )


def _fixed_point(matrix: Float64Array) -> Float64Array:
    """The coefficients in PIL's 16.16 fixed point (whole numbers), moved to pixel centres."""
    centred = matrix.copy()
    centred[:, 2] += 0.5 * (matrix[:, 0] + matrix[:, 1])
    centred[:, 5] += 0.5 * (matrix[:, 3] + matrix[:, 4])
    return np.floor(centred * 65536.0 + 0.5)


def _affine(images: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour, black outside; `fixed` [n, 6] is what `_fixed_point` returns.

    In integers the source pixels are PIL's, with no rounding to disagree about; int32 holds
    them for sides up to 2^14, about where PIL leaves fixed point itself.
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = fixed.int().view(count, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device, dtype=torch.int32)
    y = torch.arange(height, device=images.device, dtype=torch.int32).view(-1, 1)
    column = (a * x + c) + b * y
    row = (d * x + f) + e * y
    # Everything outside falls on a border of one black pixel.
    column.bitwise_right_shift_(16).clamp_(-1, width)
    row.bitwise_right_shift_(16).clamp_(-1, height)
    source = row.mul_(width + 2).add_(column).add_(width + 3)
    index = source.long().view(count, 1, height * width).expand(-1, channels, -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, index).view_as(images)


# ---- PIL's colour operations, each sample with its own magnitude
#
# Images are uint8 [B, 3, H, W] on any device, magnitudes [B] on the same one; every function
# returns a new uint8 [B, 3, H, W] with the pixels that Pillow gives. Nothing makes a GPU wait.


def _per_sample(magnitudes: torch.Tensor) -> torch.Tensor:
    return magnitudes.view(-1, 1, 1, 1)


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """degenerate + factor * (images - degenerate), truncated, in 0..255: PIL's Image.blend."""
    base = degenerate.float()
    # Product and sum are rounded one after the other, as PIL's float32 arithmetic does:
    # lerp or addcmul would round once and change a grey level here and there.
    blended = base + _per_sample(factors).float() * (images.float() - base)
    return blended.clamp_(0, 255).to(torch.uint8)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma in 16-bit fixed point, int32 [B, 1, H, W]: PIL's convert("L")."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance.Brightness: a blend with black."""
    return (images.float() * _per_sample(factors).float()).clamp_(0, 255).to(torch.uint8)


def color(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance.Color: a blend with the grey image."""
    return _blend(_luma(images), images, factors)


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance.Contrast: a blend with the image's mean luma, rounded half up."""
    count = images.shape[2] * images.shape[3]
    total = _luma(images).sum(dim=(2, 3), keepdim=True)
    return _blend((2 * total + count) // (2 * count), images, factors)


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance.Sharpness: a blend with the smoothed image.

    The kernel is [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels keep their value.
    """
    pixels = images.to(torch.int16)
    smooth = pixels.clone()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    # Thirteenths are never halfway between two levels, so adding 6 rounds to the nearest.
    smooth[:, :, 1:-1, 1:-1] = (inner + 6) // 13
    return _blend(smooth, images, factors)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """ImageOps.autocontrast: each channel stretched to 0..255; a flat one stays as it is."""
    low = images.amin(dim=(2, 3), keepdim=True).double()
    high = images.amax(dim=(2, 3), keepdim=True).double()
    flat = high == low
    # In PIL's order and precision: many results are whole numbers up to the last bit, where
    # float32 (or dividing last) truncates to another level.
    # A number over a tensor would be a reciprocal and a product, rounded twice.
    scale = torch.where(flat, 1.0, torch.full_like(low, 255.0) / (high - low))
    offset = torch.where(flat, 0.0, -low * scale)
    return (images * scale + offset).clamp_(0, 255).to(torch.uint8)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """ImageOps.equalize: the histogram of each channel made flat."""
    from torchvision.transforms.v2 import functional  # takes a second

    return functional.equalize(images)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """ImageOps.posterize: the upper int(bits) of the eight bits, 1 <= bits <= 8."""
    lost = 8 - _per_sample(bits).to(torch.uint8)
    return images >> lost << lost


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """ImageOps.solarize: levels at or above the threshold inverted, 0 <= threshold <= 256."""
    bound = _per_sample(thresholds).ceil().to(torch.int16)
    return torch.where(images < bound, images, 255 - images)


# ---- all operations, and Cutout

_Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StrongOp(NamedTuple):
    """An operation of RandAugment, the range of its value, and how it is computed.

    `kernel` makes uint8 [n, 3, H, W] from such images and float64 [n, 6]: the values in column 0,
    or the coefficients that `matrix` makes from values, height and width. None changes nothing.
    """

    name: str
    low: float
    high: float
    kernel: _Kernel | None
    matrix: Callable[[Float64Array, int, int], Float64Array] | None = None


def _of_value(operation: _Kernel) -> _Kernel:
    return lambda images, numbers: operation(images, numbers[:, 0])


# In the published order. Values are factors of a blend with the original (1 changes nothing); bits;
# degrees, counter-clockwise; source columns per row; a grey level; fractions of the side.
# PIL translates without its fixed point, to the whole pixel that the exact shift falls on.
STRONG_OPS: tuple[StrongOp, ...] = (
    StrongOp("AutoContrast", 0.0, 1.0, lambda images, _: autocontrast(images)),  # value unused
    StrongOp("Brightness", 0.05, 0.95, _of_value(brightness)),
    StrongOp("Color", 0.05, 0.95, _of_value(color)),
    StrongOp("Contrast", 0.05, 0.95, _of_value(contrast)),
    StrongOp("Equalize", 0.0, 1.0, lambda images, _: equalize(images)),  # value unused
    StrongOp("Identity", 0.0, 1.0, None),  # value unused
    StrongOp("Posterize", 4.0, 8.0, _of_value(posterize)),
    StrongOp("Rotate", -30.0, 30.0, _affine, _rotation),
    StrongOp("Sharpness", 0.05, 0.95, _of_value(sharpness)),
    StrongOp("ShearX", -0.3, 0.3, _affine, lambda v, h, w: _matrix(v, b=v)),
    StrongOp("ShearY", -0.3, 0.3, _affine, lambda v, h, w: _matrix(v, d=v)),
    StrongOp("Solarize", 0.0, 256.0, _of_value(solarize)),
    StrongOp("TranslateX", -0.3, 0.3, _affine, lambda v, h, w: _matrix(v, c=np.floor(v * w + 0.5))),
    StrongOp("TranslateY", -0.3, 0.3, _affine, lambda v, h, w: _matrix(v, f=np.floor(v * h + 0.5))),
)
_LOW = np.array([op.low for op in STRONG_OPS])
_SPAN = np.array([op.high - op.low for op in STRONG_OPS])
# The five affine operations are one kernel.
_KERNELS: tuple[_Kernel | None, ...] = tuple(dict.fromkeys(op.kernel for op in STRONG_OPS))
_KERNEL_OF_OP = np.array([_KERNELS.index(op.kernel) for op in STRONG_OPS])


def _cutout_boxes(cutout: Float32Array, height: int, width: int) -> Int64Array:
    """First and last column, first and last row of each square: int64 [B, 4], inclusive.

    As published, the square starts where one of full size about the centre would, cut off at
    the border, but then has its full size from there.
    """
    side, x, y = cutout.astype(np.float64).T * [[width], [width], [height]]
    left = np.floor(np.maximum(0.0, x - side / 2))
    top = np.floor(np.maximum(0.0, y - side / 2))
    # A square of no size is not drawn; any other covers at least the pixel it starts on.
    right = np.where(side > 0, np.floor(left + side), -1.0)
    bottom = np.floor(top + side)
    return np.stack([left, right, top, bottom], axis=1).astype(np.int64)


def fill_boxes(images: torch.Tensor, boxes: Int64Array) -> torch.Tensor:
    """Fill the box of each image of uint8 [B, 3, H, W] with CUTOUT_FILL, in place.

    `boxes` [B, 4] are first and last column, first and last row, inclusive.
    """
    inside = inside_boxes(boxes, images)
    # One channel after the other: a tensor of three colours would have to be copied over.
    for channel, level in enumerate(CUTOUT_FILL):
        images[:, channel].masked_fill_(inside, level)
    return images


def inside_boxes(boxes: Int64Array, images: torch.Tensor) -> torch.Tensor:
    """Bool [B, H, W] on the device of images [B, C, H, W]: which pixels lie in `boxes`."""
    left, right, top, bottom = to_device(boxes, images.device).view(-1, 4, 1).unbind(1)
    x = torch.arange(images.shape[3], device=images.device)
    y = torch.arange(images.shape[2], device=images.device)
    columns = (x >= left) & (x <= right)
    rows = (y >= top) & (y <= bottom)
    return rows.unsqueeze(2) & columns.unsqueeze(1)
