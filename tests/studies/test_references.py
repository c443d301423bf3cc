"""Ranges and points that refer to the pair's own values."""

import pytest

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.studies.recipes import load_recipe

BASE = """
distill: {lr: 0.05, epochs: 8, method: ekd}
space:
  kd_weight: {low: authors.kd_weight / 4, high: authors.kd_weight*4, log: true}
  log_prior: {low: authors.log_prior - 1.5, high: authors.log_prior + 1.5}
  lr: {choices: [distill.lr, distill.lr / 5, 0.2]}
  evidence: {choices: [authors.evidence, exp]}
first_points: [{kd_weight: authors.kd_weight / 2, lr: distill.lr}]
authors: {kd_weight: 4.0, log_prior: -1.0, evidence: relu, ekd_weight: 4.0}
methods:
  kd:
    space: {kd_weight: {low: authors.kd_weight / 10, high: 9}}
    authors: {kd_weight: 0.9}
"""
PAIR = """
extends: base.yaml
distill: {lr: 0.1}
authors: {kd_weight: 6.0}
"""


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "pair.yaml").write_text(PAIR)
    return tmp_path / "pair.yaml"


def test_ranges_follow_the_pair_that_extends_the_recipe(pair):
    values = load_recipe(pair)
    assert values["space"] == {
        "kd_weight": {"low": 1.5, "high": 24.0, "log": True},
        "log_prior": {"low": -2.5, "high": 0.5},
        "lr": {"choices": [0.1, 0.02, 0.2]},
        "evidence": {"choices": ["relu", "exp"]},
    }
    assert values["first_points"] == [{"kd_weight": 3.0, "lr": 0.1}]
    StudyConfig.from_dict(values)


def test_another_method_refers_to_its_own_authors(pair):
    space = load_recipe(pair, "kd")["space"]
    assert space["kd_weight"] == {"low": pytest.approx(0.09), "high": 9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("authors.kd_wieght", "unknown value in authors: 'kd_wieght'"),
        ("distill.kd_weight", "unknown value in distill: 'kd_weight'"),
        ("authors.kd_weight ** 2", "is no reference: write authors.NAME"),
        ("authors.kd_weight / x", "is no reference"),
        ("authors.kd_weight * 2 + 1", "is no reference"),
        ("authors.evidence * 2", "reckons with 'relu', which is no number"),
        ("authors.kd_weight / 0", "divides by zero"),
    ],
)
def test_what_is_no_reference_is_told_with_its_line(text, words, pair):
    base = pair.with_name("base.yaml")
    base.write_text(BASE.replace("authors.kd_weight*4", text))
    with pytest.raises(UserError) as caught:
        load_recipe(pair)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{base}:4: ")


def test_an_ordinary_text_is_left_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("space: {evidence: {choices: [exp, authors]}}")
    assert load_recipe(path)["space"]["evidence"]["choices"] == ["exp", "authors"]
