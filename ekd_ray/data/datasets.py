"""Image data sets by name, the same in every process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ekd_ray.data.registry import FOLDER_PREFIX, DatasetInfo, find_registered, folder_info
from ekd_ray.data.sources import SPLITS, FolderSource, check_source, find_source, folder_classes
from ekd_ray.data.store import EncodedImages, ImageArrays, entry_path, load_entry
from ekd_ray.errors import unknown_name
from ekd_ray.files import default_cache_dir

# Opening an entry takes milliseconds and every trial of a reused process asks again.
_opened: dict[Path, ImageArrays | EncodedImages] = {}
_counted: dict[Path, int] = {}


def dataset_info(name: str) -> DatasetInfo:
    """The constants of a data set, by name.

    For "folder:PATH" (`~` is expanded, a relative PATH starts at the working directory) the
    classes are those found in PATH/train/ and `num_train` is their number of images; the
    files are listed once, into the default cache. Raises UserError for an unknown name, with
    the nearest known one, and for a folder that does not serve.
    """
    info = _uncounted_info(name)
    if not name.startswith(FOLDER_PREFIX):
        return info
    return dataclasses.replace(info, num_train=num_train(name))


def short_name(name: str) -> str:
    """A data set's name for folders and titles: of "folder:PATH" the path's last part."""
    return name.rpartition("/")[2]


def num_train(name: str, *, data_root: str | os.PathLike[str] | None = None) -> int:
    """Number of images in the training split, without decoding any.

    The published number for data sets that come in one size only; for "imagenet",
    "tiny_imagenet" and "folder:PATH", of which subsets are legal, the number of images found.
    Raises UserError for files that are missing or unsuitable.
    """
    info = _uncounted_info(name)
    if not info.files.held_out:
        return info.num_train
    source = find_source(info, "train", _data_root(data_root), download=False)
    if info.encoded and isinstance(source, FolderSource):
        # The index has to be made anyway, and lists the files for all later processes.
        return len(load_dataset(name, "train", data_root=data_root))
    path = entry_path(default_cache_dir(), info, "train", source)
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
    info = _uncounted_info(name)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    source = find_source(info, split, _data_root(data_root), download=download)
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = entry_path(cache, info, split, source)
    if path not in _opened:
        _opened[path] = load_entry(path, info, split, source)
    # Several names may lead to one folder.
    return dataclasses.replace(_opened[path], name=name)


def check_dataset(
    name: str, *, data_root: str | os.PathLike[str] | None = None, download: bool = False
) -> None:
    """Look before computing: both splits are there and their files sound, without decoding.

    Parquet files have a readable footer, the right columns and classes; CIFAR's original files
    have their md5; class folders are the same on both sides and none is empty. With `download`,
    files that would be fetched may be missing. Raises UserError with the cure.
    """
    check_source(_uncounted_info(name), _data_root(data_root), download=download)


def _uncounted_info(name: str) -> DatasetInfo:
    """`dataset_info`, but of a folder only its classes; its images are not counted."""
    if not (isinstance(name, str) and name.startswith(FOLDER_PREFIX)):
        return find_registered(name)
    return folder_info(name, folder_classes(name))


def _data_root(data_root: str | os.PathLike[str] | None) -> Path:
    default = os.environ.get("EKD_DATA_ROOT") or "data"
    return Path(default if data_root is None else data_root).expanduser()
