"""Whether a teacher is what its user thinks, judged by its logits on validation images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ekd_ray.engine.measure.near_chance import DEVIATIONS, chance_error, is_near_chance
from ekd_ray.errors import shorten
from ekd_ray.models import Claims

FAR_BELOW = 0.10  # of the accuracy that a file claims: images and crops may differ
MUCH_BETTER = 0.05
# A permutation is found on half of the images, and has to gain this much on the others.
_PERMUTED = 0.2
_MOST_NAMED = 3


_CHECK = "check --teacher-weights, --teacher-normalization and the order of the classes"
_TRAIN = "train it for longer (--set 'teacher_training={epochs: N}')"
TRAIN_AGAIN = "train it for longer (ekd-ray train-teacher --epochs N), or take a larger --teacher"


def judge_accuracy(
    predicted: np.ndarray, labels: np.ndarray, claims: Claims | None = None, cure: str | None = None
) -> list[str]:
    """Warnings, with what to do, about predictions int64 [N] for labels int64 [N].

    Args:
        claims: of a given teacher's file; None of a teacher that the study has trained.
        cure: of one near chance, where its file leaves nothing to check.
    """
    cure = cure or (_CHECK if claims else _TRAIN)
    count = len(labels)
    top1 = float((predicted == labels).mean())
    chance = float(np.bincount(labels).max() / count)
    near, error = is_near_chance(top1, chance, count), chance_error(top1, chance, count)
    found = []
    low, high = _wilson(top1, count)
    if near and high > chance + FAR_BELOW:
        found.append(
            f"it may be no better than chance, which {count} images do not tell ({top1:.1%} of "
            f"them, 95 % interval {low:.1%} to {high:.1%}; one class alone gives {chance:.1%}): "
            f"hold out more (validation_fraction), and {cure}"
        )
    elif near:
        found.append(
            f"it is near chance ({top1:.1%} of {count} validation images; one class alone gives "
            f"{chance:.1%}): {cure}"
        )
    elif claims and claims.accuracy is not None and top1 < claims.accuracy - FAR_BELOW - error:
        found.append(
            f"it has {top1:.1%} here, where its file claims {claims.accuracy:.1%}: check "
            "--teacher-normalization, the data set and the order of the classes"
        )
    return found


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of about 95 % around a share of so many images (Wilson 1927)."""
    spread = DEVIATIONS**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return centre - half, centre + half


def judge_normalizations(
    own: np.ndarray, others: Mapping[str, np.ndarray], labels: np.ndarray
) -> list[str]:
    """A warning if the predictions under another normalisation are much better than the own.

    Args:
        own, labels: int64 [N]; others: by name, int64 [N] of the same images.
    """
    best = max(others, key=lambda name: float((others[name] == labels).mean()), default=None)
    if best is None:
        return []
    right, better = own == labels, others[best] == labels
    gain = float(better.mean() - right.mean())
    differ = int((right != better).sum())  # the images that tell the two apart
    if gain <= MUCH_BETTER or gain * len(labels) <= DEVIATIONS * math.sqrt(differ):
        return []
    return [
        f"its images seem to be normalised in another way: {better.mean():.1%} of {len(labels)} "
        f"under {best!r}, {right.mean():.1%} as it is now: give --teacher-normalization {best}"
    ]


def judge_order(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int, claimed: Sequence[str],
    names: Sequence[str],
) -> list[str]:  # fmt: skip
    """A warning if the teacher's classes are those of the data in another order.

    Args:
        predicted, labels: int64 [N]; claimed: the names in the teacher's file, if any; names: of
            the data's classes.
    """
    moved = [
        f"class {index} is {shorten(there)} there and {shorten(here)} here"
        for index, (there, here) in enumerate(zip(claimed, names, strict=False))
        if there != here
    ]
    cure = "rename the class folders, or give a teacher of this order"
    if moved and sorted(claimed) == sorted(names):
        more = f", and {len(moved) - _MOST_NAMED} more" if len(moved) > _MOST_NAMED else ""
        text = ", ".join(moved[:_MOST_NAMED])
        return [f"its file has the classes in another order ({text}{more}): {cure}"]
    fit, test = slice(0, None, 2), slice(1, None, 2)
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(table, (predicted[fit], labels[fit]), 1)
    meant = np.where(table.any(axis=1), table.argmax(axis=1), -1)
    # Several outputs that mean one class are a bad teacher, and no other order.
    used, first = np.unique(meant, return_index=True)
    renamed = np.full(num_classes, -1)
    renamed[first] = used
    top1 = float((predicted[test] == labels[test]).mean())
    found = float((renamed[predicted[test]] == labels[test]).mean())
    if found < top1 + _PERMUTED:
        return []
    return [
        f"its classes seem to be in another order: {found:.1%} of {labels[test].size} images if "
        f"they are renamed, {top1:.1%} as they are: {cure}"
    ]
