"""Image data sets as arrays: decoded once, memory-mapped, the same in every process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.registry import DATASETS, DatasetInfo, dataset_info
from ekd_ray.data.sources import SPLITS, check_source, find_source
from ekd_ray.data.store import Entry, default_cache_dir, entry_path, load_entry
from ekd_ray.errors import unknown_name

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "ImageArrays",
    "check_dataset",
    "dataset_info",
    "default_cache_dir",
    "default_data_root",
    "load_dataset",
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

    def __len__(self) -> int:
        return len(self.labels)


# Opening an entry takes milliseconds and every trial of a reused process asks again.
_opened: dict[Path, Entry] = {}


def default_data_root() -> Path:
    """$EKD_DATA_ROOT, else ./data."""
    return Path(os.environ.get("EKD_DATA_ROOT") or "data").expanduser()


def load_dataset(
    name: str,
    split: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> ImageArrays:
    """The split ("train" or "test") of the data set `name`.

    Source files are looked for in data_root/<name>/ and data_root/ (default: $EKD_DATA_ROOT,
    else ./data), as the original's binary folder or as Hugging Face Parquet. The first call on
    a node decodes them into `cache_dir` (default: $EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray,
    else ~/.cache/ekd_ray); one process does so while others wait, and later calls map the
    result. `download` fetches missing files with torchvision.

    Raises UserError for unknown names, for missing, damaged or unsuitable files (naming file
    and row) and for a cache folder that cannot be written.
    """
    info = dataset_info(name)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    source = find_source(info, split, _root(data_root), download=download)
    path = entry_path(_folder(cache_dir), info, split, source)
    entry = _opened.get(path)
    if entry is None:
        entry = _opened[path] = load_entry(path, info, source)
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

    Parquet files have a readable footer, the right columns and classes; the original's files
    have their md5. With `download`, files that would be fetched may be missing. Raises
    UserError with the cure.
    """
    info = dataset_info(name)
    check_source(info, _root(data_root), download=download)


def _root(data_root: str | os.PathLike[str] | None) -> Path:
    return default_data_root() if data_root is None else Path(data_root).expanduser()


def _folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
