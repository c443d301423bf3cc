"""Candidates of a teacher, as flags and recipes ask for them."""

from __future__ import annotations

import pytest

from ekd_ray.config.candidates import Candidates
from ekd_ray.errors import UserError


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [
        ({}, (3,)),
        ({"candidates": 1, "choose_by": None, "seeds": None}, (3,)),
        ({"candidates": 3}, (3, 4, 5)),
        ({"seeds": [7, 0]}, (7, 0)),
        ({"candidates": 2, "seeds": [7, 0]}, (7, 0)),
    ],
)
def test_seeds_count_from_the_first_unless_they_are_named(settings, seeds):
    assert Candidates.parse(settings, seed=3) == Candidates(seeds=seeds, choose_by="val_nll")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"candidates": 0}, "candidates"),
        ({"candidates": -2}, "candidates"),
        ({"candidates": 1.5}, "candidates"),
        ({"candidates": True}, "candidates"),
        ({"candidates": 10**9}, "candidates"),
        ({"candidates": 3, "seeds": [0, 1]}, "seeds"),
        ({"candidates": 2, "seeds": [0, 1, 2]}, "seeds"),
        ({"candidates": 2, "seeds": [1, 1]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, -1]}, "seeds"),
        ({"seeds": "01"}, "seeds"),
        ({"candidates": 2, "choose_by": "val_nl"}, "choose_by"),
        ({"candidates": 2, "choose_by": "test_top1"}, "choose_by"),
        ({"candidates": 2, "choose_by": ""}, "choose_by"),
    ],
)
def test_others_are_refused_in_one_sentence(settings, key):
    with pytest.raises(UserError) as refused:
        Candidates.parse(settings, seed=0)
    assert refused.value.keys == (key,)
    assert "\n" not in str(refused.value)
