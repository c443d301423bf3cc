"""Where a data set's images come from: its original archive, Parquet files or class folders.

A source is one split of one data set, not yet decoded. Whatever can be wrong with its files is
told in one sentence that names the file, and the row or the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.decode import decode_fixed, read_picture, readable
from ekd_ray.data.registry import FOLDER_PREFIX, DatasetInfo
from ekd_ray.errors import UserError

SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_DECODED_ROWS = 1024  # decoded together: 3 MB of pixels (12 MB where images have 64x64)
_READ_AHEAD = 1 << 20  # bytes that Arrow buffers, instead of a whole column of a row group
_MAX_DEPTH = 16  # of folders below a class; a link to a parent would have no end
_IMAGE_COLUMNS = ("img", "image")
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file name, class, corners of a box
_ANNOTATED = "images"


DecodedBatch = tuple[npt.NDArray[np.uint8], Int64Array]


class EncodedBatch(NamedTuple):
    """Images as they are in their files, how messages call them, and labels int64 [b]."""

    names: list[str]
    images: list[bytes]
    labels: Int64Array


class Source(ABC):
    """One split of one data set, not yet decoded; each layout of files is a subclass.

    `files` are those that hold images (empty for class folders and generated data); `folders`,
    known once all images were listed, are those whose modification time (ns) must stay;
    `class_names` are the files' own once `check` has run.
    """

    def __init__(self, info: DatasetInfo, split: str, files: tuple[Path, ...] = ()) -> None:
        self.info, self.split, self.files = info, split, files
        self.folders: dict[str, int] = {}
        self.class_names = info.class_names

    def identity(self) -> list[Any]:
        """All that the decoded form depends on, as JSON: [path, bytes, time (ns)] of every file.

        Asks the file system alone. Raises UserError for a missing file.
        """
        return [_file_identity(path) for path in self.files]

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
    """A split whose images can be had as they are in their files."""

    @abstractmethod
    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError."""

    def batches(self) -> Iterator[DecodedBatch]:
        """As `Source.batches`; raises UserError for an image of another size, too."""
        size = self.info.image_size
        for names, images, labels in self.encoded_batches(_DECODED_ROWS):
            pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
            for row, (name, data) in enumerate(zip(names, images, strict=True)):
                pixels[row] = decode_fixed(data, name, size, self.info.name)
            yield pixels.transpose(0, 3, 1, 2), labels


class GeneratedSource(Source):
    """A split that a function makes."""

    def batches(self) -> Iterator[DecodedBatch]:
        """Yield the whole split at once."""
        assert self.info.generate is not None
        yield self.info.generate(self.split)


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
            _check_md5(*_file_identity(path), md5)

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
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False))
    if found.hexdigest() != md5:
        raise UserError(
            f"{path} is damaged or not the original (its md5 is not {md5}); fetch it again with "
            "--download."
        )


def _download(info: DatasetInfo, root: Path) -> None:
    failures = (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Ranks and trials arrive together; the first fetches and the others find it done.
        with FileLock(root / ".download.lock"):
            _torchvision_class(info)(root=root, download=True)
    except failures as error:
        raise UserError(
            f"downloading {info.name} to {root} failed ({_one_line(error)}); fetch it elsewhere "
            "and name its folder with --data-root."
        ) from error


# ---- Parquet files, as on the Hugging Face hub


class ParquetSource(EncodedSource):
    """The shards of one split, read in order; `check` sets `rows_per_file`."""

    def __init__(self, info: DatasetInfo, split: str, files: tuple[Path, ...]) -> None:
        super().__init__(info, split, files)
        self.rows_per_file: dict[Path, int] = {}
        self._columns: dict[Path, tuple[str, str]] = {}
        self._names_declared = False

    def check(self) -> None:
        """Read footers, schemas and labels. Raises UserError."""
        highest = -1
        for path in self.files:
            with _open_parquet(path) as file:
                self._columns[path] = self._find_columns(path, file.schema_arrow)
                self.rows_per_file[path] = file.metadata.num_rows
                label = self._columns[path][1]
                column = file.read(columns=[label]).column(label).combine_chunks()
                highest = max(highest, self._check_labels(path, column))
        if sum(self.rows_per_file.values()) == 0:
            raise UserError(f"{self.files[0]} holds no rows.")
        # A training set without declared names shows its number of classes in no other way.
        name, count = self.info.name, self.info.num_classes
        named = self.info.class_names or self._names_declared or self.split != "train"
        if not named and highest != count - 1:
            raise UserError(
                f"the train shards in {self.files[0].parent} have labels up to {highest}, but "
                f"{name} has the labels 0 to {count - 1}; put the files of {name} there."
            )

    def count(self) -> int:
        """Number of rows, from the footers. Raises UserError."""
        count = 0
        for path in self.files:
            with _open_parquet(path) as file:
                count += file.metadata.num_rows
        return count

    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError.

        Memory stays bounded by two batches and a page of the file, however large its row groups
        are.
        """
        self.check()
        for path, (image, label) in self._columns.items():
            start = 0
            with _open_parquet(path) as file:
                for batch in file.iter_batches(rows, columns=[f"{image}.bytes", label]):
                    images = batch.column(image).field("bytes").to_pylist()
                    labels = batch.column(label).to_numpy().astype(np.int64)
                    if None in images:
                        bad = start + images.index(None)
                        raise UserError(
                            f"row {bad} of {path} has no image bytes; fetch the file again."
                        )
                    names = [row_name(path, start + row) for row in range(len(images))]
                    yield EncodedBatch(names, images, labels)
                    start += len(labels)

    def _find_columns(self, path: Path, schema: Any) -> tuple[str, str]:
        """Names of the image and the label column; sets `class_names`. Raises UserError."""
        import pyarrow as pa  # takes a while, and folders and generated data need none

        wanted = (_IMAGE_COLUMNS, self.info.files.label_columns)
        image, label = (next((n for n in names if n in schema.names), None) for names in wanted)
        if image is None or label is None:
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}, but {self.info.name} needs "
                f"{' and '.join('/'.join(names) for names in wanted)}."
            )
        kind = schema.field(image).type
        binary = pa.types.is_struct(kind) and any(
            field.name == "bytes"
            and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
            for field in kind
        )
        for column, legal, needed in (
            (image, binary, "be a struct with binary 'bytes'"),
            (label, pa.types.is_integer(schema.field(label).type), "hold integers"),
        ):
            if not legal:
                got = _one_line(schema.field(column).type)
                raise UserError(f"column {column!r} of {path} must {needed}, got {got}.")
        count = self.info.num_classes
        names = _declared_names(schema, label)
        if names and len(names) != count:
            raise UserError(
                f"{path} declares {len(names)} classes, but {self.info.name} has {count}; put the "
                f"files of {self.info.name} there."
            )
        self._names_declared |= bool(names)
        self.class_names = names or self.info.class_names or tuple(map(str, range(count)))
        return image, label

    def _check_labels(self, path: Path, column: Any) -> int:
        """The highest label, -1 if there are none; UserError unless each row has a legal one."""
        if column.null_count:
            first = column.is_null().to_pylist().index(True)
            raise UserError(f"row {first} of {path} has no label.")
        labels = column.to_numpy(zero_copy_only=False).astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= self.info.num_classes))
        if wrong.size:
            label, name = labels[wrong[0]], self.info.name
            cure = f"put the {'labelled validation shards' if label < 0 else 'files'} of {name}"
            raise UserError(
                f"row {wrong[0]} of {path} has the label {label}, but {name} has the labels 0 to "
                f"{self.info.num_classes - 1}; {cure} there."
            )
        return int(labels.max(initial=-1))


def row_name(path: Path | str, row: int) -> str:
    """How messages call an image of a shard."""
    return f"the image in row {row} of {path}"


def _find_shards(folder: Path, split: str) -> tuple[Path, ...]:
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
    numbers, total = [number for number, _, _ in found], found[0][1]
    one_set = {of for _, of, _ in found} == {total} and max(numbers) < total
    if not one_set or len(set(numbers)) < len(numbers):
        names = ", ".join(path.name for _, _, path in found[:4])
        raise UserError(f"{folder} mixes shards of different {split} sets ({names}); keep one set.")
    if missing := sorted(set(range(total)) - set(numbers)):
        name = f"{split}-{missing[0]:05d}-of-{total:05d}.parquet"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the shard {name}{more} is missing in {folder}; fetch it again.")
    return tuple(path for _, _, path in found)


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A ParquetFile; what Arrow or the system says about a bad file becomes a UserError."""
    import pyarrow as pa  # takes a while, and folders and generated data need none
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"cannot read the Parquet file {path} ({_one_line(error)}); it may be incomplete: "
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


# ---- class folders: side/<class>/... where the sorted class names are the labels

Listing = list[tuple[str, os.DirEntry[str]]]  # (path relative to the side, entry)


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """The pictures of one side: paths relative to it [N], labels and sizes in bytes int64 [N].

    Sorted by label, then by path, so that the order does not depend on the file system.
    """

    paths: list[bytes]
    labels: Int64Array
    sizes: Int64Array


class FolderSource(EncodedSource):
    """One split in class folders, with the classes of the training side.

    Also reads the validation side of the original Tiny ImageNet, whose pictures lie in one
    folder and have their classes in a text file. Raises UserError, at construction, unless both
    sides have the same classes, and as many as the data set.
    """

    def __init__(self, info: DatasetInfo, split: str, train: Path, held_out: Path) -> None:
        super().__init__(info, split)
        self.side = train if split == "train" else held_out
        self._class_times = _list_classes(train)
        self.class_names = tuple(self._class_times)
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
            found.append(_file_identity(self.annotations)[1:])
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

    def index(self) -> FolderIndex:
        """List and measure all pictures; sets `folders`. Raises UserError."""
        self.folders = {}
        if self.annotations is None:
            classes = [list(self._walk(name)) for name in self.class_names]
        else:
            classes = self._list_annotated(self.annotations)
        pairs = zip(self.class_names, classes, strict=True)
        self._check_filled([name for name, pictures in pairs if not pictures])
        labels = np.repeat(np.arange(len(classes)), [len(pictures) for pictures in classes])
        pictures = [picture for part in classes for picture in sorted(part, key=itemgetter(0))]
        sizes = np.empty(len(pictures), np.int64)
        for row, (_, entry) in enumerate(pictures):
            with readable(entry.path):  # a link to nowhere is not
                sizes[row] = entry.stat().st_size
        return FolderIndex([os.fsencode(path) for path, _ in pictures], labels, sizes)

    def encoded_batches(self, rows: int) -> Iterator[EncodedBatch]:
        """Yield all images in order, `rows` at once. Raises UserError."""
        index = self.index()
        paths = [os.path.join(self.side, os.fsdecode(path)) for path in index.paths]
        for start in range(0, len(paths), rows):
            part = paths[start : start + rows]
            names = [f"the image {path}" for path in part]
            labels = index.labels[start : start + rows]
            yield EncodedBatch(names, [read_picture(path) for path in part], labels)

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


def folder_classes(name: str) -> tuple[str, ...]:
    """The classes of `folder:PATH`: the folders in PATH/train, sorted. Raises UserError."""
    train = _folder_path(name) / "train"
    if not os.path.isdir(train):
        raise UserError(
            f"there is no folder {train}; {name} needs train/<class>/ and test/<class>/ (or val, "
            "valid, validation)."
        )
    names = tuple(_list_classes(train))
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


def _class_mismatch(
    train: Path, train_names: tuple[str, ...], held_out: Path, names: tuple[str, ...]
) -> UserError:
    if not names:
        return UserError(
            f"{held_out} has no class folders; sort its images into one folder for each class."
        )
    lone = sorted(set(train_names) ^ set(names))
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
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); unpack the archive again.") from error
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


# ---- which layout is there


def find_source(info: DatasetInfo, split: str, root: Path, *, download: bool) -> Source:
    """The source of a split below `root`; fetched first if it is missing and `download` is set.

    Looked for in root/<name>/ and root/, there as the original's folder, then as class folders,
    then as Parquet (also in the hub's subfolders data/, plain_text/ and <name>/); `folder:PATH`
    only in PATH. Both splits must be in the same place, so that training and test images never
    differ in their compression. Raises UserError.
    """
    if info.generate is not None:
        return GeneratedSource(info, split)
    found = _search(info, split, root)
    if download and info.files.torchvision_class and (found is None or _is_damaged(found)):
        _download(info, root / info.name)
        found = _search(info, split, root)
    if found is None:
        raise _no_files(info, root)
    return found


def check_source(info: DatasetInfo, root: Path, *, download: bool) -> None:
    """Both splits are there and look sound, or `download` will bring them. Raises UserError."""
    if info.generate is not None:
        return
    fetched = download and info.files.torchvision_class is not None
    for split in SPLITS:
        found = _search(info, split, root)
        if found is None and not fetched:
            raise _no_files(info, root)
        if found is not None and not (fetched and isinstance(found, ArchiveSource)):
            found.check()


def _is_damaged(source: Source) -> bool:
    """Whether a download would mend it."""
    with contextlib.suppress(UserError):
        if isinstance(source, ArchiveSource):
            source.check()
        return False
    return True


def _no_files(info: DatasetInfo, root: Path) -> UserError:
    name, files = info.name, info.files
    folders, cure = f"{files.pickled_folder}/", ", or fetch them with --download"
    if files.pickled_folder is None:
        folders, cure = f"train/ and {files.held_out[0]}/", ""
    return UserError(
        f"no {name} files ({folders} or train-*-of-*.parquet) in {root / name} or {root}; name "
        f"their folder with --data-root (or EKD_DATA_ROOT){cure}."
    )


def _search(info: DatasetInfo, split: str, root: Path) -> Source | None:
    """The source in the first folder that has one, or None. Raises UserError."""
    if info.name.startswith(FOLDER_PREFIX):
        bases = [_folder_path(info.name)]
    else:
        bases = [root / info.name, root]
        if info.files.unpacked_folder is not None:
            bases = [base / part for base in bases for part in (info.files.unpacked_folder, "")]
    try:
        found = (_search_folder(base, info, split) for base in bases)
        return next((source for source in found if source is not None), None)
    except OSError as error:  # a folder that may not be entered, an overlong name
        raise UserError(
            f"cannot look for {info.name} in {root} ({_one_line(error)}); name a readable folder "
            "with --data-root."
        ) from error


def _search_folder(base: Path, info: DatasetInfo, split: str) -> Source | None:
    files = info.files
    if files.pickled_folder is not None and (base / files.pickled_folder).is_dir():
        return ArchiveSource(info, split, base / files.pickled_folder)
    if files.held_out and (base / "train").is_dir():
        held_out = [base / name for name in files.held_out if (base / name).is_dir()]
        if not held_out:
            names = ", ".join(f"{name}/" for name in files.held_out)
            raise UserError(f"{base} has train/, but none of {names}; put held-out images there.")
        return FolderSource(info, split, base / "train", held_out[0])
    if files.held_out_shards and (shards := _search_shards(base, info.name, files.held_out_shards)):
        return ParquetSource(info, split, shards[split])
    return None


def _search_shards(base: Path, name: str, prefixes: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """{"train": shards, "test": shards} of the first folder that has any, or {}."""
    for folder in (base, base / "data", base / "plain_text", base / name):
        train = _find_shards(folder, "train")
        test = next((found for prefix in prefixes if (found := _find_shards(folder, prefix))), ())
        if train and test:
            return {"train": train, "test": test}
        if train or test:
            lone, other = (train, prefixes[0]) if train else (test, "train")
            raise UserError(
                f"{folder} has {lone[0].name}, but no {other}-*-of-*.parquet; put the missing "
                "files there."
            )
    return {}


def _file_identity(path: Path) -> list[Any]:
    """[absolute path, size in bytes, modification time in ns]; raises UserError if missing."""
    cure = "give the complete folder with --data-root or fetch it with --download"
    with readable(path, cure):
        status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def _one_line(error: object) -> str:
    """The text of an error or a type without line breaks (Arrow's run over several lines)."""
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__
