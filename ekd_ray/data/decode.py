"""Encoded pictures to pixels, with PIL. Functions of one picture, called from many threads."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ekd_ray.data.counter import UInt64Array
from ekd_ray.data.views import Region, crop_box, crop_flips, evaluation_region
from ekd_ray.errors import UserError
from ekd_ray.files import read_bytes

UInt8Array = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MOST_PICTURE = 256 * 2**20  # bytes of its file
# Shrinking by cheap means stops at this multiple of the final size; the rest is filtered well.
_GAP = 2.0
_ORIENTATION = 0x0112  # of EXIF


@contextmanager
def readable(path: str | Path, cure: str = "make it readable or remove it") -> Iterator[None]:
    """Errors of the system inside become a UserError about `path`, with its cure."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {cure}.") from error


def read_picture(path: str) -> bytes:
    """The bytes of an image file; raises UserError if it cannot be read."""
    return read_bytes(path, most=MOST_PICTURE, cure="restore the image")


def orientation(image: Any) -> int:
    """The EXIF orientation of a PIL image, 1 to 8; 1 where none is stated, or is to be applied.

    PIL applies that of a TIFF itself, and of a PNG one behind the pixels is not looked for.
    """
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF comes as errors of many kinds, and the pixels are whole
        return 1
    return found if found in range(2, 9) else 1


def upright_size(image: Any) -> tuple[int, int]:
    """(width, height) of a PIL image once it is turned as its EXIF orientation says."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def convert_to_rgb(image: Any, name: str) -> Any:
    """A PIL image in mode RGB, turned as its EXIF orientation says, as viewers show it.

    16-bit gray (`I;16`) becomes round(x / 257), which PIL would clip.

    Raises UserError for 32-bit pixels (`I`, `F`), whose range nobody knows.
    """
    # A PNG has 16 bits at most, and PIL before 11 opens such a one as `I`.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if deep:
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(
            f"{name} has pixels of the mode {image.mode!r} (32 bits), whose range is not known; "
            "scale them to 8 bits."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_fixed(data: bytes, name: str, size: int, dataset: str) -> UInt8Array:
    """RGB pixels [size, size, 3] of a picture that must have exactly that size.

    `name` is how messages call the picture ("the image in row 3 of FILE"). Raises UserError
    for a damaged picture or one of another size.
    """
    with _opened(data, name) as image:
        got = upright_size(image)
        # A giant picture is refused by its header, before it is decoded.
        if got == (size, size):
            return np.asarray(convert_to_rgb(image, name))
    raise UserError(
        f"{name} has {got[0]}x{got[1]} pixels, but {dataset} has {size}x{size}; put the files "
        f"of {dataset} there, or resize them."
    )


def decode_any(data: bytes, name: str) -> UInt8Array:
    """RGB pixels [H, W, 3] of a picture of any size; raises UserError if it is damaged."""
    with _opened(data, name) as image:
        return np.asarray(convert_to_rgb(image, name))


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) as the header says; raises UserError if it is not readable."""
    with _opened(data, name) as image:
        return upright_size(image)


def decode_view(data: bytes, name: str, size: int, bits: UInt64Array | None) -> UInt8Array:
    """RGB pixels [3, size, size] of one view of a picture of any size.

    `bits` is a row of `views.crop_bits` (a random resized crop, perhaps mirrored) or None for
    the evaluation view (centre crop after resizing). Bilinear with antialiasing. Raises
    UserError, with the picture's `name`, for a damaged picture.
    """
    with _opened(data, name) as image:
        width, height = upright_size(image)
        if bits is None:
            region = evaluation_region(width, height, size)
        else:
            box = crop_box(width, height, bits)
            region = Region(box.left, box.top, box.left + box.width, box.top + box.height)
        pixels = _cut(image, region, size, whole_pixels=bits is not None, name=name)
    if bits is not None and crop_flips(bits):
        pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def fit_picture(image: Any, size: int, *, margin: bool, name: str = "the image") -> UInt8Array:
    """RGB pixels [3, size, size] of an open PIL image, as evaluation sees it.

    With `margin` the evaluation view of `decode_view`; without, as for data sets whose images
    all have that size, the largest square in the centre.
    """
    width, height = upright_size(image)
    if margin:
        region = evaluation_region(width, height, size)
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        region = Region(left, top, left + side, top + side)
    return _cut(image, region, size, whole_pixels=False, name=name).transpose(2, 0, 1)


def fit_file(path: str, size: int, *, margin: bool) -> UInt8Array:
    """`fit_picture` of an image file; raises UserError, with its name, if it is not readable."""
    return fit_bytes(read_picture(path), size, margin=margin, name=path)


def fit_bytes(data: bytes, size: int, *, margin: bool, name: str) -> UInt8Array:
    """`fit_picture` of the bytes of a picture; raises UserError if they are none."""
    with _opened(data, name) as image:
        return fit_picture(image, size, margin=margin, name=name)


def _cut(image: Any, region: Region, size: int, *, whole_pixels: bool, name: str) -> UInt8Array:
    """`region` of an upright image that is not loaded yet, resized to [size, size, 3]."""
    shrink = _draft(image, region, size)
    rgb = convert_to_rgb(image, name)
    box: tuple[float, ...] | None = tuple(edge / shrink for edge in region)
    if whole_pixels and shrink == 1:
        # Cut first, as torchvision does: PIL's filter would look across the edges of a box.
        rgb, box = rgb.crop(region), None
    small = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=_GAP)
    return np.asarray(small)


def _draft(image: Any, region: Region, size: int) -> int:
    """Let a JPEG decoder skip resolution that the final size cannot show; returns the factor."""
    spare = min(region.right - region.left, region.bottom - region.top) / (_GAP * size)
    if spare < 2:
        return 1
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width / spare), math.ceil(height / spare)))
    return 1 if drafted is None else round(width / drafted[1][2])


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Any]:
    """The picture, opened by its header; whatever PIL raises inside becomes a UserError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        # Its own text names a BytesIO by address, which helps nobody.
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(
            f"{name} is not a readable {kinds} ({type(error).__name__}); fetch or replace the file."
        ) from error
