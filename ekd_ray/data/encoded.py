"""Data sets that stay encoded: images of any size, read one by one and decoded on demand.

An entry of the cache (see store.py) holds what finds an image quickly. For class folders that
is an index: labels.npy, sizes.npy, and the relative paths in paths.bin, cut at offsets.npy; the
images are read from where they lie. Parquet shards have no cheap access to one row, so their
images are copied once, as they are, into encoded.bin, cut at offsets.npy, which is mapped.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import read_picture
from ekd_ray.data.folders import FolderSource
from ekd_ray.data.parquet import ParquetSource, row_name
from ekd_ray.data.registry import DatasetInfo
from ekd_ray.data.sources import Source
from ekd_ray.data.store import named_entry, open_entry, synced, unchanged
from ekd_ray.errors import UserError
from ekd_ray.files import write_json

_VERSION = 1  # raise it when the files of an entry change their meaning


class Pictures(Protocol):
    """Random access to the encoded images of a split, from any thread."""

    def read(self, index: int) -> bytes:
        """The image as it is in its file. Raises UserError."""

    def where(self, index: int) -> str:
        """How messages call the image."""


@dataclass(frozen=True, eq=False)
class EncodedEntry:
    """An opened entry; `labels` is int64 [N], read-only."""

    pictures: Pictures
    labels: Int64Array
    class_names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """One split of a data set whose images stay encoded and vary in size.

    `labels` is int64 [N], read-only; `image_size` is what images are decoded to where nothing
    else is asked for. `fingerprint` is 16 hex digits over the labels and, for class folders,
    the relative paths and sizes of the files, for Parquet the bytes of the images. It does not
    depend on where the files lie.
    """

    name: str
    split: str
    labels: Int64Array
    class_names: tuple[str, ...]
    fingerprint: str
    image_size: int
    pictures: Pictures

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs in this split."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def encoded_path(cache_dir: Path, info: DatasetInfo, split: str, source: Source) -> Path:
    """Where the index or the packed form of `source` belongs. Raises UserError."""
    label = info.name.partition(":")[0]  # the PATH of folder:PATH is among the facts
    return named_entry(
        cache_dir, f"{label}-{split}-encoded", [_VERSION, label, split, *source.facts()]
    )


def load_encoded(path: Path, info: DatasetInfo, source: Source) -> EncodedEntry:
    """Open the entry at `path`; built from `source` if it is missing or damaged.

    Raises UserError for bad sources and for a cache that cannot be written or is too small.
    """
    assert isinstance(source, FolderSource | ParquetSource)

    def write(folder: Path) -> None:
        if isinstance(source, FolderSource):
            _write_index(folder, source)
        else:
            _write_packed(folder, source)

    return open_entry(path, lambda: _read(path, info), write)


class _FolderPictures:
    """Files in class folders, found by their index."""

    def __init__(self, folder: Path, side: str, offsets: Int64Array) -> None:
        self.side, self.offsets = side, offsets
        self.sizes = np.load(folder / "sizes.npy", allow_pickle=False)
        self.paths = _map_bytes(folder / "paths.bin", int(offsets[-1]))
        if (self.sizes.dtype, self.sizes.shape) != (np.int64, (len(offsets) - 1,)):
            raise ValueError("sizes.npy does not fit offsets.npy")

    def path(self, index: int) -> str:
        relative = self.paths[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return os.path.join(self.side, os.fsdecode(relative))

    def read(self, index: int) -> bytes:
        path = self.path(index)
        data = read_picture(path)
        # A file that is written over in place leaves the time of its folder as it was.
        if len(data) != self.sizes[index]:
            raise UserError(
                f"{path} had {self.sizes[index]} bytes when it was indexed and has {len(data)} "
                "now; touch its class folder so that it is indexed again."
            )
        return data

    def where(self, index: int) -> str:
        return f"the image {self.path(index)}"


class _PackedPictures:
    """Images copied from shards, with the shards' names for messages."""

    def __init__(self, folder: Path, shards: list[tuple[str, int]], offsets: Int64Array) -> None:
        self.offsets = offsets
        self.data = _map_bytes(folder / "encoded.bin", int(offsets[-1]))
        self.names = [name for name, _ in shards]
        self.starts = [0, *itertools.accumulate(rows for _, rows in shards)]
        if self.starts[-1] != len(offsets) - 1:
            raise ValueError("meta.json does not fit offsets.npy")

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def where(self, index: int) -> str:
        shard = bisect.bisect_right(self.starts, index) - 1
        return row_name(self.names[shard], index - self.starts[shard])


def _map_bytes(path: Path, length: int) -> Any:
    """The file as uint8 [length], mapped; raises ValueError if it has another length."""
    if path.stat().st_size != length:
        raise ValueError(f"{path} has not {length} bytes")
    if length == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def _read(path: Path, info: DatasetInfo) -> EncodedEntry | None:
    """The entry, or None if it is missing, not what its meta.json says, or out of date."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        labels = np.load(path / "labels.npy", allow_pickle=False)
        offsets = np.load(path / "offsets.npy", allow_pickle=False)
        sound = (
            meta["version"] == _VERSION
            and len(labels) > 0
            and (labels.dtype, labels.ndim) == (np.int64, 1)
            and (offsets.dtype, offsets.shape) == (np.int64, (len(labels) + 1,))
            and _digest(labels, offsets) == meta["arrays_sha256"]
            and len(meta["class_names"]) == info.num_classes
            and unchanged(meta["folders"])
        )
        if not sound:
            return None
        if "side" in meta:
            pictures: Pictures = _FolderPictures(path, meta["side"], offsets)
        else:
            pictures = _PackedPictures(path, meta["shards"], offsets)
        names, fingerprint = tuple(meta["class_names"]), str(meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    labels.setflags(write=False)
    return EncodedEntry(pictures, labels, names, fingerprint)


def _write_index(folder: Path, source: FolderSource) -> None:
    index = source.index()
    digest = hashlib.sha256()
    with synced(folder / "paths.bin") as file:
        for path, size in zip(index.paths, index.sizes.tolist(), strict=True):
            file.write(path)
            digest.update(b"%d %s\0" % (size, path))
    offsets = _offsets([len(path) for path in index.paths])
    with synced(folder / "sizes.npy") as file:
        np.save(file, index.sizes, allow_pickle=False)
    facts = {"side": str(source.side.absolute())}
    _write_rest(folder, source, index.labels, offsets, digest, facts)


def _write_packed(folder: Path, source: ParquetSource) -> None:
    needed = sum(path.stat().st_size for path in source.files)
    free = shutil.disk_usage(folder).free
    if free < needed:  # said now and not after an hour of copying
        raise UserError(
            f"packing {source.info.name} takes about {needed / 1e9:.1f} GB in {folder.parent}, "
            f"but {free / 1e9:.1f} GB are free; set EKD_CACHE_DIR to a folder on a disk with room."
        )
    digest = hashlib.sha256()
    labels: list[Int64Array] = []
    lengths: list[int] = []
    with synced(folder / "encoded.bin") as file:
        for images, part in source.encoded_batches():
            for data in images:
                digest.update(data)
                file.write(data)
                lengths.append(len(data))
            labels.append(part)
    shards = [[str(p), n] for p, n in zip(source.files, source.rows_per_file, strict=True)]
    facts = {"shards": shards}
    offsets = _offsets(lengths)
    digest.update(offsets.astype("<i8").tobytes())
    _write_rest(folder, source, np.concatenate(labels), offsets, digest, facts)


def _write_rest(
    folder: Path,
    source: FolderSource | ParquetSource,
    labels: Int64Array,
    offsets: Int64Array,
    digest: Any,
    facts: dict[str, Any],
) -> None:
    """labels.npy, offsets.npy, and, last, the meta.json that says what must be there."""
    for name, array in (("labels.npy", labels), ("offsets.npy", offsets)):
        with synced(folder / name) as file:
            np.save(file, array, allow_pickle=False)
    digest.update(labels.astype("<i8").tobytes())
    meta = {
        "version": _VERSION,
        "class_names": list(source.class_names),
        "fingerprint": digest.hexdigest()[:16],
        "arrays_sha256": _digest(labels, offsets),
        "folders": source.folders,
        **facts,
    }
    write_json(folder / "meta.json", meta)


def _offsets(lengths: list[int]) -> Int64Array:
    """Where each of consecutive pieces starts, and where the last one ends: int64 [N + 1]."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def _digest(*arrays: Int64Array) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
