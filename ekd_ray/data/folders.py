"""Pictures in class folders: side/<class>/... where the sorted class names are the labels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import decode_fixed, read_picture
from ekd_ray.data.registry import DatasetInfo, PictureFiles
from ekd_ray.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_DEPTH = 16  # of folders below a class; a link to a parent would have no end
_ROWS = 1024  # decoded at once
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file name, class, corners of a box
_ANNOTATED = "images"


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """The pictures of one side: paths relative to it [N], labels and sizes in bytes int64 [N].

    Sorted by label, then by path, so that the order does not depend on the file system.
    """

    paths: list[bytes]
    labels: Int64Array
    sizes: Int64Array


class FolderSource:
    """One split in class folders, with the classes of the training side.

    Also reads the validation side of the original Tiny ImageNet, whose pictures lie in one
    folder and have their classes in a text file. Raises UserError, at construction, unless both
    sides have the same classes, and as many as the data set.
    """

    def __init__(self, info: DatasetInfo, train: Path, side: Path) -> None:
        self.info, self.side = info, side
        self.files: tuple[Path, ...] = ()
        self.folders: dict[str, int] = {}
        self.is_train = train == side
        times = class_folders(train)
        self.class_names = tuple(times)
        if len(times) != info.num_classes:
            raise UserError(
                f"{train} has {len(times)} class folders, but {info.name} has "
                f"{info.num_classes} classes; put the folders of {info.name} there."
            )
        self.annotations: Path | None = None
        archive = isinstance(info.files, PictureFiles) and info.files.archive_folder is not None
        if archive:
            _check_wnids(train.parent / "wnids.txt", self.class_names)
        if not self.is_train:
            times = class_folders(side)
            if archive and set(times) == {_ANNOTATED} and (side / _ANNOTATIONS).is_file():
                self.annotations = side / _ANNOTATIONS
            elif tuple(times) != self.class_names:
                raise UserError(_different(train, self.class_names, side, tuple(times)))
        self._times = times

    def facts(self) -> list[Any]:
        """What the index depends on and is cheap to ask: the folders' names and times."""
        facts: list[Any] = [str(self.side.absolute()), self.class_names, list(self._times.items())]
        if self.annotations is not None:
            status = self.annotations.stat()
            facts.append([status.st_size, status.st_mtime_ns])
        return facts

    def check(self) -> None:
        """Every class has an image to train on, and there is one to test on. Raises UserError."""
        if self.annotations is not None:
            self.index()
            return
        some = False
        for name in self.class_names:
            first = next(self._walk(name), None)
            some |= first is not None
            if self.is_train and first is None:
                raise self._empty(name)
        if not some:
            raise self._nothing()

    def count(self) -> int:
        """Number of pictures. Raises UserError."""
        return len(self.index().labels)

    def index(self) -> FolderIndex:
        """List and measure all pictures; sets `folders`. Raises UserError."""
        self.folders = {}
        paths: list[bytes] = []
        labels: list[int] = []
        sizes: list[int] = []
        found = self._by_class() if self.annotations is None else self._by_annotation()
        for label, pictures in enumerate(found):
            if self.is_train and not pictures:
                raise self._empty(self.class_names[label])
            for path, entry in sorted(pictures):
                paths.append(os.fsencode(path))
                sizes.append(_size(entry))
            labels += [label] * len(pictures)
        if not paths:
            raise self._nothing()
        return FolderIndex(paths, np.array(labels, np.int64), np.array(sizes, np.int64))

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], Int64Array]]:
        """Yield (images uint8 [b, 3, H, W], labels int64 [b]). Raises UserError."""
        index, size = self.index(), self.info.image_size
        for start in range(0, len(index.paths), _ROWS):
            part = index.paths[start : start + _ROWS]
            pixels = np.empty((len(part), size, size, 3), dtype=np.uint8)
            for i, relative in enumerate(part):
                path = os.path.join(self.side, os.fsdecode(relative))
                where = f"the image {path}"
                pixels[i] = decode_fixed(read_picture(path), where, size, self.info.name)
            yield pixels.transpose(0, 3, 1, 2), index.labels[start : start + _ROWS]

    def _by_class(self) -> Iterator[list[tuple[str, os.DirEntry[str]]]]:
        for name in self.class_names:
            yield list(self._walk(name))

    def _by_annotation(self) -> list[list[tuple[str, os.DirEntry[str]]]]:
        assert self.annotations is not None
        classes = _read_annotations(self.annotations, self.class_names)
        groups: list[list[tuple[str, os.DirEntry[str]]]] = [[] for _ in self.class_names]
        for path, entry in self._walk(_ANNOTATED):
            label = classes.get(entry.name)
            if label is None:
                raise UserError(
                    f"{self.annotations} does not list {entry.name}; unpack the archive again."
                )
            groups[label].append((path, entry))
        return groups

    def _walk(self, relative: str, depth: int = 0) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Pictures below a folder of this side, as (path relative to the side, entry)."""
        folder = os.path.join(self.side, relative)
        if depth > _DEPTH:
            raise UserError(
                f"{folder} lies {depth} folders below its class; remove the link that leads "
                "back to a parent."
            )
        try:
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
        except OSError as error:
            raise _unreadable(folder, error) from error

    def _empty(self, name: str) -> UserError:
        return UserError(
            f"the class folder {self.side / name} holds no image ({', '.join(SUFFIXES)}); "
            "put one there or remove the class."
        )

    def _nothing(self) -> UserError:
        return UserError(
            f"the class folders in {self.side} hold no images ({', '.join(SUFFIXES)}); put the "
            f"images of {self.info.name} there."
        )


def class_folders(side: Path) -> dict[str, int]:
    """Names of the class folders in `side`, sorted, with their modification times (ns).

    Hidden folders are none. Raises UserError.
    """
    try:
        with os.scandir(side) as entries:
            found = {
                entry.name: entry.stat().st_mtime_ns
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir()
            }
    except OSError as error:
        raise _unreadable(side, error) from error
    return dict(sorted(found.items()))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:  # a link to nowhere
        raise _unreadable(entry.path, error) from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}); make it readable or remove it.")


def _different(
    train: Path, train_names: tuple[str, ...], side: Path, names: tuple[str, ...]
) -> str:
    if not names:
        return f"{side} has no class folders; sort its images into one folder for each class."
    lone = sorted(set(train_names) ^ set(names))
    only, other = (train, side) if lone[0] in train_names else (side, train)
    more = f" and {len(lone) - 1} more differ" if len(lone) > 1 else ""
    return (
        f"{train} and {side} must have the same class folders, but {lone[0]!r} is in {only} and "
        f"not in {other}{more}; make them the same."
    )


def _check_wnids(path: Path, class_names: tuple[str, ...]) -> None:
    """The list of classes that Tiny ImageNet brings, where there is one, must be ours."""
    with contextlib.suppress(FileNotFoundError):
        listed = set(_read_lines(path))
        lone = sorted(listed ^ set(class_names))
        if lone:
            raise UserError(
                f"{path} lists {len(listed)} classes, and {lone[0]!r} is only there or only in "
                "train; unpack the archive again."
            )


def _read_annotations(path: Path, class_names: tuple[str, ...]) -> dict[str, int]:
    """File name -> label. Raises UserError."""
    label_of = {name: label for label, name in enumerate(class_names)}
    found: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path), 1):
        name, _, rest = line.partition("\t")
        class_name = rest.partition("\t")[0]
        if class_name not in label_of:
            raise UserError(
                f"line {number} of {path} gives {name!r} the class {class_name!r}, which has no "
                "folder in train; unpack the archive again."
            )
        found[name] = label_of[class_name]
    return found


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. A missing file is the caller's to judge."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); unpack the archive again.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
