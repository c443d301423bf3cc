"""The 15 corruptions of CIFAR-10-C at 5 severities, made from any pictures.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019. The strengths are those of their CIFAR-10-C; lengths are in proportion
to the picture's shorter side, which is 32 there. No library that makes them is kept up with NumPy.
Fog and frost are drawn, where theirs are another fractal and photographs: figures on pictures made
here compare with each other, and with published ones only by their files (`published_pictures`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ekd_ray.errors import UserError, unknown_name
from ekd_ray.files import check_plain

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 32  # of the pictures whose lengths the strengths are

Pictures = Tensor  # float32 [N, 3, H, W] in [0, 1]
Rngs = Sequence[np.random.Generator]  # one for each picture


def _unit(x: Pictures) -> float:
    """Pixels of these pictures for one of a picture of 32 x 32."""
    return min(x.shape[2:]) / _SIDE


def _draw(rngs: Rngs, draw: Callable[[np.random.Generator], Any]) -> Tensor:
    """The draws of each picture's own generator, float32 [N, ...]."""
    return torch.from_numpy(np.stack([np.float32(draw(rng)) for rng in rngs]))


def _sample(x: Pictures, y: Tensor, z: Tensor, *, beyond: str) -> Pictures:
    """The pictures at the places (row y, column z), each [N or 1, H, W], in pixels."""
    height, width = x.shape[2:]
    at = torch.stack([2 * z / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=3)
    at = at.float().expand(len(x), -1, -1, -1)
    return functional.grid_sample(x, at, padding_mode=beyond, align_corners=True)


def _places(x: Pictures) -> tuple[Tensor, Tensor]:
    """The rows and the columns of a picture's pixels, float32 [1, H, W] each."""
    rows, columns = (torch.arange(size, dtype=torch.float32) for size in x.shape[2:])
    y, z = torch.meshgrid(rows, columns, indexing="ij")
    return y[None], z[None]


def _gaussian_noise(x: Pictures, rngs: Rngs, scale: float) -> Pictures:
    return x + scale * _draw(rngs, lambda rng: rng.standard_normal(x.shape[1:], np.float32))


def _shot_noise(x: Pictures, rngs: Rngs, photons: float) -> Pictures:
    drawn = [rng.poisson(image * photons) for rng, image in zip(rngs, x.numpy(), strict=True)]
    return torch.from_numpy(np.stack(drawn)).float() / photons


def _impulse_noise(x: Pictures, rngs: Rngs, share: float) -> Pictures:
    struck, white = _draw(rngs, lambda rng: rng.random((2, *x.shape[1:]), np.float32)).unbind(1)
    return torch.where(struck < share, (white < 0.5).float(), x)


def _blur(x: Pictures, sigma: float) -> Pictures:
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma)))


def _defocus_blur(x: Pictures, rngs: Rngs, radius: float, softness: float) -> Pictures:
    radius, softness = radius * _unit(x), softness * _unit(x)
    reach = min(int(np.ceil(radius + 3 * softness)), min(x.shape[2:]) - 1)
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (y**2 + z**2 <= radius**2).astype(np.float32)
    kernel = ndimage.gaussian_filter(disk, softness, mode="constant")
    weights = torch.from_numpy(kernel / kernel.sum())[None, None]
    channels = functional.pad(x, (reach,) * 4, mode="reflect").flatten(0, 1)[:, None]
    return functional.conv2d(channels, weights).view_as(x)


def _glass_blur(x: Pictures, rngs: Rngs, sigma: float, reach: int, turns: int) -> Pictures:
    unit = _unit(x)
    reach = max(1, round(reach * unit))
    pixels = _blur(x, sigma * unit).numpy().transpose(2, 3, 0, 1).copy()
    height, width = pixels.shape[:2]
    rows = np.arange(len(x))
    for _ in range(turns):  # one pixel after the other is swapped with one near it
        moves = [rng.integers(-reach, reach + 1, (height, width, 2)) for rng in rngs]
        near = np.stack(moves, axis=2)
        for top in range(height - reach - 1, reach - 1, -1):
            for left in range(width - reach - 1, reach - 1, -1):
                down, right = near[top, left].T
                other = (top + down, left + right, rows)
                here = pixels[top, left].copy()
                pixels[top, left] = pixels[other]
                pixels[other] = here
    return _blur(torch.from_numpy(pixels.transpose(2, 3, 0, 1).copy()), sigma * unit)


def _drag(x: Pictures, length: float, sigma: float, degrees: Tensor) -> Pictures:
    """Smeared in one direction, `degrees` [N], with weights of half a Gaussian."""
    y, z = _places(x)
    angle = torch.deg2rad(degrees)[:, None, None]
    steps = torch.arange(int(np.ceil(length)) + 1)
    weights = (-(steps**2) / (2 * sigma**2)).exp()
    weights = weights[weights > 1e-4] / weights.sum()
    total = torch.zeros_like(x)
    for step, weight in enumerate(weights):
        total += weight * _sample(
            x, y - step * angle.sin(), z - step * angle.cos(), beyond="border"
        )
    return total


def _motion_blur(x: Pictures, rngs: Rngs, length: float, sigma: float) -> Pictures:
    degrees = _draw(rngs, lambda rng: rng.uniform(-45, 45))
    return _drag(x, length * _unit(x), sigma * _unit(x), degrees)


def _zoom(x: Pictures, factor: float) -> Pictures:
    """The middle of the pictures, enlarged to their size."""
    places = zip(_places(x), x.shape[2:], strict=True)
    y, z = ((at - (size - 1) / 2) / factor + (size - 1) / 2 for at, size in places)
    return _sample(x, y, z, beyond="border")


def _zoom_blur(x: Pictures, rngs: Rngs, most: float) -> Pictures:
    factors = np.arange(1, most, 0.01)
    return torch.stack([x, *(_zoom(x, factor) for factor in factors)]).mean(dim=0)


def _snow(
    x: Pictures, rngs: Rngs, mean: float, spread: float, zoom: float, least: float,
    length: float, sigma: float, share: float,
) -> Pictures:  # fmt: skip
    flakes = mean + spread * _draw(rngs, lambda rng: rng.standard_normal((1, *x.shape[2:])))
    flakes = _zoom(flakes, zoom * max(1.0, _unit(x)))  # flakes grow with the picture
    flakes = torch.where(flakes < least, 0, flakes).clamp(0, 1)
    degrees = _draw(rngs, lambda rng: rng.uniform(-135, -45))
    flakes = _drag(flakes, length * _unit(x), sigma * _unit(x), degrees)
    grey = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    whitened = share * x + (1 - share) * x.maximum(grey * 1.5 + 0.5)
    return whitened + flakes + flakes.rot90(2, (2, 3))


def _clouds(x: Pictures, rngs: Rngs, decay: float) -> Tensor:
    """Value noise [N, 1, H, W] from 0 to 1: each octave is `decay` times weaker than the last."""
    total, weight, cells = x.new_zeros(len(x), 1, *x.shape[2:]), 1.0, 1
    while cells < max(x.shape[2:]):
        grid = _draw(rngs, partial(np.random.Generator.uniform, low=-1, high=1,
                                   size=(1, cells + 1, cells + 1)))  # fmt: skip
        total += weight * functional.interpolate(
            grid, x.shape[2:], mode="bilinear", align_corners=True
        )
        weight, cells = weight / decay, 2 * cells
    total -= total.amin(dim=(2, 3), keepdim=True)
    return total / total.amax(dim=(2, 3), keepdim=True)


def _fog(x: Pictures, rngs: Rngs, amount: float, decay: float) -> Pictures:
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + amount * _clouds(x, rngs, decay)) * brightest / (brightest + amount)


def _frost(x: Pictures, rngs: Rngs, share: float, amount: float) -> Pictures:
    # Ridges of a fractal, as ice has them, in its pale blue.
    ice = 1 - (2 * _clouds(x, rngs, 1.6) - 1).abs()
    return share * x + amount * ice * x.new_tensor([0.86, 0.93, 1.0])[:, None, None]


def _brightness(x: Pictures, rngs: Rngs, more: float) -> Pictures:
    # In HSV the value is the largest channel; hue and saturation are the channels' ratios.
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + more).clamp(0, 1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


def _contrast(x: Pictures, rngs: Rngs, factor: float) -> Pictures:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic(x: Pictures, rngs: Rngs, amount: float, sigma: float, jitter: float) -> Pictures:
    side = min(x.shape[2:])
    middle = torch.tensor([size // 2 for size in x.shape[2:]])
    corners = (middle + side // 3 * torch.tensor([[1, 1], [1, -1], [-1, -1]])).float()
    moved = corners + side * _draw(rngs, lambda rng: rng.uniform(-jitter, jitter, (3, 2)))
    # The affine maps [N, 3, 2] that take the moved corners back to where they were.
    ones = torch.ones(len(x), 3, 1)
    back = torch.linalg.solve(torch.cat([moved, ones], dim=2), corners.expand(len(x), -1, -1))
    drawn = _draw(rngs, lambda rng: rng.uniform(-1, 1, (2, *x.shape[2:]))).numpy()
    spread = sigma * side
    waves = torch.from_numpy(ndimage.gaussian_filter(drawn, (0, 0, spread, spread), truncate=3))
    y, z = (at + amount * side * wave for at, wave in zip(_places(x), waves.unbind(1), strict=True))
    at = torch.stack([y, z, torch.ones_like(y)], dim=3).flatten(1, 2) @ back
    y, z = at.view(*y.shape, 2).unbind(3)
    return _sample(x, y, z, beyond="reflection")


def _by_pillow(x: Pictures, change: Callable[[Image.Image], Image.Image]) -> Pictures:
    """Pictures that Pillow changes, each as 8-bit RGB."""
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


def _pixelate(x: Pictures, rngs: Rngs, share: float) -> Pictures:
    (height, width), box = x.shape[2:], Image.Resampling.BOX
    small = max(1, int(width * share)), max(1, int(height * share))
    return _by_pillow(x, lambda image: image.resize(small, box).resize((width, height), box))


def _jpeg(x: Pictures, rngs: Rngs, quality: int) -> Pictures:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(x, change)


@dataclass(frozen=True)
class Corruption:
    """One way to spoil pictures: a function of them, and its settings by severity, from 1 to 5."""

    apply: Callable[..., Pictures]
    strengths: tuple[Any, ...]


#: By their published names, in the published order.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        _defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Corruption(
        _glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Corruption(_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": Corruption(_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_jpeg, (80, 65, 58, 50, 40)),
}  # fmt: skip


def corrupt(
    images: Tensor, name: str, severity: int, *, seed: int, sample_ids: npt.ArrayLike
) -> Tensor:
    """Spoiled copies, uint8 [N, 3, H, W] on the CPU, of pictures of any size.

    What is drawn is a function of `seed`, of a picture's sample id and of the corruption, not of
    the severity: the pictures of a sample get worse along one line, in whatever batch it is.

    Args:
        images: uint8 [N, 3, H, W], with H and W of 8 or more.
        name: of `CORRUPTIONS`; severity: 1 to 5.
        sample_ids: int64 [N].

    Raises:
        UserError: an unknown name, or another severity.
    """
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"the severity of a corruption must be 1 to 5, got {severity}.")
    chosen, number = CORRUPTIONS[name], [*CORRUPTIONS].index(name)
    strength = chosen.strengths[severity - 1]
    strength = strength if isinstance(strength, tuple) else (strength,)
    rngs = [np.random.default_rng((seed, number, int(sample))) for sample in np.asarray(sample_ids)]
    spoiled = chosen.apply(images.cpu().float() / 255, rngs, *strength)
    return (spoiled.clamp(0, 1) * 255).round().to(torch.uint8)


def published_pictures(
    folder: str | Path, name: str, num_classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pictures uint8 [5 N, H, W, 3] and labels int64 [5 N] of a published corruption.

    The files are those of CIFAR-10-C: `NAME.npy`, the N test pictures at the severities 1 to 5, one
    after the other, and `labels.npy`. The pictures stay on the disk until they are looked at.

    Raises:
        UserError: a file is missing, damaged, holds Python objects, or another kind of array.
    """
    folder = Path(folder)
    images, labels = (_load_array(folder / f"{part}.npy") for part in (name, "labels"))
    count = len(labels) if labels.ndim == 1 else -1
    whole = labels.dtype.kind in "iu" and count > 0 and not count % len(SEVERITIES)
    if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UserError(
            f"{folder / 'labels.npy'} must hold the classes, 0 to {num_classes - 1}, of the same "
            f"pictures at 5 severities, got {labels.dtype} {list(labels.shape)}: give the "
            "published files, of this data set."
        )
    if np.any(labels != np.tile(labels[: count // len(SEVERITIES)], len(SEVERITIES))):
        raise UserError(
            f"{folder / 'labels.npy'} must name the same classes at each of the 5 severities: give "
            "the published file."
        )
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if images.dtype != np.uint8 or not square or len(images) != count:
        raise UserError(
            f"{folder / f'{name}.npy'} must hold uint8 [{count}, S, S, 3], a picture for each of "
            f"labels.npy, got {images.dtype} {list(images.shape)}: give the published file."
        )
    return images, labels.astype(np.int64)


def _load_array(path: Path) -> npt.NDArray[Any]:
    check_plain(path, cure="name the folder of the published files (fog.npy, labels.npy, ...)")
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damage comes as errors of every kind
        raise UserError(f"{path} is damaged or no array of numbers: fetch it again.") from error
    return found
