"""Paired differences, against scipy's paired t-test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ekd_ray.results.paired import paired_difference

VALUES = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 4))


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=3, max_size=8))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    assert found.n == len(pairs)
    differences = [a - b for a, b in pairs]
    if max(differences) - min(differences) < 1e-9:  # scipy divides by their spread
        assert found.low == pytest.approx(found.mean, abs=1e-9)
        return
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.low <= found.mean <= found.high


def test_what_both_sides_share_drops_out():
    """Seeds that differ by 10 points, a method that is better by one in each."""
    found = paired_difference([0.61, 0.51, 0.71], [0.60, 0.50, 0.70])
    assert (found.mean, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01))


@pytest.mark.parametrize("n", [1, 2])
def test_few_seeds_have_no_interval(n):
    found = paired_difference([0.6] * n, [0.5] * n)
    assert (found.n, found.low, found.high) == (n, None, None)
    assert found.mean == pytest.approx(0.1)


@pytest.mark.parametrize(("first", "second"), [([0.1], []), ([], []), ([0.1, 0.2], [0.1])])
def test_seeds_that_do_not_match_are_no_pairs(first, second):
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired_difference(first, second)
