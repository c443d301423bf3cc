"""Find a data set's source: files in one of two layouts, or a generator."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.parquet import ParquetSource, find_shards, one_line
from ekd_ray.data.registry import CifarFiles, DatasetInfo
from ekd_ray.errors import UserError

SPLITS = ("train", "test")


class Source(Protocol):
    """One split of one data set, not yet decoded. `files` may be empty (generated data)."""

    files: tuple[Path, ...]
    class_names: tuple[str, ...]
    num_rows: int

    def check(self) -> None:
        """Look at the files without decoding; sets `num_rows` and `class_names`."""

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]), checking as it goes."""


class GeneratedSource:
    """A split that a function makes."""

    def __init__(self, info: DatasetInfo, split: str) -> None:
        self.info, self.split = info, split
        self.files: tuple[Path, ...] = ()
        self.class_names = info.class_names
        self.num_rows = 0

    def check(self) -> None:
        """Nothing can be missing."""

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield the whole split at once."""
        assert self.info.generate is not None
        images, labels = self.info.generate(self.split)
        self.num_rows = len(labels)
        yield images, labels


class BinarySource:
    """The pickled batches of the original archive, as torchvision unpacks them."""

    def __init__(self, info: DatasetInfo, layout: CifarFiles, folder: Path, split: str) -> None:
        self.info, self.folder = info, folder
        original = torchvision_class(layout)
        listed = original.train_list if split == "train" else original.test_list
        self._data = [(folder / name, md5) for name, md5 in listed]
        self._meta = (folder / original.meta["filename"], original.meta["md5"])
        self._meta_key = original.meta["key"]
        self.files = tuple(path for path, _ in [*self._data, self._meta])
        self.class_names = info.class_names
        self.num_rows = 0

    def check(self) -> None:
        """Every file is there and has the md5 that torchvision lists. Raises UserError."""
        for path, md5 in [*self._data, self._meta]:
            _check_md5(path, md5)

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield one file at a time. Raises UserError."""
        size, rows = self.info.image_size, 0
        self.class_names = tuple(_unpickle(*self._meta)[self._meta_key])
        for path, md5 in self._data:
            entry = _unpickle(path, md5)
            labels = np.asarray(entry.get("fine_labels", entry.get("labels")), dtype=np.int64)
            rows += len(labels)
            self.num_rows = rows
            yield entry["data"].reshape(-1, 3, size, size), labels


def _verified_bytes(path: Path, md5: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give the complete folder with --data-root "
            "or fetch it with --download."
        ) from error
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            f"{path} is damaged or not the original (its md5 is not {md5}); fetch it again with "
            "--download."
        )
    return data


_checked: set[tuple[Path, int, int, str]] = set()


def _check_md5(path: Path, md5: str) -> None:
    """Compare once a process and version of the file: every trial asks, and it takes 0.3 s."""
    with contextlib.suppress(OSError):
        status = path.stat()
        key = (path.absolute(), status.st_size, status.st_mtime_ns, md5)
        if key in _checked:
            return
        _verified_bytes(path, md5)
        _checked.add(key)
        return
    _verified_bytes(path, md5)  # cannot be read: says why


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    # A pickle can run code: only the very bytes whose checksum was just compared are loaded.
    loaded: dict[str, Any] = pickle.loads(_verified_bytes(path, md5), encoding="latin1")
    return loaded


def torchvision_class(layout: CifarFiles) -> Any:
    """torchvision's class for the data set (imported late: it takes a second)."""
    import torchvision.datasets

    return getattr(torchvision.datasets, layout.torchvision_class)


def find_source(info: DatasetInfo, split: str, root: Path, *, download: bool) -> Source:
    """The source of a split below `root`; fetched first if it is missing and `download` is set.

    Looked for in root/<name>/ and root/, there as the original's folder, then as Parquet
    (also in the hub's subfolders data/, plain_text/ and <name>/). Both splits must be in the
    same place, so that training and test images never differ in their compression. Raises
    UserError.
    """
    if info.files is None:
        return GeneratedSource(info, split)
    found = _search(info, info.files, split, root)
    if download and (found is None or _mended_by_download(found)):
        _download(info, info.files, root / info.name)
        found = _search(info, info.files, split, root)
    if found is None:
        raise _missing(info, info.files, root)
    return found


def check_source(info: DatasetInfo, root: Path, *, download: bool) -> None:
    """Both splits are there and look sound, or `download` will bring them. Raises UserError."""
    for split in SPLITS:
        if info.files is None:
            continue
        found = _search(info, info.files, split, root)
        if found is None and not download:
            raise _missing(info, info.files, root)
        if found is not None and not (download and isinstance(found, BinarySource)):
            found.check()


def _missing(info: DatasetInfo, layout: CifarFiles, root: Path) -> UserError:
    return UserError(
        f"no {info.name} files ({layout.binary_folder}/ or train-*-of-*.parquet) in "
        f"{root / info.name} or {root}; name their folder with --data-root (or EKD_DATA_ROOT), "
        "or fetch them with --download."
    )


def _search(info: DatasetInfo, layout: CifarFiles, split: str, root: Path) -> Source | None:
    try:
        return _search_in((root / info.name, root), info, layout, split)
    except OSError as error:  # a folder that may not be entered, an overlong name
        raise UserError(
            f"cannot look for {info.name} in {root} ({one_line(error)}); name a readable folder "
            "with --data-root."
        ) from error


def _search_in(
    bases: tuple[Path, ...], info: DatasetInfo, layout: CifarFiles, split: str
) -> Source | None:
    for base in bases:
        if (base / layout.binary_folder).is_dir():
            return BinarySource(info, layout, base / layout.binary_folder, split)
        for folder in (base, base / "data", base / "plain_text", base / info.name):
            shards = {side: find_shards(folder, side) for side in SPLITS}
            if all(shards.values()):
                return ParquetSource(info, layout, shards[split])
            for side, other in (SPLITS, SPLITS[::-1]):
                if shards[side]:
                    raise UserError(
                        f"{folder} has {shards[side][0].name}, but no {other}-*-of-*.parquet; "
                        "put the missing files there."
                    )
    return None


def _mended_by_download(source: Source) -> bool:
    if not isinstance(source, BinarySource):
        return False
    try:
        source.check()
    except UserError:
        return True
    return False


def _download(info: DatasetInfo, layout: CifarFiles, root: Path) -> None:
    import http.client
    import tarfile

    from filelock import FileLock

    failures = (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Ranks and trials arrive together; the first fetches and the others find it done.
        with FileLock(root / ".download.lock"):
            torchvision_class(layout)(root=root, download=True)
    except failures as error:
        raise UserError(
            f"downloading {info.name} to {root} failed ({one_line(error)}); fetch it elsewhere "
            "and name its folder with --data-root."
        ) from error
