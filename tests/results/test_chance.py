"""A winner that may be no better than naming one class."""

from __future__ import annotations

import json

import pytest
from report_studies import finished
from scipy.optimize import brentq
from scipy.stats import binom

from ekd_ray.results import Study
from ekd_ray.results.chance import warn_of_chance


def metrics(top1, counts=(18, 12, 12, 8)):
    return {
        "classes": [{"name": str(n), "images": c, "recall": 0.5} for n, c in enumerate(counts)],
        "test": {"test_top1": {"mean": top1, "sd": 0.0, "n": 2}},
    }


def test_the_bound_is_that_of_the_largest_class():
    chance, images = 18 / 50, 50
    # Near one half the accuracy itself is the less sure one of the two.
    bound = brentq(lambda top1: top1 - chance - 2 * binom.std(images, top1) / images, 0.4, 0.6)
    assert warn_of_chance(metrics(bound + 1e-3)) == ""
    text = warn_of_chance(metrics(bound - 1e-3))
    assert "50 test pictures" in text and "36.0%" in text
    assert "may be no better than chance" in text
    assert warn_of_chance(metrics(0.0)), "worse than chance, too"
    assert warn_of_chance(metrics(float("nan")))
    assert warn_of_chance({**metrics(0.1), "classes": []}) == ""


@pytest.mark.parametrize("top1", [0.38, 0.9])
def test_a_study_warns_of_its_winner(maker, top1):
    study = finished(maker)
    (study.path / "best" / "metrics.json").write_text(json.dumps(metrics(top1)))
    said = [text for text in Study.load(study.path).warnings() if "chance" in text]
    assert len(said) == (top1 < 0.5)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"classes": [1], "test": {}}',
    '{"classes": [{"images": 0}], "test": {"test_top1": {"mean": 0.1}}}',
])  # fmt: skip
def test_a_damaged_bundle_is_said_where_it_is_opened(maker, text):
    study = finished(maker)
    (study.path / "best" / "metrics.json").write_text(text)
    assert not [text for text in Study.load(study.path).warnings() if "chance" in text]
