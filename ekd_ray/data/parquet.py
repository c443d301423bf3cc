"""CIFAR in the Parquet layout of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.registry import CifarFiles, DatasetInfo
from ekd_ray.errors import UserError

_IMAGE_COLUMNS = ("img", "image")
_ROWS = 1024  # decoded at once: 3 MB of pixels


def one_line(error: object) -> str:
    """The text of an error or a type without line breaks (Arrow's run over several lines)."""
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__


def find_shards(folder: Path, split: str) -> tuple[Path, ...]:
    """The split's files `<split>-00000-of-00002.parquet` ... in order; () if there are none.

    Raises UserError if the set is incomplete or two sets are mixed.
    """
    pattern = re.compile(rf"{split}-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")
    found = sorted(
        (int(match[1]), int(match[2]), path)
        for path in folder.glob(f"{split}-*.parquet")
        if (match := pattern.fullmatch(path.name))
    )
    if not found:
        return ()
    totals = {total for _, total, _ in found}
    numbers = [number for number, _, _ in found]
    if len(totals) > 1 or len(set(numbers)) < len(numbers):
        names = ", ".join(path.name for _, _, path in found[:4])
        raise UserError(f"{folder} mixes shards of different {split} sets ({names}); keep one set.")
    total = totals.pop()
    missing = sorted(set(range(total)) - set(numbers))
    if missing:
        name = f"{split}-{missing[0]:05d}-of-{total:05d}.parquet"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the shard {name}{more} is missing in {folder}; fetch it again.")
    if max(numbers) >= total:
        raise UserError(f"{found[-1][2]} is numbered beyond its set of {total}; rename or drop it.")
    return tuple(path for _, _, path in found)


class ParquetSource:
    """The shards of one split, read in order."""

    def __init__(self, info: DatasetInfo, layout: CifarFiles, files: tuple[Path, ...]) -> None:
        self.info, self.layout, self.files = info, layout, files
        self.class_names: tuple[str, ...] = info.class_names
        self.num_rows = 0
        self._columns: list[tuple[str, str]] = []

    def check(self) -> None:
        """Read footers and schemas; sets `num_rows` and `class_names`. Raises UserError."""
        columns, rows = [], 0
        for path in self.files:
            with _open(path) as file:
                columns.append(self._columns_of(path, file.schema_arrow))
                rows += file.metadata.num_rows
        if rows == 0:
            raise UserError(f"{self.files[0]} holds no rows.")
        self._columns, self.num_rows = columns, rows

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]). Raises UserError."""
        self.check()
        for path, (image, label) in zip(self.files, self._columns, strict=True):
            row = 0
            with _open(path) as file:
                for batch in file.iter_batches(_ROWS, columns=[f"{image}.bytes", label]):
                    encoded = batch.column(image).field("bytes").to_pylist()
                    labels = self._labels(path, row, batch.column(label))
                    yield self._decode(path, row, encoded), labels
                    row += len(labels)

    def _columns_of(self, path: Path, schema: Any) -> tuple[str, str]:
        import pyarrow as pa

        image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
        label = next((name for name in self.layout.label_columns if name in schema.names), None)
        if image is None or label is None:
            wanted = f"{'/'.join(_IMAGE_COLUMNS)} and {'/'.join(self.layout.label_columns)}"
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}, but {self.info.name} needs "
                f"{wanted}."
            )
        kind = schema.field(image).type
        binary = pa.types.is_struct(kind) and any(
            field.name == "bytes"
            and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
            for field in kind
        )
        if not binary:
            raise UserError(
                f"column {image!r} of {path} must be a struct with binary 'bytes', "
                f"got {one_line(kind)}."
            )
        if not pa.types.is_integer(schema.field(label).type):
            raise UserError(
                f"column {label!r} of {path} must hold integers, got {schema.field(label).type}."
            )
        names = _declared_names(schema, label)
        if names and len(names) != self.info.num_classes:
            raise UserError(
                f"{path} declares {len(names)} classes, but {self.info.name} has "
                f"{self.info.num_classes}; put the files of {self.info.name} there."
            )
        self.class_names = names or self.info.class_names
        return image, label

    def _labels(self, path: Path, row: int, column: Any) -> Int64Array:
        if column.null_count:
            first = row + column.is_null().to_pylist().index(True)
            raise UserError(f"row {first} of {path} has no label.")
        labels = column.to_numpy(zero_copy_only=False).astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= self.info.num_classes))
        if wrong.size:
            raise UserError(
                f"row {row + wrong[0]} of {path} has the label {labels[wrong[0]]}, but "
                f"{self.info.name} has the labels 0 to {self.info.num_classes - 1}."
            )
        return labels

    def _decode(self, path: Path, row: int, encoded: list[bytes | None]) -> npt.NDArray[np.uint8]:
        from PIL import Image

        size = self.info.image_size
        pixels = np.empty((len(encoded), size, size, 3), dtype=np.uint8)
        for i, data in enumerate(encoded):
            if data is None:
                raise UserError(f"row {row + i} of {path} has no image bytes.")
            try:
                image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
                got = image.size
                # A giant picture is refused by its header, before it is decoded.
                if got == (size, size):
                    pixels[i] = np.asarray(image.convert("RGB"))
            except Exception as error:  # PIL raises a dozen kinds for damaged files
                # Its own text names a BytesIO by address, which helps nobody.
                raise UserError(
                    f"the image in row {row + i} of {path} is not a readable JPEG or PNG "
                    f"({type(error).__name__}); fetch the file again."
                ) from error
            if got != (size, size):
                raise UserError(
                    f"the image in row {row + i} of {path} has {got[0]}x{got[1]} pixels, but "
                    f"{self.info.name} has {size}x{size}."
                )
        return pixels.transpose(0, 3, 1, 2)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A ParquetFile; what Arrow or the system says about a bad file becomes a UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"cannot read the Parquet file {path} ({one_line(error)}); it may be incomplete: "
            "fetch it again."
        ) from error


def _declared_names(schema: Any, label: str) -> tuple[str, ...]:
    """Class names from the `huggingface` metadata, or () where it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()
