"""The data that a study began with, known again by fingerprint, number of images and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.data import load_dataset, look_again
from ekd_ray.engine.rundata import split_ids
from ekd_ray.errors import OtherData, shorten

Pin = dict[str, dict[str, Any]]


def pin_data(
    config: DistillConfig, data_root: str | None, *, look: bool = True, test: bool = True
) -> Pin:
    """The `fingerprint`, `images` and `classes` of train, validation and test, and of the second
    data set (`unknown`) where the configuration has one.

    Decodes or indexes what is not in the cache yet; with `look` also class folders in which a
    picture was written over, for which all are listed. Without `test` that split is not opened.
    Raises UserError.
    """
    for name in {config.dataset, config.ood_dataset} - {None}:
        if look and name is not None:
            look_again(name, data_root=data_root)
    train = load_dataset(config.dataset, "train", data_root=data_root)
    held = split_ids(config, train.labels, data_root)[1]
    chosen = hashlib.sha256(train.fingerprint.encode() + held.astype("<i8").tobytes())
    found = {
        "train": (train.fingerprint, len(train), train.num_classes),
        "validation": (chosen.hexdigest()[:16], len(held), train.num_classes),
    }
    if test:
        other = load_dataset(config.dataset, "test", data_root=data_root)
        found["test"] = (other.fingerprint, len(other), other.num_classes)
    if config.ood_dataset is not None:
        other = load_dataset(config.ood_dataset, "train", data_root=data_root)
        found["unknown"] = (other.fingerprint, len(other), other.num_classes)
    keys = ("fingerprint", "images", "classes")
    return {split: dict(zip(keys, values, strict=True)) for split, values in found.items()}


def check_pinned(
    where: object, pinned: Any, config: DistillConfig, data_root: str | None, *, cure: str,
    look: bool = True, test: bool = True,
) -> None:  # fmt: skip
    """Refuse other data than those of `pinned`, which `pin_data` made and a file has kept.

    Args:
        where: the study or bundle, for the message.
        pinned: anything but a mapping, as of a study of an older release, refuses nothing.
        cure: the end of the message.
        look, test: as of `pin_data`; without `look`, class folders are looked at only if they
            seem to be others.

    Raises:
        OtherData: with both fingerprints, and what differs.
    """
    if not isinstance(pinned, Mapping):
        return
    here = pin_data(config, data_root, look=look, test=test)
    if not look and any(_differ(pinned.get(split), side) for split, side in here.items()):
        here = pin_data(config, data_root, test=test)
    for split in (name for name in here if _differ(pinned.get(name), here[name])):
        old, new = pinned[split], here[split]
        changed = [
            f"{shorten(old.get(name))} {name} there and {new[name]:,} here"
            for name in ("images", "classes")
            if old.get(name) != new[name]
        ]
        what = ", ".join(changed) or "as many images and classes, but others or of other labels"
        name = config.ood_dataset if split == "unknown" else config.dataset
        prints = [shorten(side.get("fingerprint")) for side in (old, new)]
        raise OtherData(
            f"{where} was made with other data: the fingerprint of the {split} images of {name} is "
            f"{prints[0]} there and {prints[1]} here ({what}); restore the data as they were, or "
            f"{cure}."
        )


def _differ(pinned: Any, here: Mapping[str, Any]) -> bool:
    """Whether a split's fingerprint is another; one that was not pinned does not differ."""
    return isinstance(pinned, Mapping) and pinned.get("fingerprint") != here["fingerprint"]
