"""Where a data set's images come from; here its original archive and class folders.

Shards and what a function returns have files of their own, `shards` and `loaded`. A source is one
split of one data set, not yet decoded. Whatever can be wrong with its files is told in one sentence
that names the file, and the row or the folder.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import tarfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ekd_ray.config.phrases import several
from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import decode_fixed, read_picture, readable
from ekd_ray.data.registry import FOLDER_PREFIX, DatasetInfo, check_class_names
from ekd_ray.errors import UserError, meant_name
from ekd_ray.files import expand_home, open_plain, read_text

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_DECODED_ROWS = 1024  # decoded together: 3 MB of pixels (12 MB where images have 64x64)
_CLUTTER = ("thumbs.db", "desktop.ini")  # of file managers
_NOTES = (".txt", ".md", ".csv", ".json", ".xml")  # beside pictures; none is one by mistake
_MAX_DEPTH = 16  # of folders below a class; a link to a parent would have no end
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file name, class, corners of a box
_ANNOTATED = "images"


DecodedBatch = tuple[npt.NDArray[np.uint8], Int64Array]


class EncodedBatch(NamedTuple):
    """Images as they are in their files, how messages call them, and labels int64 [b].

    `content` is what the fingerprint is of: the images, or the pixels of those encoded here, since
    another version of a library encodes them to other bytes.
    """

    names: list[str]
    images: list[bytes]
    labels: Int64Array
    content: list[bytes]


class Source(ABC):
    """One split of one data set, not yet decoded; each layout of files is a subclass.

    `files` are those that hold images (empty for class folders and for what a function returns);
    `folders`, known once all images were listed, are those whose modification time (ns) must stay,
    and `stamp` is a digest of the sizes and times of files that `identity` does not name, if any;
    `class_names` are the files' own once `check` has run.
    """

    def __init__(self, info: DatasetInfo, split: str, files: tuple[Path, ...] = ()) -> None:
        self.info, self.split, self.files = info, split, files
        self.folders: dict[str, int] = {}
        self.stamp: str | None = None
        self.class_names = info.class_names

    def identity(self) -> list[Any]:
        """All that the decoded form depends on, as JSON: [path, bytes, time (ns)] of every file.

        Asks the file system alone. Raises UserError for a missing file.
        """
        return [file_identity(path) for path in self.files]

    def check(self) -> None:
        """Look at the files without decoding. Raises UserError."""
        self.identity()

    def count(self) -> int:
        """Number of images, without decoding any. Raises UserError."""
        return self.info.num_train if self.split == "train" else self.info.num_test

    @abstractmethod
    def batches(self) -> Iterator[DecodedBatch]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]) in order. Raises UserError."""


class EncodedSource(Source):
    """A split whose images can be had as they are in their files.

    `parts` are the shards or the like, how messages call them, with their numbers of rows; known
    once all images were read.
    """

    def __init__(self, info: DatasetInfo, split: str, files: tuple[Path, ...] = ()) -> None:
        super().__init__(info, split, files)
        self.parts: dict[str, int] = {}

    @abstractmethod
    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError."""

    def batches(self) -> Iterator[DecodedBatch]:
        """As `Source.batches`; raises UserError for an image of another size, too."""
        size = self.info.image_size
        for names, images, labels, _ in self.encoded_batches(_DECODED_ROWS):
            pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
            for row, (name, data) in enumerate(zip(names, images, strict=True)):
                pixels[row] = decode_fixed(data, name, size, self.info.name)
            yield pixels.transpose(0, 3, 1, 2), labels


def row_name(part: Path | str, row: int) -> str:
    """How messages call an image of a shard, or of what a function returned."""
    return f"the image in row {row} of {part}"


def file_identity(path: Path) -> list[Any]:
    """[absolute path, size in bytes, modification time in ns]; raises UserError if missing."""
    cure = "give the complete folder with --data-root or fetch it with --download"
    with readable(path, cure):
        status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def check_int64(labels: npt.NDArray[Any], name: str) -> None:
    """Raise UserError for unsigned labels that int64 would turn negative."""
    if labels.size and (highest := int(labels.max())) > np.iinfo(np.int64).max:
        raise UserError(f"{name} has the label {highest}, but labels are the classes, from 0.")


def one_line(error: object) -> str:
    """The text of an error or a type without line breaks (Arrow's run over several lines)."""
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__


# ---- the original archive of CIFAR


class ArchiveSource(Source):
    """The pickled batches of the original archive, as torchvision unpacks and reads them."""

    def __init__(self, info: DatasetInfo, split: str, folder: Path) -> None:
        self._original = _torchvision_class(info)
        self._root = folder.parent
        meta = (self._original.meta["filename"], self._original.meta["md5"])
        sides = {"train": self._original.train_list, "test": self._original.test_list}
        # torchvision looks at both sides before it loads one.
        self._md5 = {folder / name: md5 for name, md5 in [*sides["train"], *sides["test"], meta]}
        files = tuple(folder / name for name, _ in [*sides[split], meta])
        super().__init__(info, split, files)

    def check(self) -> None:
        """Every file is there and has the md5 that torchvision lists. Raises UserError."""
        for path, md5 in self._md5.items():
            _check_md5(*file_identity(path), md5)

    def batches(self) -> Iterator[DecodedBatch]:
        """Yield the whole split at once. Raises UserError."""
        self.check()  # a pickle can run code: torchvision, too, loads none of another md5
        loaded = self._original(self._root, train=self.split == "train")
        self.class_names = tuple(loaded.classes)
        yield loaded.data.transpose(0, 3, 1, 2), np.asarray(loaded.targets, dtype=np.int64)


def _torchvision_class(info: DatasetInfo) -> Any:
    """torchvision's class for the data set."""
    import torchvision.datasets  # takes a second

    assert info.files.torchvision_class is not None
    return getattr(torchvision.datasets, info.files.torchvision_class)


@functools.cache
def _check_md5(path: str, size: int, time: int, md5: str) -> None:
    """Compare once a process and version of the file: every trial asks, and it takes 0.3 s."""
    with open_plain(path) as file:
        found = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))
    if found.hexdigest() != md5:
        raise UserError(
            f"{path} is damaged or not the original (its md5 is not {md5}); fetch it again with "
            "--download."
        )


def download_archive(info: DatasetInfo, root: Path) -> None:
    failures = (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Ranks and trials arrive together; the first fetches and the others find it done.
        with FileLock(root / ".download.lock"):
            _torchvision_class(info)(root=root, download=True)
    except failures as error:
        raise UserError(
            f"downloading {info.name} to {root} failed ({one_line(error)}); fetch it elsewhere "
            "and name its folder with --data-root."
        ) from error


# ---- class folders: side/<class>/... where the sorted class names are the labels

Listing = list[tuple[str, os.DirEntry[str]]]  # (path relative to the side, entry)


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """The pictures of one side: paths relative to it [N]; labels, sizes in bytes and modification
    times (ns), each int64 [N].

    Sorted by label, then by path, so that the order does not depend on the file system.
    """

    paths: list[bytes]
    labels: Int64Array
    sizes: Int64Array
    times: Int64Array


class FolderSource(EncodedSource):
    """One split in class folders, with the classes of the training side.

    Also reads the validation side of the original Tiny ImageNet, whose pictures lie in one
    folder and have their classes in a text file. Raises UserError, at construction, unless both
    sides have the same classes, and as many as the data set. `skipped`, known as `folders` are,
    are the paths of files that are no pictures by their endings; hidden ones are not among them.
    """

    def __init__(self, info: DatasetInfo, split: str, train: Path, held_out: Path) -> None:
        super().__init__(info, split)
        self.side = train if split == "train" else held_out
        self.skipped: list[str] = []
        self._class_times = _list_classes(train)
        self.class_names = tuple(self._class_times)
        check_class_names(str(train), self.class_names)
        _check_distinct(train, self.class_names)
        if len(self.class_names) != info.num_classes:
            raise UserError(
                f"{train} has {len(self.class_names)} class folders, but {info.name} has "
                f"{info.num_classes} classes; put the folders of {info.name} there."
            )
        self.annotations: Path | None = None
        archive = info.files.unpacked_folder is not None
        if split == "train":
            return
        self._class_times = _list_classes(held_out)
        names = tuple(self._class_times)
        if archive and names == (_ANNOTATED,) and (held_out / _ANNOTATIONS).is_file():
            self.annotations = held_out / _ANNOTATIONS
        elif names != self.class_names:
            raise _class_mismatch(train, self.class_names, held_out, names)

    def identity(self) -> list[Any]:
        """Path of the side, classes, and the modification times of their folders."""
        times = list(self._class_times.items())
        found: list[Any] = [str(self.side.absolute()), self.class_names, times]
        if self.annotations is not None:
            found.append(file_identity(self.annotations)[1:])
        return found

    def check(self) -> None:
        """Every class has an image to train on, and there is one to test on. Raises UserError."""
        if self.annotations is not None:
            self.index()
            return
        self._check_filled([name for name in self.class_names if not any(self._walk(name))])

    def count(self) -> int:
        """Number of pictures. Raises UserError."""
        return len(self.index().labels)

    def count_files(self) -> int:
        """Number of pictures, without a look into any. Raises UserError."""
        if self.annotations is not None:
            return sum(map(len, self._list_annotated(self.annotations)))
        return sum(1 for name in self.class_names for _ in self._walk(name))

    def index(self) -> FolderIndex:
        """List and measure all pictures; sets `folders`, `skipped`, `stamp`. Raises UserError."""
        self.folders, self.skipped = {}, []
        if self.annotations is None:
            classes = [list(self._walk(name)) for name in self.class_names]
        else:
            classes = self._list_annotated(self.annotations)
        pairs = zip(self.class_names, classes, strict=True)
        self._check_filled([name for name, pictures in pairs if not pictures])
        labels = np.repeat(np.arange(len(classes)), [len(pictures) for pictures in classes])
        pictures = [picture for part in classes for picture in sorted(part, key=itemgetter(0))]
        facts = np.empty((2, len(pictures)), np.int64)
        for row, (_, entry) in enumerate(pictures):
            with readable(entry.path):  # a link to nowhere is not
                status = entry.stat()
                facts[:, row] = status.st_size, status.st_mtime_ns
        paths = [os.fsencode(path) for path, _ in pictures]
        digest = hashlib.sha256(b"\0".join(paths))
        for array in (labels, facts):
            digest.update(array.tobytes())
        self.stamp = digest.hexdigest()
        return FolderIndex(paths, labels, *facts)

    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError."""
        index = self.index()
        paths = [os.path.join(self.side, os.fsdecode(path)) for path in index.paths]
        for start in range(0, len(paths), rows):
            part = paths[start : start + rows]
            names = [f"the image {path}" for path in part]
            labels = index.labels[start : start + rows]
            images = [read_picture(path) for path in part]
            yield EncodedBatch(names, images, labels, images)

    def _check_filled(self, empty: list[str]) -> None:
        """Raise UserError for empty classes to train on, or nothing to test on."""
        suffixes = ", ".join(SUFFIXES)
        if empty and self.split == "train":
            raise UserError(
                f"the class folder {self.side / empty[0]} holds no image ({suffixes}); "
                "put one there or remove the class."
            )
        if len(empty) == len(self.class_names):
            raise UserError(
                f"the class folders in {self.side} hold no images ({suffixes}); put the "
                f"images of {self.info.name} there."
            )

    def _list_annotated(self, annotations: Path) -> list[Listing]:
        """The pictures of each class of Tiny ImageNet's validation side."""
        label_of = _read_annotations(annotations, self.class_names)
        classes: list[Listing] = [[] for _ in self.class_names]
        for path, entry in self._walk(_ANNOTATED):
            label = label_of.get(entry.name)
            if label is None:
                raise UserError(
                    f"{annotations} does not list {entry.name}; unpack the archive again."
                )
            classes[label].append((path, entry))
        missing = label_of.keys() - {entry.name for pictures in classes for _, entry in pictures}
        if missing:
            raise UserError(
                f"{annotations} lists {min(missing)}{_and_more(len(missing) - 1)}, but "
                f"{self.side / _ANNOTATED} lacks it; unpack the archive again."
            )
        return classes

    def _walk(self, relative: str, depth: int = 0) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Pictures below a folder of this side, as (path relative to the side, entry)."""
        folder = os.path.join(self.side, relative)
        if depth > _MAX_DEPTH:
            raise UserError(
                f"{folder} lies {depth} folders below its class; remove the link that leads "
                "back to a parent."
            )
        with readable(folder):
            if depth:  # noted before the look inside, so that no change goes unseen
                self.folders[os.path.abspath(folder)] = os.stat(folder).st_mtime_ns
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{relative}/{entry.name}"
                    if entry.is_dir():
                        yield from self._walk(path, depth + 1)
                    elif entry.name.lower().endswith(SUFFIXES):
                        yield path, entry
                    elif entry.name.lower() not in _CLUTTER and not path.lower().endswith(_NOTES):
                        self.skipped.append(path)


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""


def _meant_folder(folder: Path) -> str:
    """Which folder beside one that is not there was meant."""
    beside = [path.name for path in folder.parent.glob("*") if path.is_dir()]
    return meant_name(folder.name, beside)


def folder_classes(name: str) -> tuple[str, ...]:
    """The classes of `folder:PATH`: the folders in PATH/train, sorted. Raises UserError."""
    train = folder_path(name) / "train"
    if train.parent.is_file():
        raise UserError(
            f"{train.parent} is a file: {name} names a folder with a folder of pictures a class."
        )
    if not train.parent.is_dir():
        raise UserError(
            f"there is no folder {train.parent}: check the name of the data set, {name}."
            f"{_meant_folder(train.parent)} A study finds pictures that were moved by a link there."
        )
    if not os.path.isdir(train):
        raise UserError(
            f"there is no folder {train}; {name} needs train/<class>/ and test/<class>/ (or val, "
            "valid, validation): of class folders alone move some pictures of each to "
            "test/<class>/, the others to train/<class>/."
        )
    names = tuple(_list_classes(train))
    if len(names) < 2:
        raise UserError(
            f"{train} has {several(len(names), 'class folder')}, but a data set needs two or more; "
            "put each class's images into its own folder there."
        )
    return names


def folder_path(name: str) -> Path:
    path = name.removeprefix(FOLDER_PREFIX)
    if not path:
        raise UserError(f"the data set {name!r} names no folder; give folder:PATH.")
    return expand_home(path)


def _list_classes(side: Path) -> dict[str, int]:
    """Names of the class folders in `side`, sorted, with their modification times (ns).

    Hidden folders are none. Raises UserError.
    """
    with readable(side), os.scandir(side) as entries:
        found = {
            entry.name: entry.stat().st_mtime_ns
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir()
        }
    return dict(sorted(found.items()))


def _check_distinct(side: Path, names: tuple[str, ...]) -> None:
    """Raise UserError for two class folders that look the same."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise UserError(
                f"{side} has two class folders that look the same, {other!a} and "
                f"{name!a}, in two Unicode forms; put their images into one of them."
            )


def _class_mismatch(
    train: Path, train_names: tuple[str, ...], held_out: Path, names: tuple[str, ...]
) -> UserError:
    if not names:
        return UserError(
            f"{held_out} has no class folders; sort its images into one folder for each class."
        )
    lone = sorted(set(train_names) ^ set(names))
    plain = [
        sorted(unicodedata.normalize("NFC", n).casefold() for n in s) for s in (train_names, names)
    ]
    if plain[0] == plain[1]:
        pair = [ascii(next(n for n in s if n in lone)) for s in (train_names, names)]
        return UserError(
            f"the class folders in {train} and {held_out} differ by case or Unicode form alone "
            f"({' and '.join(pair)}); rename those in {held_out}."
        )
    only, other = (train, held_out) if lone[0] in train_names else (held_out, train)
    more = f" and {len(lone) - 1} more differ" if len(lone) > 1 else ""
    return UserError(
        f"{train} and {held_out} must have the same class folders, but {lone[0]!r} is in {only} "
        f"and not in {other}{more}; make them the same."
    )


def _read_annotations(path: Path, class_names: tuple[str, ...]) -> dict[str, int]:
    """File name -> label. Raises UserError."""
    label_of = {name: label for label, name in enumerate(class_names)}
    found: dict[str, int] = {}
    lines = read_text(path, cure="unpack the archive again").strip().splitlines()
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        class_name = rest.partition("\t")[0]
        if class_name not in label_of:
            raise UserError(
                f"line {number} of {path} gives {name!r} the class {class_name!r}, which has no "
                "folder in train; unpack the archive again."
            )
        found[name] = label_of[class_name]
    return found
