"""Data sets in the cache: made once for all processes, then memory-mapped.

An entry is a folder `<cache>/datasets/<dataset>-<split>-<key>/`. The key covers the format's
version and every source file's path, size and modification time (of class folders: theirs), so
changed sources make a new entry. One of class folders is made anew where a picture in them was
written over, as far as somebody looks: see `load_entry`. It holds labels.npy, meta.json and

- where all images have one size, their pixels: images.npy, uint8 [N, 3, H, W];
- where they vary in size and stay encoded in class folders, an index: sizes.npy, times.npy (ns),
  digests.npy (of what is in the files, see `_digest_file`), and the relative paths in paths.bin,
  cut at offsets.npy; the images are read from where they lie;
- where they stay encoded in shards, which have no cheap access to one row, or come from a
  function, a copy of their bytes in encoded.bin, cut at offsets.npy.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import MOST_PICTURE, read_picture
from ekd_ray.data.registry import DatasetInfo
from ekd_ray.data.sources import EncodedSource, FolderSource, Source, row_name
from ekd_ray.errors import UserError
from ekd_ray.files import (
    check_plain,
    close_to_others,
    is_own_entry,
    make_private,
    open_plain,
    read_json,
    remove_path,
    temporary_folder,
    write_json,
)

# Raise one when the same files would make another entry.
_DECODED_VERSION = 2
_ENCODED_VERSION = 1
_PACKED_ROWS = 64  # copied together: about 7 MB of ImageNet
# Bytes by which the content of a picture is known: of a small file all, and of one that is not
# compressed, whose length says nothing; of others this much at each end.
_SMALL, _END = 32 * 2**10, 4 * 2**10
_UNCOMPRESSED = (".bmp", ".tif", ".tiff")
_DIGEST = 16  # bytes
READERS = min(16, 2 * (os.cpu_count() or 1))  # threads that wait for a disk


class Pictures(Protocol):
    """Random access to the encoded images of a split, from any thread."""

    def read(self, index: int) -> bytes:
        """The image as it is in its file. Raises UserError."""

    def path(self, index: int) -> str | None:
        """Its own file, None where it shares one."""

    def name(self, index: int) -> str:
        """How messages call the image."""


@dataclass(frozen=True, eq=False)
class _Split:
    name: str
    split: str
    labels: Int64Array
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs in this split."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageArrays(_Split):
    """One split of a data set whose images are decoded and have one size.

    `images` is a read-only memory map uint8 [N, 3, H, W]; `labels` int64 [N], read-only;
    `fingerprint` 16 hex digits over the decoded pixels and the labels, so two copies of a
    data set agree exactly when they train the same.
    """

    images: np.memmap[Any, np.dtype[np.uint8]]
    encoded: ClassVar[bool] = False

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.images.shape[-1])


@dataclass(frozen=True, eq=False)
class EncodedImages(_Split):
    """One split of a data set whose images stay encoded and vary in size.

    `labels` is int64 [N], read-only; `image_size` is what images are decoded to where nothing
    else is asked for. `fingerprint` is 16 hex digits over the labels and, for class folders,
    the relative paths, sizes and content of the files (of large ones: of both ends), for Parquet
    the bytes of the images. It does not depend on where the files lie, nor on their times.
    """

    image_size: int
    pictures: Pictures
    encoded: ClassVar[bool] = True


def entry_path(cache_dir: Path, info: DatasetInfo, split: str, source: Source) -> Path:
    """Where the entry of `source` belongs. Raises UserError for a missing file."""
    kind = info.kind  # the PATH of folder:PATH is in the identity
    label, facts = f"{kind}-{split}", [_DECODED_VERSION, kind, split, info.image_size]
    if info.encoded:
        label, facts = f"{label}-encoded", [_ENCODED_VERSION, kind, split]
    text = json.dumps([*facts, *source.identity()])
    key = hashlib.sha256(text.encode()).hexdigest()[:20]
    return cache_dir.absolute() / "datasets" / f"{label}-{key}"


def load_entry(
    path: Path, info: DatasetInfo, split: str, source: Source, *, look: bool = False
) -> ImageArrays | EncodedImages:
    """Open the entry at `path`; built from `source` if it is missing or damaged.

    With `look`, also if a picture in class folders has another size or time than it had, for which
    all are listed. One process builds, the others wait for it. Raises UserError for bad sources
    and for a cache folder that cannot be written.
    """
    stamp = None
    if look and isinstance(source, FolderSource):
        source.index()
        stamp = source.stamp
    entry = _read(path, info, split, stamp)  # needs no lock, so a read-only cache serves
    if entry is not None:
        return entry
    with locked(path):
        entry = _read(path, info, split, stamp)  # another process may have built it meanwhile
        if entry is None:
            _build(path, info, source)
            entry = _read(path, info, split, stamp)
    if entry is None:
        # The sources of a sound entry are compared too: they may have changed meanwhile.
        raise UserError(
            f"the files of {path.name} changed while they were read; start again when nothing "
            "writes to them."
        )
    return entry


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process makes `path`; raises UserError where the cache is not writable."""
    try:
        make_private(path.parent)
        with FileLock(path.with_name(path.name + ".lock")):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {path.parent} ({error.strerror or error}); set "
            "EKD_CACHE_DIR to a folder on a disk with room."
        ) from error


# ---- reading: a ValueError means that a file of the entry is damaged


def _read(
    path: Path, info: DatasetInfo, split: str, stamp: str | None
) -> ImageArrays | EncodedImages | None:
    """The entry, or None if it is missing, not what its meta.json says, or out of date; of files
    of another `Source.stamp`, if one is given."""
    try:
        meta = read_json(path / "meta.json")
        labels = _load_array(path / "labels.npy")
        if (
            meta["version"] != (_ENCODED_VERSION if info.encoded else _DECODED_VERSION)
            or len(meta["class_names"]) != info.num_classes
            or not folders_unchanged(meta.get("folders", {}))
            or stamp not in (None, meta.get("stamp"))
            or not is_own_entry(path)
        ):
            return None
        names, fingerprint = tuple(meta["class_names"]), str(meta["fingerprint"])
        entry: ImageArrays | EncodedImages
        if info.encoded:
            pictures = _open_pictures(path, meta, labels)
            entry = EncodedImages(
                info.name, split, labels, names, fingerprint, info.image_size, pictures
            )
        else:
            images = _map_images(path, meta, labels, info.image_size)
            entry = ImageArrays(info.name, split, labels, names, fingerprint, images)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    labels.setflags(write=False)
    return entry


def folders_unchanged(folders: Mapping[str, int]) -> bool:
    """Whether every folder still has its modification time (ns)."""
    try:
        return all(os.stat(folder).st_mtime_ns == time for folder, time in folders.items())
    except OSError:
        return False


def _map_images(
    path: Path, meta: dict[str, Any], labels: Int64Array, size: int
) -> np.memmap[Any, np.dtype[np.uint8]]:
    if _digest(labels) != meta["labels_sha256"]:
        raise ValueError("labels.npy is damaged")
    # Mapping checks the file's length against its header; a short file raises ValueError.
    images = _load_array(path / "images.npy", mapped=True)
    size_on_disk = os.path.getsize(path / "images.npy")
    if (images.dtype, images.shape) != (np.uint8, (len(labels), 3, size, size)) or (
        size_on_disk != images.offset + images.nbytes
    ):
        raise ValueError("images.npy does not fit labels.npy")
    return images


def _open_pictures(path: Path, meta: dict[str, Any], labels: Int64Array) -> Pictures:
    offsets = _load_array(path / "offsets.npy")
    if _digest(labels, offsets) != meta["arrays_sha256"]:
        raise ValueError("labels.npy or offsets.npy is damaged")
    if "side" in meta:
        return _FolderPictures(path, meta["side"], offsets)
    return _PackedPictures(path, meta["shards"], offsets)


class _FolderPictures:
    """Files in class folders, found by their index."""

    def __init__(self, entry: Path, side: str, offsets: Int64Array) -> None:
        self.side, self.offsets = side, offsets
        self.sizes, self.times, self.digests = (
            _load_array(entry / f"{name}.npy") for name in ("sizes", "times", "digests")
        )
        self.paths = _map_bytes(entry / "paths.bin", int(offsets[-1]))
        if {*map(len, (self.sizes, self.times, self.digests))} != {len(offsets) - 1}:
            raise ValueError("sizes, times and digests do not fit offsets.npy")

    def path(self, index: int) -> str:
        relative = self.paths[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return os.path.join(self.side, os.fsdecode(relative))

    def read(self, index: int) -> bytes:
        path = self.path(index)
        data = read_picture(path)
        # A file that is written over in place leaves the time of its folder as it was. One that
        # has another time alone was copied or touched.
        if len(data) != self.sizes[index] or (
            os.stat(path).st_mtime_ns != self.times[index]
            and _digest_file(path) != self.digests[index].tobytes()
        ):
            raise UserError(
                f"{path} has changed since it was indexed; restore it, or begin anew with the data "
                "as they are now, which are then indexed again."
            )
        return data

    def name(self, index: int) -> str:
        return f"the image {self.path(index)}"


class _PackedPictures:
    """Images copied from shards, with the shards' names for messages."""

    def __init__(self, entry: Path, shards: list[tuple[str, int]], offsets: Int64Array) -> None:
        self.offsets = offsets
        self.data = _map_bytes(entry / "encoded.bin", int(offsets[-1]))
        self.shards = [name for name, _ in shards]
        self.starts = [0, *itertools.accumulate(rows for _, rows in shards)]
        if self.starts[-1] != len(offsets) - 1:
            raise ValueError("meta.json does not fit offsets.npy")

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def path(self, index: int) -> str | None:
        return None

    def name(self, index: int) -> str:
        shard = bisect.bisect_right(self.starts, index) - 1
        return row_name(self.shards[shard], index - self.starts[shard])


def _map_bytes(path: Path, length: int) -> Any:
    """The file as uint8 [length], mapped; raises ValueError if it has another length."""
    check_plain(path)
    if path.stat().st_size != length:
        raise ValueError(f"{path} has not {length} bytes")
    return np.memmap(path, np.uint8, "r") if length else np.empty(0, np.uint8)


def _load_array(path: Path, *, mapped: bool = False) -> Any:
    check_plain(path)
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


# ---- writing


def _build(path: Path, info: DatasetInfo, source: Source) -> None:
    """Write into a folder beside `path`, then rename it into place. The lock is held."""
    for stale in path.parent.glob(f".{path.name}.*"):  # of builders that were killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = temporary_folder(path)
    try:
        if not info.encoded:
            _write_decoded(folder, info, source)
        elif isinstance(source, FolderSource):
            _write_index(folder, source)
        elif isinstance(source, EncodedSource):
            _write_packed(folder, source)
        close_to_others(folder)
        if path.exists():  # damaged: out of the way first, rename needs a free name
            os.rename(path, folder / "damaged")
            remove_path(folder / "damaged")
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_decoded(folder: Path, info: DatasetInfo, source: Source) -> None:
    shape = (3, info.image_size, info.image_size)
    digest = hashlib.sha256()
    parts: list[Int64Array] = []
    # Sequential writes and not a writable map: on a full disk a map dies with SIGBUS.
    with synced(folder / "images.npy") as file:
        start = _write_header(file, (0, *shape))
        for images, part in source.batches():
            if images.shape != (len(part), *shape):
                raise UserError(f"{source.files or info.name}: images of shape {images.shape}.")
            pixels = np.ascontiguousarray(images)
            digest.update(pixels.data)
            file.write(pixels.data)
            parts.append(part)
        labels = np.concatenate(parts)
        file.seek(0)
        # NumPy leaves room in the header for the first axis to grow; never trust it blindly.
        if _write_header(file, (len(labels), *shape)) != start:
            raise RuntimeError("the .npy header changed its length")
    digest.update(repr((len(labels), *shape)).encode())
    meta = {
        "version": _DECODED_VERSION,
        "rows": len(labels),
        "labels_sha256": _digest(labels),
        "sources": [str(file) for file in source.files],
    }
    _write_labels(folder, source, labels, digest, meta)


def _write_index(folder: Path, source: FolderSource) -> None:
    index = source.index()
    digest = hashlib.sha256()
    places = [os.path.join(source.side, os.fsdecode(path)) for path in index.paths]
    with ThreadPoolExecutor(READERS) as pool:
        contents = b"".join(pool.map(_digest_file, places, chunksize=64))
    with synced(folder / "paths.bin") as file:
        for path, size in zip(index.paths, index.sizes.tolist(), strict=True):
            file.write(path)
            digest.update(b"%d %s\0" % (size, path))
    digest.update(contents)
    _write_array(folder / "sizes.npy", index.sizes)
    _write_array(folder / "times.npy", index.times)
    digests = np.frombuffer(contents, np.uint8).reshape(-1, _DIGEST)
    _write_array(folder / "digests.npy", digests)
    offsets = _offsets([len(path) for path in index.paths])
    _write_array(folder / "offsets.npy", offsets)
    meta = {
        "version": _ENCODED_VERSION,
        "arrays_sha256": _digest(index.labels, offsets),
        "side": str(source.side.absolute()),
    }
    _write_labels(folder, source, index.labels, digest, meta)


def _write_packed(folder: Path, source: EncodedSource) -> None:
    needed = sum(path.stat().st_size for path in source.files)
    free = shutil.disk_usage(folder).free
    if free < needed:  # said now and not after an hour of copying
        raise UserError(
            f"packing {source.info.name} takes about {needed / 1e9:.1f} GB in {folder.parent}, "
            f"but {free / 1e9:.1f} GB are free; set EKD_CACHE_DIR to a folder on a disk with room."
        )
    digest = hashlib.sha256()
    parts: list[Int64Array] = []
    lengths: list[int] = []
    content: list[int] = []  # lengths, too
    with synced(folder / "encoded.bin") as file:
        for batch in source.encoded_batches(_PACKED_ROWS):
            for data, part in zip(batch.images, batch.content, strict=True):
                digest.update(part)
                file.write(data)
                lengths.append(len(data))
                content.append(len(part))
            parts.append(batch.labels)
    labels, offsets = np.concatenate(parts), _offsets(lengths)
    digest.update(_offsets(content).astype("<i8").tobytes())
    _write_array(folder / "offsets.npy", offsets)
    meta = {
        "version": _ENCODED_VERSION,
        "arrays_sha256": _digest(labels, offsets),
        "shards": list(source.parts.items()),
    }
    _write_labels(folder, source, labels, digest, meta)


def _write_labels(
    folder: Path, source: Source, labels: Int64Array, digest: Any, meta: dict[str, Any]
) -> None:
    """labels.npy and, last, the meta.json that says what must be there."""
    _write_array(folder / "labels.npy", labels)
    digest.update(labels.astype("<i8").tobytes())
    shared = {
        "class_names": list(source.class_names),
        "fingerprint": digest.hexdigest()[:16],
        "folders": source.folders,
        "stamp": source.stamp,
    }
    write_json(folder / "meta.json", {**shared, **meta})


def _digest_file(path: str) -> bytes:
    """16 bytes by which the content of a picture is known again; zeros where it is not readable,
    which is said when the pictures are looked at."""
    try:
        with open_plain(path, most=MOST_PICTURE) as file:
            size = os.fstat(file.fileno()).st_size
            whole = size <= _SMALL or path.lower().endswith(_UNCOMPRESSED)
            data = file.read(-1 if whole else _END)
            if not whole:
                file.seek(-_END, os.SEEK_END)
                data += file.read()
    except (UserError, OSError):
        return bytes(_DIGEST)
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    with synced(path) as file:
        np.save(file, array, allow_pickle=False)


def _write_header(file: Any, shape: tuple[int, ...]) -> int:
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return int(file.tell())


@contextlib.contextmanager
def synced(path: Path) -> Iterator[Any]:
    """A new file, flushed to the disk before the folder is renamed into place."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _offsets(lengths: list[int]) -> Int64Array:
    """Where each of consecutive pieces starts, and where the last one ends: int64 [N + 1]."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def _digest(*arrays: Int64Array) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
