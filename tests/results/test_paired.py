"""Paired differences, against scipy's paired t-test."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ekd_ray.results.paired import clearly_worse, paired_difference, share_interval

VALUES = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 4))


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=3, max_size=8))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    assert found.n == len(pairs)
    differences = [a - b for a, b in pairs]
    if max(differences) - min(differences) < 1e-9:  # scipy divides by their spread
        assert found.low is None or found.low == pytest.approx(found.mean, abs=1e-9)
        return
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.low <= found.mean <= found.high


@pytest.mark.parametrize("n", [1, 2])
def test_few_seeds_have_no_interval(n):
    found = paired_difference([0.6] * n, [0.5] * n)
    assert (found.n, found.low, found.high) == (n, None, None)
    assert found.mean == pytest.approx(0.1)


def test_equal_differences_show_nothing():
    found = paired_difference([0.75, 0.5, 0.25], [0.5, 0.25, 0.0])
    assert (found.mean, found.low, found.sign) == (0.25, None, None)


@pytest.mark.parametrize(("first", "second"), [([0.1], []), ([], []), ([0.1, 0.2], [0.1])])
def test_seeds_that_do_not_match_are_no_pairs(first, second):
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired_difference(first, second)


# Who is clearly worse


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=6))
def test_of_two_it_is_the_one_sided_paired_t_test(pairs):
    first, second = (list(values) for values in zip(*pairs, strict=True))
    differences = np.subtract(first, second)
    found = clearly_worse({"first": first, "second": second})
    if np.ptp(differences) < 1e-9:
        assert found == set()
        return
    lower = stats.ttest_rel(first, second, alternative="less").pvalue
    upper = stats.ttest_rel(first, second, alternative="greater").pvalue
    if min(abs(lower - 0.05), abs(upper - 0.05)) > 1e-6:
        assert found == ({"first"} if lower < 0.05 else {"second"} if upper < 0.05 else set())


def test_the_spread_is_shared_by_all():
    """Two seeds of two configurations need a huge gap; four share three times the evidence."""
    scores = {"a": [0.60, 0.70], "b": [0.61, 0.69], "c": [0.60, 0.71], "d": [0.57, 0.65]}
    assert clearly_worse({name: scores[name] for name in ("a", "d")}) == set()
    assert clearly_worse(scores) == {"d"}


def test_one_seed_or_equal_scores_say_nothing():
    assert clearly_worse({"a": [0.9], "b": [0.1]}) == set()
    assert clearly_worse({"a": [0.9, 0.8], "b": [0.1, 0.0]}) == set()
    assert clearly_worse({"a": [0.9, 0.8]}) == set()


def test_equals_are_rarely_called_worse():
    """The best of the rest of five equal configurations must survive in most studies."""
    rng = np.random.default_rng(0)
    dropped = [
        len(clearly_worse({name: rng.normal(size=3) for name in "abcde"})) for _ in range(300)
    ]
    # The best is the best by chance, so that this is more than 5 %.
    assert np.mean(dropped) / 4 < 0.2


def test_different_numbers_of_seeds_are_refused():
    with pytest.raises(ValueError, match=r"inhomogeneous|as many"):
        clearly_worse({"a": [0.1, 0.2], "b": [0.1]})


def test_the_interval_of_a_share_ends_where_shares_end():
    low, high = share_interval([0.77, 0.95, 0.96])
    assert 0.5 < low < 0.77 and high == 1.0
    assert share_interval([0.01, 0.02, 0.09])[0] == 0.0
    assert share_interval([0.5, 0.6]) is None
