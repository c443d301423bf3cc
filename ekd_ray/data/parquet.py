"""Images in the Parquet layout of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import decode_fixed
from ekd_ray.data.registry import CifarFiles, DatasetInfo, PictureFiles
from ekd_ray.errors import UserError

_IMAGE_COLUMNS = ("img", "image")
_ROWS = 1024  # decoded at once: 3 MB of pixels (12 MB where images have 64x64)
_ENCODED_ROWS = 64  # passed on undecoded at once: about 7 MB of ImageNet
_BUFFER = 1 << 20  # bytes that Arrow reads ahead, instead of a whole column of a row group


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

    def __init__(
        self,
        info: DatasetInfo,
        layout: CifarFiles | PictureFiles,
        split: str,
        files: tuple[Path, ...],
    ) -> None:
        self.info, self.layout, self.split, self.files = info, layout, split, files
        self.class_names = info.class_names
        self.folders: dict[str, int] = {}
        self.rows_per_file: list[int] = []
        self._columns: list[tuple[str, str]] = []
        self._declared = False  # whether the files name their classes

    def facts(self) -> list[Any]:
        """Path, size and modification time of every shard. Raises UserError."""
        return [file_facts(path) for path in self.files]

    def check(self) -> None:
        """Read footers and schemas; sets `rows_per_file` and `class_names`. Raises UserError."""
        columns, rows, bounds = [], [], []
        self._declared = False
        for path in self.files:
            with _open(path) as file:
                columns.append(self._columns_of(path, file.schema_arrow))
                rows.append(file.metadata.num_rows)
                if not self.info.class_names:
                    bounds.append(_label_bounds(file.metadata, columns[-1][1]))
        if sum(rows) == 0:
            raise UserError(f"{self.files[0]} holds no rows.")
        self._columns, self.rows_per_file = columns, rows
        if bounds:
            self._check_bounds(bounds)

    def count(self) -> int:
        """Number of rows, from the footers. Raises UserError."""
        self.check()
        return sum(self.rows_per_file)

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]). Raises UserError."""
        size = self.info.image_size
        for path, row, encoded, labels in self._rows(_ROWS):
            pixels = np.empty((len(encoded), size, size, 3), dtype=np.uint8)
            for i, data in enumerate(encoded):
                pixels[i] = decode_fixed(data, row_name(path, row + i), size, self.info.name)
            yield pixels.transpose(0, 3, 1, 2), labels

    def encoded_batches(self) -> Iterator[tuple[list[bytes], Int64Array]]:
        """Yield (images as they are in the file [b], labels int64 [b]). Raises UserError.

        Memory stays bounded by some dozen images and a page of the file, however large its row
        groups are.
        """
        for _, _, encoded, labels in self._rows(_ENCODED_ROWS):
            yield encoded, labels

    def _rows(self, count: int) -> Iterator[tuple[Path, int, list[bytes], Int64Array]]:
        """Yield (file, its row number of the first image, images, labels), `count` at once."""
        self.check()
        highest = -1
        for path, (image, label) in zip(self.files, self._columns, strict=True):
            row = 0
            with _open(path) as file:
                for batch in file.iter_batches(count, columns=[f"{image}.bytes", label]):
                    encoded = batch.column(image).field("bytes").to_pylist()
                    labels = self._labels(path, row, batch.column(label))
                    if None in encoded:
                        bad = row + encoded.index(None)
                        raise UserError(
                            f"row {bad} of {path} has no image bytes; fetch the file again."
                        )
                    highest = max(highest, labels.max(initial=-1))
                    yield path, row, encoded, labels
                    row += len(labels)
        if not self.info.class_names:
            self._check_bounds([(0, int(highest))])

    def _check_bounds(self, bounds: list[tuple[int, int] | None]) -> None:
        """Are these the labels of the data set? For one whose class names are not known here.

        `bounds` holds each shard's lowest and highest label, None where that is not known.
        """
        count, name = self.info.num_classes, self.info.name
        known = [pair for pair in bounds if pair is not None]
        low = min((pair[0] for pair in known), default=0)
        high = max((pair[1] for pair in known), default=0)
        folder = self.files[0].parent
        if low < 0:
            raise UserError(
                f"the {self.split} shards in {folder} ({self.files[0].name}) have labels from "
                f"{low}, which means unlabelled; put {name}'s labelled validation shards there."
            )
        # A training set without declared names shows its number of classes in no other way.
        undeclared = not self._declared and self.split == "train" and None not in bounds
        if high >= count or (undeclared and high != count - 1):
            raise UserError(
                f"the {self.split} shards in {folder} have labels up to {high}, but {name} has "
                f"the labels 0 to {count - 1}; put the files of {name} there."
            )

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
        self._declared |= bool(names)
        self.class_names = (
            names or self.info.class_names or tuple(map(str, range(self.info.num_classes)))
        )
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


def row_name(path: Path | str, row: int) -> str:
    """How messages call an image of a shard."""
    return f"the image in row {row} of {path}"


def file_facts(path: Path) -> list[Any]:
    """[absolute path, size in bytes, modification time in ns]; raises UserError if missing."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give the complete folder with "
            "--data-root or fetch it with --download."
        ) from error
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A ParquetFile; what Arrow or the system says about a bad file becomes a UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"cannot read the Parquet file {path} ({one_line(error)}); it may be incomplete: "
            "fetch it again."
        ) from error


def _label_bounds(metadata: Any, label: str) -> tuple[int, int] | None:
    """(lowest, highest) label of a file, from its footer; None where that does not say."""
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    found = []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(names.index(label)).statistics
        if statistics is None or not statistics.has_min_max:
            return None
        found.append((statistics.min, statistics.max))
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


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
