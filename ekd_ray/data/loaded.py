"""Splits that a function returns: arrays, or a map-style dataset of (picture, label)."""

from __future__ import annotations

import functools
import io
import itertools
import operator
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ekd_ray.config.plugins import stamps_of
from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import convert_to_rgb, decode_any, picture_size
from ekd_ray.data.registry import DatasetInfo, takes_data_root
from ekd_ray.data.sources import (
    DecodedBatch,
    EncodedBatch,
    EncodedSource,
    check_int64,
    file_identity,
    one_line,
    row_name,
)
from ekd_ray.errors import UserError

_ROWS = 256  # decoded together

Picture = bytes | npt.NDArray[np.uint8]  # a file's content, or RGB pixels [H, W, 3]


class LoadedSource(EncodedSource):
    """A split that the function of a registered data set returns; `load` is called when needed."""

    def __init__(self, info: DatasetInfo, split: str, root: Path) -> None:
        super().__init__(info, split)
        self._root, self._wants_root = root, takes_data_root(info.load)

    def identity(self) -> list[Any]:
        """The plugin's stamp, where the function looks, and the files that it says it reads."""
        info = self.info
        root = str(self._root.absolute()) if self._wants_root else None
        files = [file_identity(path) for pattern in info.load_files for path in self._find(pattern)]
        return [info.version, *stamps_of([("dataset", info.name)]), root, files]

    def count(self) -> int:
        """Number of images. Raises UserError."""
        return len(self._loaded[0])

    def declared_classes(self) -> tuple[str, ...]:
        """The `classes` of a dataset of torchvision's kind, or ()."""
        names = getattr(self._loaded[0], "classes", None)
        sound = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        return tuple(names) if sound and names else ()

    @functools.cached_property
    def survey(self) -> tuple[set[tuple[int, int]], Int64Array]:
        """The sizes (width, height) of all pictures, and their labels int64 [N]."""
        images, labels = self._loaded
        if isinstance(images, np.ndarray) and labels is not None:
            return {(images.shape[2], images.shape[1])}, labels
        rows = [(_size(picture, name), label) for name, picture, label in self._rows()]
        return {size for size, _ in rows}, np.array([label for _, label in rows], np.int64)

    def batches(self) -> Iterator[DecodedBatch]:
        """As `Source.batches`; raises UserError for an image of another size, too."""
        side = self.info.image_size
        found = self._rows()
        while part := list(itertools.islice(found, _ROWS)):
            images = [decode_any(p, name) if isinstance(p, bytes) else p for name, p, _ in part]
            for (name, _, _), pixels in zip(part, images, strict=True):
                if pixels.shape[:2] != (side, side):
                    raise UserError(
                        f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, but "
                        f"{self.info.name} has {side}x{side}; return all of one size, or register "
                        "it with view_scheme='resized_crop'."
                    )
            labels = np.array([label for _, _, label in part], np.int64)
            yield np.stack(images).transpose(0, 3, 1, 2), labels

    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once; pixels become PNG. Raises UserError."""
        self.parts = {self._call: self.count()}
        found = self._rows()
        while part := list(itertools.islice(found, rows)):
            names, pictures, labels = zip(*part, strict=True)
            files = [p if isinstance(p, bytes) else _encode_png(p) for p in pictures]
            content = [p if isinstance(p, bytes) else _describe(p) for p in pictures]
            yield EncodedBatch([*names], files, np.array(labels, np.int64), content)

    @property
    def _call(self) -> str:
        return f"load({self.split!r}) of {self.info.name}"

    def _find(self, pattern: str) -> list[Path]:
        """The files of a pattern below the data root. Raises UserError if there are none."""
        found = sorted(self._root.glob(pattern)) if not Path(pattern).is_absolute() else []
        found = found or [path for path in (self._root / pattern,) if path.is_file()]
        if not found:
            raise UserError(
                f"{self.info.name} reads {pattern}, which is not in {self._root}; name its folder "
                "with --data-root."
            )
        return found

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Int64Array | None]:
        """(images [N, H, W, 3] or [N, H, W], labels) of arrays, or (dataset, None)."""
        load, name = self.info.load, self.info.name
        assert load is not None
        where = {"data_root": self._root} if self._wants_root else {}
        found = self._user_code(self._call, lambda: load(self.split, **where))
        labels = None
        if isinstance(found, tuple) and len(found) == 2:
            found, labels = (_as_array(part, self._call) for part in found)
            if found.size:
                self._check_arrays(found, labels)
                labels = labels.astype(np.int64)
        elif found is not None and not all(hasattr(found, n) for n in ("__getitem__", "__len__")):
            raise UserError(
                f"{self._call} must return (images, labels) or a map-style dataset, got "
                f"{type(found).__name__}."
            )
        if found is None or len(found) == 0:
            more = "" if self.split == "train" else " that no training sees"
            raise UserError(
                f"{name} has no {self.split} split; {self._call} must return pictures{more}."
            )
        return found, labels

    def _check_arrays(self, images: Any, labels: Any) -> None:
        pixels = images.dtype == np.uint8 and (
            images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
        )
        if not pixels:
            raise UserError(
                f"the images of {self._call} must be uint8 [N, H, W, 3] or [N, H, W], got "
                f"{images.dtype} {list(images.shape)}."
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise UserError(
                f"the labels of {self._call} must be integers [{len(images)}], got {labels.dtype} "
                f"{list(labels.shape)}."
            )
        check_int64(labels, self._call)

    def _rows(self) -> Iterator[tuple[str, Picture, int]]:
        """(how messages call it, picture, label) of every row, checked. Raises UserError."""
        found, labels = self._loaded
        # Of labels that nobody has counted, each has a training image.
        classes = self.info.num_classes or len(found)
        for row in range(len(found)):
            name = row_name(self._call, row)
            if labels is None:
                item = self._user_code(name, functools.partial(operator.getitem, found, row))
                if not (isinstance(item, tuple | list) and len(item) == 2):
                    raise UserError(
                        f"{name} must come as (picture, label), got {type(item).__name__}."
                    )
                picture, label = _as_picture(item[0], name), _as_label(item[1], name)
            else:
                picture, label = _as_picture(found[row], name), int(labels[row])
            if not 0 <= label < classes:
                raise UserError(
                    f"{name} has the label {label}, but labels must be 0 to {classes - 1}."
                )
            yield name, picture, label

    def _user_code(self, name: str, call: Any) -> Any:
        """The result of a function of the user's; what it raises names its own line."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{name} failed in line {frame.lineno} of {frame.filename} "
                f"({type(error).__name__}: {one_line(error)})."
            ) from error


def _as_array(values: Any, name: str) -> npt.NDArray[Any]:
    """A list, an array, or a tensor (images [N, 3, H, W] as [N, H, W, 3]). Raises UserError."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # pictures of many sizes, a GPU's tensor
        raise UserError(
            f"{name} must return (images, labels) that NumPy can make arrays of "
            f"({one_line(error)}); return pictures of many sizes as a list of (picture, label)."
        ) from error
    channels_first = hasattr(values, "permute") and array.ndim == 4
    return array.transpose(0, 2, 3, 1) if channels_first else array


def _as_label(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(
            f"{name} has the label {one_line(repr(value))}, but labels are integers from 0."
        ) from None


def _as_picture(value: Any, name: str) -> Picture:
    """A file's content as it is, all else as RGB pixels [H, W, 3]. Raises UserError."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        try:
            return np.asarray(convert_to_rgb(value, name))
        except UserError:
            raise
        except Exception as error:  # PIL raises a dozen kinds for damaged files
            raise UserError(f"{name} cannot be converted to RGB ({one_line(error)}).") from error
    array, channels_first = None, hasattr(value, "permute")  # of a tensor
    if channels_first or isinstance(value, np.ndarray):
        array = np.asarray(value)
    if array is not None and array.ndim == 3 and channels_first:
        array = array.transpose(1, 2, 0)
    if array is not None and array.ndim == 2:
        array = array[:, :, None]
    if array is None or array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        got = type(value).__name__
        if array is not None:
            got = f"{array.dtype} {list(np.shape(value))}"
        raise UserError(
            f"{name} must be a PIL image, a uint8 array [H, W, 3], a uint8 tensor [3, H, W] or the "
            f"bytes of a file, got {got}; leave ToTensor and Normalize out of its transforms."
        )
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _size(picture: Picture, name: str) -> tuple[int, int]:
    if isinstance(picture, bytes):
        return picture_size(picture, name)
    return picture.shape[1], picture.shape[0]


def _describe(pixels: npt.NDArray[np.uint8]) -> bytes:
    return b"%dx%d " % pixels.shape[:2] + pixels.tobytes()


def _encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    # Weak compression: ten times as fast, and the file little larger.
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()
