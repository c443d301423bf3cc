"""Image data sets by name, the same in every process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ekd_ray.data.counter import Int64Array
from ekd_ray.data.facts import complete_info
from ekd_ray.data.layouts import check_source, find_source
from ekd_ray.data.loaded import LoadedSource
from ekd_ray.data.registry import (
    FOLDER_PREFIX,
    HUB_PREFIX,
    DatasetInfo,
    find_registered,
    folder_info,
    hub_info,
)
from ekd_ray.data.shards import ShardSource
from ekd_ray.data.sources import SPLITS, FolderSource, Source, folder_classes
from ekd_ray.data.store import EncodedImages, ImageArrays, entry_path, load_entry
from ekd_ray.errors import unknown_name
from ekd_ray.files import default_cache_dir, expand_home, private_cache

# Opening an entry takes milliseconds and every trial of a reused process asks again.
_opened: dict[Path, ImageArrays | EncodedImages] = {}
_counted: dict[Path, int] = {}


def dataset_info(name: str, *, data_root: str | os.PathLike[str] | None = None) -> DatasetInfo:
    """The constants of a data set, by name.

    For "folder:PATH" (`~` is expanded, a relative PATH starts at the working directory) the
    classes are those found in PATH/train/ and `num_train` is their number of images; the
    files are listed once, into the default cache. What nobody has said of "hf:PATH" or of a
    registered data set is found out from its training images once, as `register_dataset` says;
    only this needs the `data_root`. Raises UserError for an unknown name, with the nearest known
    one, and for files that do not serve.
    """
    info = _uncounted_info(name, data_root)
    if info.num_train:
        return info
    return dataclasses.replace(info, num_train=num_train(name, data_root=data_root))


def num_train(name: str, *, data_root: str | os.PathLike[str] | None = None) -> int:
    """Number of images in the training split, without decoding any.

    The published number for data sets that come in one size only; for "imagenet",
    "tiny_imagenet" and all that are not known by name, the number of images found. Raises
    UserError for files that are missing or unsuitable.
    """
    info = _uncounted_info(name, data_root)
    if info.load is not None:
        return info.num_train or len(load_dataset(name, "train", data_root=data_root))
    if not info.files.held_out:
        return info.num_train
    source = find_source(info, "train", root_folder(data_root), download=False)
    if info.encoded and isinstance(source, FolderSource):
        # The index has to be made anyway, and lists the files for all later processes.
        return len(load_dataset(name, "train", data_root=data_root))
    path = entry_path(default_cache_dir(), info, "train", source)
    if path not in _counted:
        _counted[path] = source.count()
    return _counted[path]


def num_test(name: str, *, data_root: str | os.PathLike[str] | None = None) -> int | None:
    """Number of images in the test split, without opening any; None where only that would tell.

    Raises UserError for files that are missing or unsuitable.
    """
    info = _uncounted_info(name, data_root)
    if info.num_test or info.load is not None:
        return info.num_test or None
    source = find_split(name, "test", data_root=data_root)
    return source.count_files() if isinstance(source, FolderSource) else source.count()


def training_labels(
    name: str, *, data_root: str | os.PathLike[str] | None = None
) -> Int64Array | None:
    """The labels int64 [N] of the training split, without decoding any image.

    None of data sets that come in one size only, whose files may not be there yet, and where all
    images have to be decoded first. Raises UserError for files that are missing or unsuitable.
    """
    info = _uncounted_info(name, data_root)
    if info.load is not None:
        return load_dataset(name, "train", data_root=data_root).labels
    if not (info.files.held_out or name.startswith(HUB_PREFIX)):
        return None
    source = find_source(info, "train", root_folder(data_root), download=False)
    if isinstance(source, ShardSource):
        return source.all_labels()
    if info.encoded and isinstance(source, FolderSource):
        return load_dataset(name, "train", data_root=data_root).labels
    return None


def load_dataset(
    name: str,
    split: str,
    *,
    data_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    look: bool = False,
) -> ImageArrays | EncodedImages:
    """The split ("train" or "test") of the data set `name`; both kinds go to `stage_images`.

    Source files are looked for in data_root/<name>/ and data_root/ (default: $EKD_DATA_ROOT,
    else ./data), as the original's folder or as Hugging Face Parquet; those of "folder:PATH" and
    "hf:PATH" in PATH. Of data sets whose test labels are not public, "test" is the official
    validation split. The first call on a node decodes (or, where `DatasetInfo.encoded`, indexes
    or packs) them into `cache_dir` (default: $EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else
    ~/.cache/ekd_ray); one process does so while others wait, and later calls map the result.
    `download` fetches missing files of CIFAR with torchvision. `look` lists the pictures of class
    folders, which are indexed or decoded again if one was written over; without it they are those
    of the last look, if nothing was added, renamed or removed.

    Raises UserError for unknown names, for missing, damaged or unsuitable files (naming file
    and row) and for a cache folder that cannot be written.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    cache = private_cache(expand_home(cache_dir)) if cache_dir else default_cache_dir()
    info = _uncounted_info(name, data_root, cache)
    source = find_source(info, split, root_folder(data_root), download=download)
    path = entry_path(cache, info, split, source)
    if look or path not in _opened:
        _opened[path] = load_entry(path, info, split, source, look=look)
    # Several names may lead to one folder.
    return dataclasses.replace(_opened[path], name=name)


def find_split(name: str, split: str, *, data_root: str | os.PathLike[str] | None = None) -> Source:
    """Where the images of a split lie, not decoded. Raises UserError."""
    info = _uncounted_info(name, data_root)
    return find_source(info, split, root_folder(data_root), download=False)


def look_again(name: str, *, data_root: str | os.PathLike[str] | None = None) -> None:
    """Index or decode again what the cache has of class folders, if a picture was written over.

    The times of folders do not show that. Lists all pictures. Raises UserError for files that are
    missing or unsuitable.
    """
    info = _uncounted_info(name, data_root)
    if info.load is not None or not info.files.held_out:
        return
    for split in SPLITS:
        source = find_source(info, split, root_folder(data_root), download=False)
        known = entry_path(default_cache_dir(), info, split, source).exists()
        if known and isinstance(source, FolderSource):
            load_dataset(name, split, data_root=data_root, look=True)


def check_dataset(
    name: str, *, data_root: str | os.PathLike[str] | None = None, download: bool = False
) -> None:
    """Look before computing: both splits are there and their files sound, without decoding.

    Parquet files have a readable footer, the right columns and classes, and as many rows as were
    published of CIFAR, or as the README.md of the hub says; CIFAR's original files
    have their md5; class folders are the same on both sides and none is empty. Of a registered
    data set both splits are stored now, and so are pictures of one size in "hf:PATH": nothing
    else would show what is wrong with them. With `download`, files that would be fetched may be
    missing. Raises UserError with the cure.
    """
    info = _uncounted_info(name, data_root)
    if info.load is None:
        check_source(info, root_folder(data_root), download=download)
    if info.load is not None or (name.startswith(HUB_PREFIX) and not info.encoded):
        for split in SPLITS:
            load_dataset(name, split, data_root=data_root)


def _uncounted_info(
    name: str, data_root: str | os.PathLike[str] | None, cache_dir: Path | None = None
) -> DatasetInfo:
    """`dataset_info`, but the images of a folder are not counted."""
    if isinstance(name, str) and name.startswith(FOLDER_PREFIX):
        return folder_info(name, folder_classes(name))
    hub = isinstance(name, str) and name.startswith(HUB_PREFIX)
    info = hub_info(name) if hub else find_registered(name)
    if info.is_complete:
        return info
    source = find_source(info, "train", root_folder(data_root), download=False)
    assert isinstance(source, LoadedSource | ShardSource)
    return complete_info(info, source, cache_dir or default_cache_dir())


def root_folder(data_root: str | os.PathLike[str] | None) -> Path:
    """The folder to look in: the given one, else $EKD_DATA_ROOT, else ./data."""
    default = os.environ.get("EKD_DATA_ROOT") or "data"
    return expand_home(default if data_root is None else data_root)
