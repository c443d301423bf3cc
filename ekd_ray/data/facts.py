"""Facts that nobody has stated of a data set, found in its training images, and cached."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.data.decode import picture_size
from ekd_ray.data.loaded import LoadedSource
from ekd_ray.data.registry import DATASETS, IMAGE_SIZES, UNKNOWN, DatasetInfo, Triple
from ekd_ray.data.shards import ShardSource
from ekd_ray.data.store import entry_path, load_entry, locked
from ekd_ray.data.views import RESIZED_CROP
from ekd_ray.errors import UserError
from ekd_ray.files import close_to_others, is_own_entry, read_json, write_json

LARGEST_DECODED = 128  # pixels a side: 2.5 GB of pixels for 50,000 images
_LARGE = 64  # from this side on a crop is padded with 8 pixels, as for Tiny ImageNet
_VERSION = 2  # raise it when the same images would tell something else
_ROWS = 64
_CHUNK = 4096

_known: dict[Path, DatasetInfo] = {}


def complete_info(
    info: DatasetInfo, source: LoadedSource | ShardSource, cache_dir: Path
) -> DatasetInfo:
    """`info` with what it leaves open; `source` is the training split.

    The classes are those that are declared, else 0 to the highest label. Pictures that are all
    squares of one size of at most `LARGEST_DECODED` pixels are to be decoded once, unless the view
    scheme decides; their mean and standard deviation are computed, others have ImageNet's. Found
    out once for all processes of a machine. Raises UserError.
    """
    if info.is_complete:
        return info
    given = [info.num_classes, info.image_size, info.mean, info.std, info.view_scheme]
    text = json.dumps([_VERSION, info.name, *given, info.class_names, *source.identity()])
    key = hashlib.sha256(text.encode()).hexdigest()[:20]
    path = cache_dir.absolute() / "datasets" / f"{info.kind}-facts-{key}.json"
    if path not in _known:
        found = _read(path, info)  # needs no lock, so a read-only cache serves
        if found is None:
            with locked(path):
                found = _read(path, info) or _write(path, _find_out(info, source, cache_dir))
        _known[path] = found
    source.info, source.class_names = _known[path], _known[path].class_names
    return _known[path]


def _read(path: Path, info: DatasetInfo) -> DatasetInfo | None:
    """`info` with the facts of a file, or None if there is none or it is damaged."""
    try:
        facts = read_json(path)
        lists = {name: tuple(facts[name]) for name in ("mean", "std", "class_names")}
        values: dict[str, Any] = {**facts, **lists}
        found = replace(info, **values)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.is_complete and is_own_entry(path) else None


def _write(path: Path, info: DatasetInfo) -> DatasetInfo:
    names = ("num_classes", "class_names", "image_size", "num_train", "mean", "std", "view_scheme")
    write_json(path, {name: getattr(info, name) for name in (*names, "encoded")})
    close_to_others(path)
    return info


def _find_out(
    info: DatasetInfo, source: LoadedSource | ShardSource, cache_dir: Path
) -> DatasetInfo:
    names = info.class_names or source.declared_classes()
    count = info.num_classes or len(names) or _count_classes(info, source)
    names = names or tuple(map(str, range(count)))
    if len(names) != count:
        raise UserError(
            f"{info.name} declares {len(names)} classes, but num_classes is {count}; leave it out."
        )
    source.info = info = replace(info, num_classes=count, class_names=names)
    size, encoded = info.image_size, info.encoded
    if encoded is None or not (encoded or size):
        side = _common_side(source)
        if encoded is None:
            encoded = side is None or side > LARGEST_DECODED or size not in (0, side)
        elif side is None:
            raise UserError(
                f"the pictures of {info.name} must be squares of one size for the view scheme "
                f"{info.view_scheme!r}; choose 'resized_crop' or 'none'."
            )
        size = size or (side if side and not encoded else 0)
    size = size or DATASETS["imagenet"].image_size
    cropped = "crop_flip" if size < _LARGE else "crop8_flip"
    info = replace(
        info,
        image_size=size,
        num_train=source.count(),
        view_scheme=info.view_scheme or (RESIZED_CROP if encoded else cropped),
        encoded=encoded,
    )
    source.info, source.class_names = info, names
    if isinstance(source, LoadedSource) or (info.std == UNKNOWN and not encoded):
        # Stored now: the function need not be called again, and the pixels are at hand.
        entry = load_entry(entry_path(cache_dir, info, "train", source), info, "train", source)
        if info.std == UNKNOWN and not entry.encoded:
            mean, std = channel_statistics(entry.images)  # type: ignore[union-attr]
            return replace(info, mean=mean, std=std)
    if info.std == UNKNOWN:
        return replace(info, mean=DATASETS["imagenet"].mean, std=DATASETS["imagenet"].std)
    return info


def _count_classes(info: DatasetInfo, source: LoadedSource | ShardSource) -> int:
    """Number of classes of labels that nobody has named. Raises UserError for a gap."""
    labels = source.survey[1] if isinstance(source, LoadedSource) else source.all_labels()
    if labels.min() < 0:
        raise UserError(
            f"{info.name} has the label {labels.min()} in its training split, but labels must be 0 "
            "or more."
        )
    distinct = np.unique(labels)  # a label may be 10**12, of which nobody can count up to it
    gaps = np.flatnonzero(distinct != np.arange(len(distinct)))
    if gaps.size or len(distinct) < 2:
        missing = gaps[0] if gaps.size else 1
        raise UserError(
            f"{info.name} has labels up to {distinct[-1]}, but no training image with the label "
            f"{missing}; count them from 0, without gaps, for two classes or more."
        )
    return len(distinct)


def _common_side(source: LoadedSource | ShardSource) -> int | None:
    """Pixels a side where all pictures are squares of one legal size; None otherwise."""
    sizes: set[tuple[int, int]] = set()
    for size in source.survey[0] if isinstance(source, LoadedSource) else _shard_sizes(source):
        sizes.add(size)
        if len(sizes) > 1 or size[0] != size[1]:  # seen after two photographs
            return None
    (side,) = {side for size in sizes for side in size}
    return side if IMAGE_SIZES[0] <= side <= IMAGE_SIZES[1] else None


def _shard_sizes(source: ShardSource) -> Iterator[tuple[int, int]]:
    batches = source.encoded_batches(_ROWS)
    pictures = itertools.chain.from_iterable(zip(b.images, b.names, strict=True) for b in batches)
    return (picture_size(data, name) for data, name in pictures)


def channel_statistics(images: Any) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel of uint8 [N, 3, H, W], on the [0, 1] scale.

    Summed in integers and rounded to four digits, so that all machines agree.
    """
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for start in range(0, len(images), _CHUNK):
        # Counts of the 256 values, which no sum of them overflows.
        part = images[start : start + _CHUNK]
        counts = np.stack([np.bincount(part[:, c].ravel(), minlength=256) for c in range(3)])
        values = np.arange(256, dtype=np.int64)
        total += counts @ values
        squares += counts @ values**2
    pixels = images.size // 3
    mean = total / pixels / 255
    std = np.sqrt(np.maximum(squares / pixels / 255**2 - mean**2, 0))
    first, second = ([round(float(value), 4) for value in part] for part in (mean, std))
    # A channel of one value alone is not divided by 0.
    return tuple(first), tuple(value or 1.0 for value in second)  # type: ignore[return-value]
