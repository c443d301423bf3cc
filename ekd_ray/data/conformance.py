"""The rules that every data set keeps to, as one function that the tests of a plugin call."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ekd_ray.data import datasets
from ekd_ray.data.facts import channel_statistics
from ekd_ray.data.layouts import find_source
from ekd_ray.data.sources import SPLITS
from ekd_ray.data.staging import stage_images
from ekd_ray.data.store import EncodedImages, ImageArrays, entry_path, load_entry

SHARED = 0.01  # of the test pictures that may be training pictures too: real sets have a few
_FAR = 0.1  # from the training images' own statistics, on the [0, 1] scale
_LOOKED_AT = 64


def check_dataset(name: str, *, data_root: str | os.PathLike[str] | None = None) -> None:
    """Check that a data set serves a study; `name` as for `--dataset`, registered before.

    Both splits are there, with the same classes, at least two training images and one test image
    of each; they hold the same when read a second time, as each machine of a cluster does; training
    images differ; hardly a test picture (`SHARED`) is a training picture; pictures are not blank;
    `mean` and `std` are near those of the training images; every view is uint8 [B, 3, S, S] and the
    same whenever it is asked for.

    Reads all images twice, into a cache of its own that is removed. Raises AssertionError, which
    says what does not hold, and UserError where not even reading works.
    """
    datasets.check_dataset(name, data_root=data_root)
    info = datasets.dataset_info(name, data_root=data_root)
    train, test = (datasets.load_dataset(name, s, data_root=data_root) for s in SPLITS)
    assert train.class_names == test.class_names, (
        f"the splits of {name} must have the same classes in the same order, got "
        f"{train.class_names} and {test.class_names}."
    )
    assert train.num_classes == info.num_classes, f"{name} has not {info.num_classes} classes."
    counts = np.bincount(train.labels, minlength=train.num_classes)
    assert len(counts) == train.num_classes and counts.min() >= 2, (
        f"{name} must have two training images or more of every class, got {counts.tolist()}."
    )
    _check_same_again(name, data_root, train, test)
    unseen = np.flatnonzero(np.bincount(test.labels, minlength=train.num_classes) == 0)
    assert not unseen.size, (
        f"the test split of {name} must have pictures of every class, and has none of "
        f"{', '.join(train.class_names[c] for c in unseen[:5])}."
    )
    known = {*_digests(train)}
    assert len(known) >= train.num_classes, (
        f"the {len(train)} training pictures of {name} must differ, and are copies of {len(known)}."
    )
    shared = sum(digest in known for digest in _digests(test))
    assert shared <= SHARED * len(test), (
        f"{shared} of the {len(test)} test pictures of {name} are training pictures too: the test "
        "split must hold pictures that no training sees."
    )
    _check_views(train, info.view_scheme, info.image_size)
    if isinstance(train, ImageArrays):
        for got, own in zip((info.mean, info.std), channel_statistics(train.images), strict=True):
            assert np.abs(np.subtract(got, own)).max() <= _FAR, (
                f"mean and std of {name} must be near those of its training images, {own}, got "
                f"{got}: both on the [0, 1] scale."
            )


def _check_same_again(
    name: str, data_root: str | os.PathLike[str] | None, *arrays: ImageArrays | EncodedImages
) -> None:
    info, root = datasets.dataset_info(name, data_root=data_root), datasets.root_folder(data_root)
    with tempfile.TemporaryDirectory() as cache:
        for first in arrays:
            source = find_source(info, first.split, root, download=False)
            path = entry_path(Path(cache), info, first.split, source)
            again = load_entry(path, info, first.split, source)
            assert again.fingerprint == first.fingerprint, (
                f"the {first.split} split of {name} must hold the same pictures and labels in the "
                "same order whenever it is read, and does not: leave augmentation and random "
                "numbers to ekd_ray."
            )


def _digests(arrays: ImageArrays | EncodedImages) -> Iterator[bytes]:
    for index in range(len(arrays)):
        if isinstance(arrays, ImageArrays):
            data = arrays.images[index].tobytes()
        else:
            data = arrays.pictures.read(index)
        yield hashlib.sha256(data).digest()


def _check_views(arrays: ImageArrays | EncodedImages, scheme: str, size: int) -> None:
    stage = stage_images(arrays, "cpu", scheme=scheme)
    ids = np.arange(min(_LOOKED_AT, len(arrays)))
    for views in (ids % stage.num_views, None):  # blank without the black edges of a crop
        images, labels = stage.views(ids, views)
        again, _ = stage.views(ids, views)
        assert tuple(images.shape) == (len(ids), 3, size, size), (
            f"views of {arrays.name} must have the shape {[len(ids), 3, size, size]}, got "
            f"{list(images.shape)}."
        )
        assert images.equal(again), f"a view of {arrays.name} must always be the same."
        assert labels.numpy().tolist() == arrays.labels[ids].tolist()
    blank = (images.flatten(1).amin(1) == images.flatten(1).amax(1)).float().mean().item()
    assert blank < 0.5, f"{blank:.0%} of the pictures of {arrays.name} are of one colour."
