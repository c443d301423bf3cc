"""Epochs that even the classes out: shares, turns, workers; and the same in a run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_sample_weight

from ekd_ray.data import (
    epoch_batches,
    epoch_order,
    epoch_samples,
    epoch_views,
)
from ekd_ray.data.batches import share_places

COUNTS = (60, 23, 7, 1)


def uneven():
    """(ids [91] in no order, labels [91]) of four classes."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
    return np.random.default_rng(1).permutation(500)[: len(labels)], labels


def drawn(epochs, balance, seed=3):
    ids, labels = uneven()
    return [
        epoch_samples(ids, seed, epoch, labels=labels, class_balance=balance)
        for epoch in range(1, epochs + 1)
    ]


def test_balanced_shares_are_what_balanced_weights_would_give():
    """Weights n / (C n_c) give every class the same sum: its places in an epoch."""
    labels = uneven()[1]
    weights = compute_sample_weight("balanced", labels)
    sums = np.bincount(labels, weights)
    places = share_places(COUNTS, 1.0)
    assert places.sum() == len(labels) and np.abs(places - sums).max() < 1
    root = np.sqrt(COUNTS)
    assert np.abs(share_places(COUNTS, 0.5) - len(labels) * root / root.sum()).max() < 1
    assert share_places(COUNTS, 0.0).tolist() == [*COUNTS]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.floats(0, 1))
def test_every_class_has_a_place_and_none_is_lost(counts, balance):
    places = share_places(counts, balance)
    assert places.sum() == sum(counts) and places.min() >= 1


@pytest.mark.parametrize("balance", [0.4, 1.0])
def test_the_samples_of_a_class_are_drawn_equally_often_each_time_in_another_turn(balance):
    ids, labels = uneven()
    epochs = drawn(7, balance)
    seen = Counter(sample for samples, _ in epochs for sample in samples.tolist())
    for label in range(4):
        times = [seen[sample] for sample in ids[labels == label].tolist()]
        assert max(times) - min(times) <= 1
    pairs = [pair for part in epochs for pair in zip(*map(np.ndarray.tolist, part), strict=True)]
    assert len(set(pairs)) == len(pairs) == 7 * len(ids)


def test_an_epoch_is_a_function_of_seed_and_number():
    ids, labels = uneven()
    later = epoch_samples(ids, 3, 5, labels=labels, class_balance=1.0)
    assert all(map(np.array_equal, drawn(5, 1.0)[4], later))
    mixed = np.random.default_rng(2).permutation(len(ids))  # nor does their order matter to turns
    other = epoch_samples(ids[mixed], 3, 5, labels=labels[mixed], class_balance=1.0)
    assert sorted(zip(*other, strict=True)) == sorted(zip(*later, strict=True))
    assert not np.array_equal(later[0], drawn(5, 1.0, seed=4)[4][0])


def test_as_the_classes_are_nothing_has_changed():
    ids, labels = uneven()
    samples, turns = epoch_samples(ids, 3, 2, labels=labels)
    assert np.array_equal(samples, ids[epoch_order(len(ids), 3, 2)]) and set(turns) == {2}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_balanced_batch(workers):
    ids, labels = uneven()
    options = {"batch_size": 10, "seed": 3, "epoch": 2, "num_views": 50, "strong_pool": 9}
    options |= {"labels": labels, "class_balance": 1.0, "start_step": 4, "world_size": workers}
    parts = [[*epoch_batches(ids, rank=rank, **options)] for rank in range(workers)]
    samples, turns = drawn(2, 1.0)[1]
    views = epoch_views(samples, 3, turns, 50)
    for step, batches in enumerate(zip(*parts, strict=True), start=4):
        for rank, batch in enumerate(batches):
            rows = slice(10 * step + rank, 10 * (step + 1), workers)
            assert np.array_equal(batch.sample_ids, samples[rows])
            assert np.array_equal(batch.view_ids, views[rows])
            assert len(batch.strong_ids) == len(batch.view_ids)


def test_it_needs_the_labels():
    with pytest.raises(ValueError, match="labels"):
        epoch_samples(np.arange(5), 0, 1, class_balance=0.5)
