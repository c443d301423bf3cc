"""`train_subset` is a stratified draw, and its size and the split's are known beforehand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.config import DistillConfig
from ekd_ray.data import load_dataset
from ekd_ray.engine.resolve import split_sizes
from ekd_ray.engine.rundata import split_ids


def subset(size: int, fraction: float, seed: int) -> DistillConfig:
    return DistillConfig(
        dataset="synthetic", train_subset=size, validation_fraction=fraction, split_seed=seed
    )


def test_the_images_of_a_subset_are_drawn_by_class() -> None:
    """Frozen: if this fails, recorded runs train or validate on other images."""
    labels = np.arange(40) % 4
    train, validation = split_ids(subset(8, 0.5, seed=1), labels)
    assert sorted([*train.tolist(), *validation.tolist()]) == [4, 6, 11, 13, 29, 31, 32, 34]
    assert validation.tolist() == [4, 11, 13, 34]


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 2000), st.floats(0.2, 0.5), st.integers(0, 99))
def test_sizes_are_those_of_the_draw(size: int, fraction: float, seed: int) -> None:
    config = subset(size, fraction, seed)
    train, validation = split_ids(config, load_dataset("synthetic", "train").labels)
    assert split_sizes(config) == (len(train), len(validation))
