"""Image data sets by name, the same in every process.

Small images are decoded once and memory-mapped; pictures that vary in size stay encoded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.encoded import EncodedEntry, EncodedImages, encoded_path, load_encoded
from ekd_ray.data.folders import FolderSource
from ekd_ray.data.parquet import ParquetSource
from ekd_ray.data.registry import (
    DATASETS,
    FOLDER_PREFIX,
    DatasetInfo,
    PictureFiles,
    folder_info,
    registered,
)
from ekd_ray.data.sources import SPLITS, Source, check_source, find_source, folder_classes
from ekd_ray.data.store import Entry, default_cache_dir, entry_path, load_entry
from ekd_ray.errors import unknown_name

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "EncodedImages",
    "ImageArrays",
    "check_dataset",
    "dataset_info",
    "default_cache_dir",
    "default_data_root",
    "load_dataset",
    "num_train",
    "short_name",
]


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """One split of a data set.

    `images` is a read-only memory map uint8 [N, 3, H, W]; `labels` int64 [N], read-only;
    `fingerprint` 16 hex digits over the decoded pixels and the labels, so two copies of a
    data set agree exactly when they train the same.
    """

    name: str
    split: str
    images: np.memmap[Any, np.dtype[np.uint8]]
    labels: Int64Array
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs in this split."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.images.shape[-1])

    def __len__(self) -> int:
        return len(self.labels)


# Opening an entry takes milliseconds and every trial of a reused process asks again.
_opened: dict[Path, Entry | EncodedEntry] = {}
_counted: dict[Path, int] = {}


def default_data_root() -> Path:
    """$EKD_DATA_ROOT, else ./data."""
    return Path(os.environ.get("EKD_DATA_ROOT") or "data").expanduser()


def dataset_info(name: str) -> DatasetInfo:
    """The constants of a data set, by name.

    For "folder:PATH" (`~` is expanded, a relative PATH starts at the working directory) the
    classes are those found in PATH/train/ and `num_train` is their number of images; the
    files are listed once, into the default cache. Raises UserError for an unknown name, with
    the nearest known one, and for a folder that does not serve.
    """
    info = _outline(name)
    if not name.startswith(FOLDER_PREFIX):
        return info
    return folder_info(name, info.class_names, num_train(name))


def short_name(name: str) -> str:
    """A data set's name for folders and titles: of "folder:PATH" the path's last part."""
    return name.rpartition("/")[2]


def num_train(name: str, *, data_root: str | os.PathLike[str] | None = None) -> int:
    """Number of images in the training split, without decoding any.

    The published number for data sets that come in one size only; for "imagenet",
    "tiny_imagenet" and "folder:PATH", of which subsets are legal, the number of images found.
    Raises UserError for files that are missing or unsuitable.
    """
    info = _outline(name)
    if not isinstance(info.files, PictureFiles):
        return info.num_train
    source = find_source(info, "train", _root(data_root), download=False)
    assert isinstance(source, FolderSource | ParquetSource)
    if info.encoded and isinstance(source, FolderSource):
        # The index has to be made anyway, and lists the files for all later processes.
        return len(load_dataset(name, "train", data_root=data_root))
    path = _entry_path(default_cache_dir(), info, "train", source)
    if path not in _counted:
        _counted[path] = source.count()
    return _counted[path]


def load_dataset(
    name: str,
    split: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> ImageArrays | EncodedImages:
    """The split ("train" or "test") of the data set `name`; both kinds go to `stage_images`.

    Source files are looked for in data_root/<name>/ and data_root/ (default: $EKD_DATA_ROOT,
    else ./data), as the original's folder or as Hugging Face Parquet; those of "folder:PATH"
    in PATH. Of data sets whose test labels are not public, "test" is the official validation
    split. The first call on a node decodes (or, where `DatasetInfo.encoded`, indexes or packs)
    them into `cache_dir` (default: $EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else
    ~/.cache/ekd_ray); one process does so while others wait, and later calls map the result.
    `download` fetches missing files of CIFAR with torchvision.

    Raises UserError for unknown names, for missing, damaged or unsuitable files (naming file
    and row) and for a cache folder that cannot be written.
    """
    info = _outline(name)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    source = find_source(info, split, _root(data_root), download=download)
    path = _entry_path(_folder(cache_dir), info, split, source)
    entry = _opened.get(path)
    if entry is None:
        load = load_encoded if info.encoded else load_entry
        entry = _opened[path] = load(path, info, source)
    if isinstance(entry, EncodedEntry):
        return EncodedImages(
            name=name,
            split=split,
            labels=entry.labels,
            class_names=entry.class_names,
            fingerprint=entry.fingerprint,
            image_size=info.image_size,
            pictures=entry.pictures,
        )
    return ImageArrays(
        name=name,
        split=split,
        images=entry.images,
        labels=entry.labels,
        class_names=entry.class_names,
        fingerprint=entry.fingerprint,
    )


def check_dataset(
    name: str, *, data_root: str | os.PathLike[str] | None = None, download: bool = False
) -> None:
    """Look before computing: both splits are there and their files sound, without decoding.

    Parquet files have a readable footer, the right columns and classes; CIFAR's original files
    have their md5; class folders are the same on both sides and none is empty. With `download`,
    files that would be fetched may be missing. Raises UserError with the cure.
    """
    info = _outline(name)
    check_source(info, _root(data_root), download=download)


def _outline(name: str) -> DatasetInfo:
    """`dataset_info`, but of a folder only its classes; its images are not counted."""
    if not (isinstance(name, str) and name.startswith(FOLDER_PREFIX)):
        return registered(name)
    return folder_info(name, folder_classes(name), num_train=0)


def _entry_path(cache_dir: Path, info: DatasetInfo, split: str, source: Source) -> Path:
    place = encoded_path if info.encoded else entry_path
    return place(cache_dir, info, split, source)


def _root(data_root: str | os.PathLike[str] | None) -> Path:
    return default_data_root() if data_root is None else Path(data_root).expanduser()


def _folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
