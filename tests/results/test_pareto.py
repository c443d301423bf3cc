"""Several objectives and constraints: who is ranked, confirmed, and wins."""

import pytest
from report_studies import final, select

from ekd_ray.config import StudyConfig
from ekd_ray.results.leaderboard import Row, rank_contenders


@pytest.fixture
def study(maker):
    """Accuracy against calibration; trial 4 is best at both ends' expense of the bound."""
    found = maker.study(
        objectives=["val_ece"], constraints=["parameters<=100"], confirm_top_k=2, scheduler="none"
    )
    figures = {
        0: (0.50, 0.10, 90),
        1: (0.60, 0.20, 90),
        2: (0.55, 0.15, 90),
        3: (0.54, 0.16, 90),  # behind 2 in both
        4: (0.90, 0.01, 101),  # too large
        5: (0.40, 0.05, 90),
    }
    for number, (top1, ece, size) in figures.items():
        maker.trial(number, [0.1, top1], also={"val_ece": ece, "parameters": size})
    maker.trial(6, [0.99], status="pruned", also={"val_ece": 0.0, "parameters": 1})
    return found


def numbers(records):
    return [record.number for record in records]


def test_what_breaks_a_constraint_comes_last(study):
    assert numbers(study.ranked()) == [1, 2, 3, 0, 5, 4]
    assert numbers(study.feasible()) == [1, 2, 3, 0, 5]


def test_the_front_holds_what_nothing_beats_in_all(study):
    assert numbers(study.pareto()) == [1, 2, 0, 5]


def test_finalists_lie_along_the_front(study):
    assert numbers(study.finalists()) == [1, 5]


def test_with_one_objective_the_best_are_confirmed(maker):
    found = maker.study(confirm_top_k=2)
    for number, value in enumerate([0.3, 0.5, 0.5, 0.4]):
        maker.trial(number, [value])
    assert numbers(found.finalists()) == [1, 2]
    assert numbers(found.pareto()) == [1, 2]


def row(name, val, ece, **values):
    return Row(
        name=name, config=None, val=tuple(val),
        val_metrics=tuple({"val_ece": e} for e in ece), **values,
    )  # fmt: skip


def test_the_winner_keeps_the_constraints_over_the_seeds_if_any_does():
    rows = [
        row("best", [0.9, 0.9], [0.2, 0.3]),
        row("kept", [0.7, 0.7], [0.05, 0.14]),  # 0.095 in the mean
        row("kept too", [0.6, 0.6], [0.01, 0.01]),
        Row(name="none", config=None, test=(0.99,)),
    ]
    assert rank_contenders(rows, StudyConfig())[0].name == "best"
    assert rank_contenders(rows, StudyConfig(constraints=["val_ece<=0.1"]))[0].name == "kept"
    # None keeps it: the nearest.
    assert rank_contenders(rows, StudyConfig(constraints=["val_ece<=0.001"]))[0].name == "kept too"
    assert rank_contenders(rows[3:], StudyConfig()) == []


def test_who_was_given_fewer_seeds_is_out_of_the_race():
    rows = [row("lucky", [0.9, 0.9], [0, 0]), row("stayed", [0.8, 0.8, 0.8], [0, 0, 0])]
    assert rank_contenders(rows, StudyConfig())[0].name == "stayed"
    assert rank_contenders(rows, StudyConfig(metric="val_nll"))[0].name == "stayed"


def test_costs_and_metrics_over_seeds_reach_the_leaderboard(maker):
    study = maker.study(objectives=["parameters"], constraints=["val_ece<=0.3"])
    maker.confirm([
        {**select("trial 1", 1, 0.5), "val_ece": 0.1, "parameters": 77},
        {**select("trial 1", 2, 0.7), "val_ece": 0.3, "parameters": 77},
        {**final("trial 1", 1, 0.6), "parameters": 77},
        {**final("none", 1, 0.4), "parameters": 88},
    ])  # fmt: skip
    winner, none = study.leaderboard()
    assert winner.figures("val_ece") == (0.1, 0.3)
    assert winner.figures("parameters") == (77,) and none.figures("parameters") == (88,)
    assert none.figures("val_ece") == ()
    assert winner.means()["val_ece"] == pytest.approx(0.2)
