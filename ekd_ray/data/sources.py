"""Find a data set's source: files in one of the known layouts, or a generator."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.folders import FolderSource, class_folders
from ekd_ray.data.parquet import ParquetSource, file_facts, find_shards, one_line
from ekd_ray.data.registry import FOLDER_PREFIX, CifarFiles, DatasetInfo, PictureFiles
from ekd_ray.errors import UserError

SPLITS = ("train", "test")


class Source(Protocol):
    """One split of one data set, not yet decoded.

    `files` are those that hold images (empty for class folders and generated data); `folders`,
    known once all images were listed, are those whose modification time (ns) must stay.
    """

    files: tuple[Path, ...]
    folders: dict[str, int]
    class_names: tuple[str, ...]

    def facts(self) -> list[Any]:
        """What the decoded form depends on, as JSON; asks for no more than the file system."""

    def check(self) -> None:
        """Look at the files without decoding; sets `class_names`."""

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]), checking as it goes."""


class GeneratedSource:
    """A split that a function makes."""

    def __init__(self, info: DatasetInfo, split: str) -> None:
        self.info, self.split = info, split
        self.files: tuple[Path, ...] = ()
        self.folders: dict[str, int] = {}
        self.class_names = info.class_names

    def facts(self) -> list[Any]:
        """The function's version is in the registry."""
        return []

    def check(self) -> None:
        """Nothing can be missing."""

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield the whole split at once."""
        assert self.info.generate is not None
        yield self.info.generate(self.split)


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
        self.folders: dict[str, int] = {}
        self.class_names = info.class_names

    def facts(self) -> list[Any]:
        """Path, size and modification time of every file. Raises UserError."""
        return [file_facts(path) for path in self.files]

    def check(self) -> None:
        """Every file is there and has the md5 that torchvision lists. Raises UserError."""
        for path, md5 in [*self._data, self._meta]:
            _check_md5(path, md5)

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield one file at a time. Raises UserError."""
        size = self.info.image_size
        self.class_names = tuple(_unpickle(*self._meta)[self._meta_key])
        for path, md5 in self._data:
            entry = _unpickle(path, md5)
            labels = np.asarray(entry.get("fine_labels", entry.get("labels")), dtype=np.int64)
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
    (also in the hub's subfolders data/, plain_text/ and <name>/); `folder:PATH` only in PATH.
    Both splits must be in the same place, so that training and test images never differ in
    their compression. Raises UserError.
    """
    if info.files is None:
        return GeneratedSource(info, split)
    found = _search(info, info.files, split, root)
    if (
        download
        and isinstance(info.files, CifarFiles)
        and (found is None or _mended_by_download(found))
    ):
        _download(info, info.files, root / info.name)
        found = _search(info, info.files, split, root)
    if found is None:
        raise _missing(info, info.files, root)
    return found


def check_source(info: DatasetInfo, root: Path, *, download: bool) -> None:
    """Both splits are there and look sound, or `download` will bring them. Raises UserError."""
    fetched = download and isinstance(info.files, CifarFiles)
    for split in SPLITS:
        if info.files is None:
            continue
        found = _search(info, info.files, split, root)
        if found is None and not fetched:
            raise _missing(info, info.files, root)
        if found is not None and not (fetched and isinstance(found, BinarySource)):
            found.check()


def folder_classes(name: str) -> tuple[str, ...]:
    """The classes of `folder:PATH`: the folders in PATH/train, sorted. Raises UserError."""
    train = _folder_path(name) / "train"
    if not os.path.isdir(train):
        raise UserError(
            f"there is no folder {train}; {name} needs train/<class>/ and test/<class>/ (or val, "
            "valid, validation)."
        )
    names = tuple(class_folders(train))
    if len(names) < 2:
        raise UserError(
            f"{train} has {len(names)} class folders, but a data set needs two or more; put "
            "each class's images into its own folder there."
        )
    return names


def _folder_path(name: str) -> Path:
    path = name.removeprefix(FOLDER_PREFIX)
    if not path:
        raise UserError(f"the data set {name!r} names no folder; give folder:PATH.")
    return Path(os.path.expanduser(path))  # Path's own raises for an unknown user


def _missing(info: DatasetInfo, files: CifarFiles | PictureFiles, root: Path) -> UserError:
    if isinstance(files, CifarFiles):
        wanted = f"{files.binary_folder}/ or train-*-of-*.parquet"
        cure = ", or fetch them with --download"
    else:
        wanted, cure = f"train/ and {files.held_out[0]}/ or train-*-of-*.parquet", ""
    return UserError(
        f"no {info.name} files ({wanted}) in {root / info.name} or {root}; name their folder with "
        f"--data-root (or EKD_DATA_ROOT){cure}."
    )


def _search(
    info: DatasetInfo, files: CifarFiles | PictureFiles, split: str, root: Path
) -> Source | None:
    try:
        if isinstance(files, CifarFiles):
            return _search_cifar((root / info.name, root), info, files, split)
        if info.name.startswith(FOLDER_PREFIX):
            return _search_pictures((_folder_path(info.name),), info, files, split)
        bases = [root / info.name, root]
        if files.archive_folder is not None:
            bases = [base / part for base in bases for part in (files.archive_folder, "")]
        return _search_pictures(tuple(bases), info, files, split)
    except OSError as error:  # a folder that may not be entered, an overlong name
        raise UserError(
            f"cannot look for {info.name} in {root} ({one_line(error)}); name a readable folder "
            "with --data-root."
        ) from error


def _search_cifar(
    bases: tuple[Path, ...], info: DatasetInfo, files: CifarFiles, split: str
) -> Source | None:
    for base in bases:
        if (base / files.binary_folder).is_dir():
            return BinarySource(info, files, base / files.binary_folder, split)
        if shards := _search_shards(base, info, ("test",)):
            return ParquetSource(info, files, split, shards[split])
    return None


def _search_pictures(
    bases: tuple[Path, ...], info: DatasetInfo, files: PictureFiles, split: str
) -> Source | None:
    for base in bases:
        train = base / "train"
        if train.is_dir():
            sides = [base / name for name in files.held_out if (base / name).is_dir()]
            if not sides:
                names = ", ".join(f"{name}/" for name in files.held_out)
                raise UserError(
                    f"{base} has train/, but none of {names}; put held-out images there."
                )
            return FolderSource(info, train, train if split == "train" else sides[0])
        if files.held_out_shards and (shards := _search_shards(base, info, files.held_out_shards)):
            return ParquetSource(info, files, split, shards[split])
    return None


def _search_shards(
    base: Path, info: DatasetInfo, held_out: tuple[str, ...]
) -> dict[str, tuple[Path, ...]]:
    """{"train": shards, "test": shards} of the first folder that has any, or {}."""
    for folder in (base, base / "data", base / "plain_text", base / info.name):
        train = find_shards(folder, "train")
        test = next((found for name in held_out if (found := find_shards(folder, name))), ())
        if train and test:
            return {"train": train, "test": test}
        if train or test:
            lone, other = (train, held_out[0]) if train else (test, "train")
            raise UserError(
                f"{folder} has {lone[0].name}, but no {other}-*-of-*.parquet; put the missing "
                "files there."
            )
    return {}


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
