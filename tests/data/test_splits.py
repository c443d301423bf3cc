"""Splits are exact, stratified, and depend on the seed alone."""

import itertools

import numpy as np
import pytest
from counter_oracle import counter_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.data import held_out_size, stratified_split, stratified_subset
from ekd_ray.data.counter import STREAM_SPLIT, STREAM_SUBSET
from ekd_ray.errors import UserError

label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=150)


@settings(deadline=None)
@given(label_lists, st.floats(0, 0.999), st.integers(0, 2**32))
def test_split_invariants(labels, fraction, seed):
    values = np.array(labels)
    sizes = {c: labels.count(c) for c in set(labels)}
    several = [c for c, size in sizes.items() if size >= 2]
    total = round(len(labels) * fraction)
    assert held_out_size(len(labels), fraction) == total
    possible = len(several) <= total <= sum(sizes[c] - 1 for c in several)
    if fraction > 0 and not possible:
        with pytest.raises(UserError, match="fraction"):
            stratified_split(values, fraction, seed)
        return
    train, held = stratified_split(values, fraction, seed)
    assert train.dtype == held.dtype == np.int64
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()
    assert len(held) == total
    if fraction > 0:
        for c in several:
            assert (values[train] == c).any()
            assert (values[held] == c).any()
    again = stratified_split(values, fraction, seed)
    np.testing.assert_array_equal(again[1], held)


def test_balanced_classes_split_exactly_and_by_seed():
    labels = np.tile(np.arange(10), 500)
    state = np.random.get_state()[1].copy()
    train, held = stratified_split(labels, 0.1, seed=4)
    assert np.bincount(labels[held]).tolist() == [50] * 10
    assert np.bincount(labels[train]).tolist() == [450] * 10
    assert not np.array_equal(held, stratified_split(labels, 0.1, seed=5)[1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    # 100 * 0.29 is 28.999999999999996
    assert len(stratified_split(np.zeros(100, int), 0.29, 0)[1]) == 29


# By hand, from labels that repeat 0, 1, 2, 3: the samples of each class with the smallest bits.
FROZEN_SPLIT = [11, 17, 24, 30, 31, 32, 33, 34]
FROZEN_SUBSET = [4, 6, 11, 13, 29, 31, 32, 34]


def smallest_bits(stream, seed):
    """The two samples of each class with the smallest bits, of 40 in classes 0, 1, 2, 3, 0, ..."""
    bits = [counter_oracle(seed, stream, i) for i in range(40)]
    classes = [sorted(range(c, 40, 4), key=bits.__getitem__)[:2] for c in range(4)]
    return sorted(itertools.chain(*classes))


def test_frozen_split():
    """If this fails, recorded runs validate on other images."""
    held = stratified_split(np.arange(40) % 4, 0.2, seed=1)[1]
    assert held.tolist() == FROZEN_SPLIT == smallest_bits(STREAM_SPLIT, 1)


def test_frozen_subset_of_its_own_stream():
    """If this fails, recorded runs train on other images.

    A subset from the stream of the split would be the images that are held out.
    """
    index = stratified_subset(np.arange(40) % 4, 8, seed=1)
    assert index.tolist() == FROZEN_SUBSET == smallest_bits(STREAM_SUBSET, 1)
    assert STREAM_SUBSET != STREAM_SPLIT


def test_a_subset_is_drawn_and_not_the_first_samples():
    labels = np.arange(5000) % 10
    index = stratified_subset(labels, 500, seed=0)
    assert np.bincount(labels[index]).tolist() == [50] * 10
    # Uniform over the data set: the mean of 500 positions is within 5 standard deviations.
    assert abs(index.mean() - 2499.5) < 5 * 5000 / np.sqrt(12 * 500)
    held = stratified_split(labels, 0.1, seed=0)[1]
    assert len(np.intersect1d(index, held)) < 100  # 50 expected of unrelated draws


def test_bad_fractions():
    labels = np.arange(20) % 2
    for fraction in (-0.1, 1.0, 2, float("nan")):
        with pytest.raises(UserError, match=r"\[0, 1\)"):
            stratified_split(labels, fraction, 0)
    with pytest.raises(UserError, match="must be 2 to 18"):
        stratified_split(labels, 0.05, 0)
    with pytest.raises(ValueError, match="integers"):
        stratified_split(np.zeros((2, 2)), 0.5, 0)
    train, held = stratified_split(labels, 0, 0)
    assert (len(train), len(held)) == (20, 0)


@settings(deadline=None)
@given(label_lists, st.integers(0, 160), st.integers(0, 99))
def test_subset_invariants(labels, size, seed):
    values = np.array(labels)
    classes = set(labels)
    if size > len(labels) or size < len(classes):
        with pytest.raises(UserError, match=r"subset"):
            stratified_subset(values, size, seed)
        return
    index = stratified_subset(values, size, seed)
    assert index.dtype == np.int64
    assert len(index) == size
    assert (np.diff(index) > 0).all()
    assert set(values[index].tolist()) == classes


def test_subset_is_proportional():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    assert np.bincount(labels[stratified_subset(labels, 50, 3)]).tolist() == [30, 15, 5]
    assert not np.array_equal(stratified_subset(labels, 50, 3), stratified_subset(labels, 50, 4))
