"""Constraints and the Pareto front, against Optuna's own."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.config import StudyConfig
from ekd_ray.config.targets import (
    Constraint,
    evenly_spaced,
    pareto_front,
    total_violation,
)
from ekd_ray.errors import UserError

VALUES = st.integers(0, 5).map(float)
OBJECTIVES = ("val_top1", "val_ece", "parameters")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=12))
def test_the_front_is_optunas(points):
    rows = [dict(zip(OBJECTIVES, point, strict=True)) for point in points]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"])
    study.add_trials([optuna.trial.create_trial(values=list(point)) for point in points])
    assert pareto_front(rows, OBJECTIVES) == [trial.number for trial in study.best_trials]


def test_a_row_that_lacks_an_objective_is_on_no_front():
    rows = [{"val_top1": 0.9, "val_ece": None}, {"val_top1": 0.5, "val_ece": 0.1}, {}]
    assert pareto_front(rows, ("val_top1", "val_ece")) == [1]


@pytest.mark.parametrize(
    ("text", "row", "violation"),
    [
        ("val_ece<=0.05", {"val_ece": 0.04}, -0.01),
        (" val_ece <= 5e-2 ", {"val_ece": 0.05}, 0.0),
        ("val_top1>=0.6", {"val_top1": 0.5}, 0.1),
        ("val_top1>=0.6", {"val_top1": 0.7}, -0.1),
        ("parameters<=1000", {"parameters": 1500}, 500),
        ("val_ece<=0.05", {}, float("inf")),
    ],
)
def test_by_how_much_a_constraint_is_broken(text, row, violation):
    assert Constraint.parse(text).violation(row) == pytest.approx(violation)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_constraint_as_text_is_the_constraint(bound):
    constraint = Constraint(metric="latency_ms", sense="<=", bound=bound)
    assert Constraint.parse(constraint.text) == constraint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_ece", "METRIC<=NUMBER or METRIC>=NUMBER, got 'val_ece'"),
        ("val_ece<0.1", "got 'val_ece<0.1'"),
        ("val_ece<=low", "got 'val_ece<=low'"),
        ("val_ece<=nan", "got 'val_ece<=nan'"),
        ("val_ecce<=0.1", "unknown metric in a constraint: 'val_ecce'. Did you mean 'val_ece'"),
        ("test_top1>=0.9", "unknown metric in a constraint: 'test_top1'"),
    ],
)
def test_what_is_no_constraint(text, words):
    with pytest.raises(UserError, match=words):
        StudyConfig(constraints=(text,))


def test_violations_add_up_in_parts_of_their_bounds():
    bounds = [Constraint.parse("val_ece<=0.1"), Constraint.parse("parameters<=1000")]
    assert total_violation(bounds, {"val_ece": 0.15, "parameters": 1100}) == pytest.approx(0.6)
    assert total_violation(bounds, {"val_ece": 0.01, "parameters": 1000}) == 0.0


@given(st.integers(1, 20), st.integers(1, 20))
def test_finalists_lie_evenly_along_the_front_with_both_its_ends(members, count):
    chosen = evenly_spaced(range(members), count)
    assert len(chosen) == min(members, count)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == members - 1


# In the study's configuration


def test_a_study_may_have_further_objectives():
    config = StudyConfig(objectives=["val_ece", "latency_ms"], constraints=["parameters<=1e6"])
    assert config.all_objectives == ("val_top1", "val_ece", "latency_ms")
    assert config.directions == ("max", "min", "min")
    assert config.watched == ("val_top1", "val_ece", "latency_ms", "parameters")
    assert config.costs == ("latency_ms", "parameters")
    assert config.scheduler == "none", "no single metric may stop a trial"
    assert StudyConfig().scheduler == "asha"
    assert StudyConfig(objectives=["val_ece"], scheduler="asha").scheduler == "asha"


@pytest.mark.parametrize("objectives", [["val_top1"], ["val_ece", "val_ece"]])
def test_objectives_differ(objectives):
    with pytest.raises(UserError, match=r"objectives must differ from metric \(val_top1\)"):
        StudyConfig(objectives=objectives)
