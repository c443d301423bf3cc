"""The samples of every step and their views, drawn by counters: any step can be replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import (
    STREAM_CLASS,
    STREAM_ORDER,
    STREAM_STRONG_ID,
    STREAM_VIEW,
    Int64Array,
    bounded,
    counter_hash,
)
from ekd_ray.errors import UserError


@dataclass(frozen=True, eq=False)
class Batch:
    """One worker's part of one step: which samples, and which view of each (int64 [B]).

    `strong_ids` names a strong view of each as well (int64 [B]) where a method needs one.
    """

    step: int
    sample_ids: Int64Array
    view_ids: Int64Array
    strong_ids: Int64Array | None = None


def epoch_order(n: int, seed: int, epoch: int) -> Int64Array:
    """The order of positions 0..n-1 in `epoch`: a permutation, int64 [n]."""
    bits = counter_hash(seed, STREAM_ORDER, epoch, np.arange(n))
    return np.argsort(bits, kind="stable").astype(np.int64)


def epoch_samples(
    sample_ids: npt.ArrayLike,
    seed: int,
    epoch: int,
    *,
    labels: npt.ArrayLike | None = None,
    class_balance: float = 0.0,
) -> tuple[Int64Array, Int64Array]:
    """The samples of `epoch` in their order, and the turn in which each is drawn, int64 [N] both.

    As the classes are, every sample comes once and its turn is the epoch. With `class_balance` b,
    a class of n samples has a share of the N places that is proportional to n^(1 - b): with 1 all
    classes have equal ones. A class is gone through in turns, each a permutation of its samples,
    and goes on in the next epoch where this one leaves it: so all its samples are drawn equally
    often, and one that is drawn twice in an epoch is drawn in two turns, with two views.

    Args:
        sample_ids: int64 [N], which index the data set; labels: int64 [N], their classes, needed
            where `class_balance` is above 0.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    order = epoch_order(len(ids), seed, epoch)
    if not class_balance:
        return ids[order], np.full(len(ids), epoch)
    if labels is None:
        raise ValueError(f"class_balance {class_balance} needs the labels of the samples")
    classes, counts = np.unique(labels, return_counts=True)
    places = share_places(counts, class_balance)
    drawn, turns = [], []
    for label, wanted in zip(classes, places, strict=True):
        members = np.sort(ids[np.asarray(labels) == label])
        first = (epoch - 1) * wanted
        at = np.arange(first, first + wanted)
        turn = at // len(members)
        rows = np.unique(turn)
        bits = counter_hash(seed, STREAM_CLASS, rows[:, None], members)
        permuted = members[np.argsort(bits, axis=1, kind="stable")]
        drawn.append(permuted[turn - rows[:1], at % len(members)])
        turns.append(turn + 1)
    return np.concatenate(drawn)[order], np.concatenate(turns)[order]


def share_places(counts: npt.ArrayLike, class_balance: float) -> Int64Array:
    """The places of each class in an epoch, int64 [C], as many as samples: largest remainders."""
    counts = np.asarray(counts)
    shares = counts ** (1.0 - class_balance)
    exact = counts.sum() * shares / shares.sum()
    places = np.floor(exact).astype(np.int64)
    left = int(counts.sum() - places.sum())
    places[np.argsort(places - exact, kind="stable")[:left]] += 1
    return places


def epoch_views(
    sample_ids: npt.ArrayLike, seed: int, epoch: npt.ArrayLike, num_views: int
) -> Int64Array:
    """The view of each sample in `epoch`: int64 in [0, num_views), shaped like `sample_ids`.

    `sample_ids` index the data set (not a split of it), so a sample's view does not depend on
    what else is trained on, nor on the batch it falls in. In the place of the epoch may stand the
    turn of each sample (int64, see `epoch_samples`).
    """
    return bounded(counter_hash(seed, STREAM_VIEW, epoch, sample_ids), num_views)


def epoch_strong_ids(
    sample_ids: npt.ArrayLike, seed: int, epoch: npt.ArrayLike, strong_pool: int
) -> Int64Array:
    """The strong view of each sample, as `epoch_views`: int64 in [0, strong_pool)."""
    return bounded(counter_hash(seed, STREAM_STRONG_ID, epoch, sample_ids), strong_pool)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full batches in `n` samples; raises UserError if there is none."""
    if batch_size < 1:
        raise UserError(f"batch_size must be >= 1, got {batch_size}.")
    if n < batch_size:
        raise UserError(
            f"{n} training samples do not fill one batch of {batch_size}: add pictures, or "
            f"choose a batch_size <= {n} (--set batch_size=...)."
        )
    return n // batch_size


def epoch_batches(
    sample_ids: npt.ArrayLike,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    num_views: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    strong_pool: int | None = None,
    labels: npt.ArrayLike | None = None,
    class_balance: float = 0.0,
) -> Iterator[Batch]:
    """The batches of one epoch, from `start_step` on, for worker `rank` of `world_size`.

    `sample_ids` (int64 [N]) index the data set; `batch_size` counts all workers. Global batch
    s holds positions s * batch_size ... of the epoch's order, and a worker takes every
    world_size-th of its rows: together the workers see what one alone would, in shares that
    differ by at most one row. An incomplete last batch is dropped. With `strong_pool`, every
    sample gets a strong id in [0, strong_pool) too, drawn apart from its view. `labels`
    (int64 [N]) and `class_balance`: see `epoch_samples`. Raises UserError, at the call, for a
    batch size that exceeds N or is less than one row for each worker.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    steps = steps_per_epoch(len(ids), batch_size)
    if batch_size < world_size:
        raise UserError(
            f"a batch of {batch_size} has no row for each of {world_size} workers; choose a "
            f"larger batch_size or <= {batch_size} workers."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must lie in 0..{steps}, got {start_step}")
    order, turns = epoch_samples(ids, seed, epoch, labels=labels, class_balance=class_balance)

    def batches() -> Iterator[Batch]:
        for step in range(start_step, steps):
            rows = slice(step * batch_size + rank, (step + 1) * batch_size, world_size)
            own, turn, strong = order[rows], turns[rows], None
            if strong_pool is not None:
                strong = epoch_strong_ids(own, seed, turn, strong_pool)
            yield Batch(step, own, epoch_views(own, seed, turn, num_views), strong)

    return batches()
