"""Decoded images on disk: built once for all processes, then memory-mapped.

An entry is a folder `<cache>/datasets/<dataset>-<split>-<key>/` with images.npy, labels.npy
and meta.json. The key covers the decoder's version and every source file's path, size and
modification time (of class folders: theirs), so changed sources make a new entry and an entry
never changes. How an entry comes to be is the same for data sets that stay encoded (encoded.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.registry import DatasetInfo
from ekd_ray.data.sources import Source
from ekd_ray.errors import UserError
from ekd_ray.files import write_json

_VERSION = 1  # raise it when the same files would decode to other pixels

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Entry:
    """A decoded split: images uint8 [N, 3, H, W] (memory-mapped), labels int64 [N]."""

    images: np.memmap[Any, np.dtype[np.uint8]]
    labels: Int64Array
    class_names: tuple[str, ...]
    fingerprint: str


def default_cache_dir() -> Path:
    """$EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else ~/.cache/ekd_ray."""
    if folder := os.environ.get("EKD_CACHE_DIR"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ekd_ray"


def entry_path(cache_dir: Path, info: DatasetInfo, split: str, source: Source) -> Path:
    """Where the decoded form of `source` belongs. Raises UserError for a missing file."""
    facts = [_VERSION, info.generator_version, info.name, split, info.image_size]
    return named_entry(cache_dir, f"{info.name}-{split}", [*facts, *source.facts()])


def named_entry(cache_dir: Path, label: str, facts: list[Any]) -> Path:
    """The entry `label` that all of `facts` (JSON) belong to."""
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]
    return cache_dir.absolute() / "datasets" / f"{label}-{key}"


def load_entry(path: Path, info: DatasetInfo, source: Source) -> Entry:
    """Open the decoded entry at `path`, as `open_entry` does."""
    return open_entry(path, lambda: _read(path, info), lambda folder: _write(folder, info, source))


def open_entry(path: Path, read: Callable[[], T | None], write: Callable[[Path], None]) -> T:
    """What `read` makes of the entry at `path`; `write` fills it if it is missing or damaged.

    One process builds, the others wait for it. Raises UserError for bad sources and for a
    cache folder that cannot be written.
    """
    entry = read()  # needs no lock, so a read-only cache that is complete works
    if entry is not None:
        return entry
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            entry = read()  # another process may have built it meanwhile
            if entry is None:
                _build(path, write)
                entry = read()
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {path.parent} ({error.strerror or error}); set "
            "EKD_CACHE_DIR to a folder on a disk with room."
        ) from error
    if entry is None:
        # The sources of a sound entry are compared too: they may have changed meanwhile.
        raise UserError(
            f"the files of {path.name} changed while they were read; start again when nothing "
            "writes to them."
        )
    return entry


def unchanged(folders: Mapping[str, int]) -> bool:
    """Whether every folder still has its modification time (ns)."""
    try:
        return all(os.stat(folder).st_mtime_ns == time for folder, time in folders.items())
    except OSError:
        return False


def _read(path: Path, info: DatasetInfo) -> Entry | None:
    """The entry, or None if it is missing or not what its meta.json says."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        # Mapping checks the file's length against its header; a short file raises ValueError.
        images = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(path / "labels.npy", allow_pickle=False)
        names, fingerprint = tuple(meta["class_names"]), str(meta["fingerprint"])
        size, rows = info.image_size, int(meta["rows"])
        sound = (
            meta["version"] == _VERSION
            and rows > 0
            and isinstance(images, np.memmap)
            and (images.dtype, images.shape) == (np.uint8, (rows, 3, size, size))
            and images.flags.c_contiguous
            and os.path.getsize(path / "images.npy") == images.offset + images.nbytes
            and (labels.dtype, labels.shape) == (np.int64, (rows,))
            and hashlib.sha256(labels.tobytes()).hexdigest() == meta["labels_sha256"]
            and len(names) == info.num_classes
            and unchanged(meta.get("folders", {}))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    if not sound:
        return None
    labels.setflags(write=False)
    return Entry(images, labels, names, fingerprint)


def _build(path: Path, write: Callable[[Path], None]) -> None:
    """Write into a folder beside `path`, then rename it into place. The lock is held."""
    prefix = f".{path.name}."
    for stale in path.parent.glob(f"{prefix}*"):  # of builders that were killed
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        folder.chmod(0o755)
        write(folder)
        if path.exists():  # damaged: out of the way first, rename needs a free name
            os.rename(path, folder / "damaged")
            shutil.rmtree(folder / "damaged", ignore_errors=True)
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(folder: Path, info: DatasetInfo, source: Source) -> None:
    shape = (3, info.image_size, info.image_size)
    digest = hashlib.sha256()
    parts: list[Int64Array] = []
    # Sequential writes and not a writable map: on a full disk a map dies with SIGBUS.
    with synced(folder / "images.npy") as file:
        start = _header(file, (0, *shape))
        for images, labels in source.batches():
            if images.shape != (len(labels), *shape):
                raise UserError(f"{source.files or info.name}: images of shape {images.shape}.")
            pixels = np.ascontiguousarray(images)
            digest.update(pixels.data)
            file.write(pixels.data)
            parts.append(labels)
        labels = np.concatenate(parts)
        file.seek(0)
        # NumPy leaves room in the header for the first axis to grow; never trust it blindly.
        if _header(file, (len(labels), *shape)) != start:
            raise RuntimeError("the .npy header changed its length")
    with synced(folder / "labels.npy") as file:
        np.save(file, labels, allow_pickle=False)
    digest.update(repr((len(labels), *shape)).encode())
    digest.update(labels.astype("<i8").tobytes())
    meta = {
        "version": _VERSION,
        "rows": len(labels),
        "class_names": list(source.class_names),
        "fingerprint": digest.hexdigest()[:16],
        "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
        "sources": [str(file) for file in source.files],
        "folders": source.folders,
    }
    write_json(folder / "meta.json", meta)


def _header(file: Any, shape: tuple[int, ...]) -> int:
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
