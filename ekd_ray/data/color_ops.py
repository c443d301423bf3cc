"""PIL's colour operations on batches of images, each sample with its own magnitude.

Images are uint8 [B, 3, H, W] on any device, magnitudes [B] on the same one; every function
returns a new uint8 [B, 3, H, W] with the pixels that Pillow gives. Nothing makes a GPU wait.
"""

from __future__ import annotations

import torch


def _per_sample(magnitudes: torch.Tensor) -> torch.Tensor:
    return magnitudes.view(-1, 1, 1, 1)


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """degenerate + factor * (images - degenerate), truncated: PIL's Image.blend."""
    base = degenerate.float()
    # Product and sum are rounded one after the other, as PIL's float32 arithmetic does:
    # lerp or addcmul would round once and change a grey level here and there.
    return (base + _per_sample(factors).float() * (images.float() - base)).to(torch.uint8)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """ITU-R 601 luma in 16-bit fixed point, int32 [B, 1, H, W]: PIL's convert("L")."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """ImageEnhance.Brightness: a blend with black."""
    return (images.float() * _per_sample(factors).float()).to(torch.uint8)


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
    from torchvision.transforms.v2 import functional

    return functional.equalize(images)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """ImageOps.posterize: the upper int(bits) of the eight bits, 1 <= bits <= 8."""
    lost = 8 - _per_sample(bits).to(torch.uint8)
    return images >> lost << lost


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """ImageOps.solarize: levels at or above the threshold inverted, 0 <= threshold <= 256."""
    limit = _per_sample(thresholds).ceil().to(torch.int16)
    return torch.where(images < limit, images, 255 - images)
