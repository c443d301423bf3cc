"""Rows of the teacher's table: logits as float16, whole or the k largest, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from ekd_ray.engine.teacher.table import RowFormat

LARGEST = 65504.0  # of float16
HALF_STEP = 2.0**-11  # relative error of rounding to float16
TINY = 2.0**-25  # half the spacing of its subnormal numbers


def draw(count=6, classes=10, scale=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, classes, generator=generator)


finite = st.floats(-1e6, 1e6, width=32)


# All classes


@settings(max_examples=200, deadline=None)
@given(row=st.lists(finite, min_size=2, max_size=30))
def test_a_dense_row_is_numpys_float16(row):
    logits = torch.tensor([row])
    found = RowFormat(num_classes=len(row)).rounded(logits)
    clamped = np.clip(np.float32(row), -LARGEST, LARGEST)
    assert found.dtype == torch.float32
    assert found[0].tolist() == clamped.astype(np.float16).astype(np.float32).tolist()
    assert (np.abs(found[0].numpy() - clamped) <= HALF_STEP * np.abs(clamped) + TINY).all()


@pytest.mark.parametrize("top", [None, 3])
def test_what_float16_cannot_hold_becomes_its_largest(top):
    logits = torch.tensor([[7e4, -7e4, torch.inf, -torch.inf, 65519.0, 0.0]])
    found = RowFormat(num_classes=6, top=top).rounded(logits)[0]
    assert found[[0, 2]].tolist() == [LARGEST, LARGEST]
    assert found.isfinite().all()
    if top is None:
        assert found[[1, 3, 4]].tolist() == [-LARGEST, -LARGEST, LARGEST]


@pytest.mark.parametrize("top", [None, 2])
def test_the_layout_and_type_of_the_logits_do_not_matter(top):
    row_format, logits = RowFormat(num_classes=10, top=top), draw().bfloat16()
    expected = row_format.encode(logits.float())
    assert torch.equal(row_format.encode(logits), expected)
    assert torch.equal(row_format.encode(logits.t().contiguous().t()), expected)
    assert torch.equal(row_format.decode(expected.t().contiguous().t()), row_format.rounded(logits))


# The k largest


def exact_rest(row, top):
    """One logit for all the classes but the `top` largest, with their mass, in float64."""
    rest = np.sort(row.astype(np.float64))[:-top]
    return logsumexp(rest) - np.log(len(rest))


@pytest.mark.parametrize(("classes", "top"), [(10, 1), (10, 9), (1000, 1), (1000, 32), (40_000, 5)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 300.0])
def test_the_largest_are_exact_and_the_rest_keeps_its_mass(classes, top, scale):
    logits = draw(4, classes, scale, seed=classes + top)
    found = RowFormat(num_classes=classes, top=top).rounded(logits).numpy()
    for row, mine in zip(logits.numpy(), found, strict=True):
        largest = np.argsort(row)[-top:]
        half = row[largest].astype(np.float16).astype(np.float32)
        assert (mine[largest] == half).all()
        rest = np.delete(mine, largest)
        assert (rest == rest[0]).all()
        expected = exact_rest(row, top)
        # float16 of the stored value, float32 of the sum.
        bound = (HALF_STEP + 1e-6) * abs(expected) + 1e-6
        assert abs(float(rest[0]) - expected) <= bound


@pytest.mark.parametrize("place", [0, 32_767, 32_768, 39_999])
def test_classes_beyond_int16_come_back(place):
    logits = torch.zeros(1, 40_000)
    logits[0, place] = 7.0
    found = RowFormat(num_classes=40_000, top=1).rounded(logits)[0]
    assert found.argmax() == place
    assert found[place] == 7.0
    assert (found != 7.0).sum() == 39_999


def test_a_rest_without_mass_is_finite():
    """The kept logits lie so far above that the others' exponentials are 0 beside them."""
    logits = torch.full((1, 50), -1e4)
    logits[0, 7] = 1e4
    found = RowFormat(num_classes=50, top=1).rounded(logits)[0]
    assert found[7] == 1e4
    assert (found[torch.arange(50) != 7] == -1e4).all()


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.one_of(finite, st.floats(-10, 10, width=32)), min_size=3, max_size=40),
    top=st.one_of(st.none(), st.integers(1, 2)),
)
def test_rounding_twice_is_rounding_once(row, top):
    row_format = RowFormat(num_classes=len(row), top=top)
    once = row_format.rounded(torch.tensor([row]))
    assert torch.equal(row_format.rounded(once), once)
