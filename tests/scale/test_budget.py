"""When a search stops by itself."""

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.budget import Budget, check_budget, expected_improvement
from ekd_ray.scale.space import Space

SPACE = {"lr": {"low": 0.001, "high": 0.1, "log": True}, "momentum": {"low": 0.5, "high": 0.99}}


def budget(space=SPACE, **settings):
    config = StudyConfig(distill=DistillConfig(method="none"), **settings)
    return Budget(config, Space(space))


def rows(epochs, seconds):
    return [{"epoch": epoch, "seconds": seconds} for epoch in range(1, epochs + 1)]


def test_epochs_of_all_trials_count_once():
    found = budget(budget_epochs=7)
    found.record(0, rows(3, 1.0))
    for row in rows(3, 1.0):
        found.add(1, row)
    assert not found.spent([])
    found.record(1, rows(3, 1.0))
    assert not found.spent([])
    found.add(2, {"epoch": 1})
    assert found.spent([])


def test_gpu_hours_are_those_of_all_workers():
    found = budget(budget_gpu_hours=1.0, gpus_per_trial=0.5, workers_per_trial=2)
    found.record(0, rows(3, 1190.0))
    assert not found.spent([])
    found.record(0, rows(3, 1200.0))
    assert found.spent([])


def test_gpu_hours_need_a_gpu():
    with pytest.raises(UserError, match=r"budget_gpu_hours needs .* got gpus_per_trial 0"):
        check_budget(StudyConfig(budget_gpu_hours=1.0))


def test_an_improvement_is_of_one_metric():
    with pytest.raises(UserError, match=r"stop_below .* this study has 2 objectives"):
        check_budget(StudyConfig(stop_below=0.01, objectives=["val_ece"]))


# Expected improvement


def bowl(points):
    return -((points - 0.3) ** 2).sum(axis=1)


def grid(side):
    axis = np.linspace(0, 1, side)
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def test_what_is_known_well_promises_little():
    """A smooth bowl seen everywhere, against one of which a corner was seen."""
    everywhere = expected_improvement(grid(7), bowl(grid(7)), seed=0)
    corner = 0.5 + 0.5 * grid(7)
    # From the corner the way goes up towards 0.3, where the bowl gains 0.08.
    assert expected_improvement(corner, bowl(corner), seed=0) > 0.02
    assert everywhere < 0.005


def test_improvement_has_the_unit_of_the_values():
    points = np.random.default_rng(0).random((12, 2))
    one = expected_improvement(points, bowl(points), seed=0)
    ten = expected_improvement(points, 10 * bowl(points) + 3, seed=0)
    assert ten == pytest.approx(10 * one, rel=1e-3)


def test_noise_is_no_improvement():
    """Thirty scores of one and the same quality: another lucky one would be no better."""
    rng = np.random.default_rng(1)
    found = expected_improvement(rng.random((30, 2)), rng.normal(0.5, 0.01, 30), seed=0)
    assert found < 0.005


LINEAR = {"lr": {"low": 0.0, "high": 1.0}, "momentum": {"low": 0.0, "high": 1.0}}


def trials(points, values):
    """Ended trials of a space that is the unit square."""
    unit = FloatDistribution(0.0, 1.0)
    return [
        create_trial(
            state=TrialState.COMPLETE, value=value,
            params=dict(zip(LINEAR, map(float, point), strict=True)),
            distributions=dict.fromkeys(LINEAR, unit),
        )
        for point, value in zip(points, values, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(("metric", "sign"), [("val_top1", 1), ("val_nll", -1)])
def test_a_search_ends_once_nothing_is_to_be_gained(metric, sign):
    known = trials(grid(5), sign * bowl(grid(5)))
    assert budget(LINEAR, stop_below=0.03, metric=metric).spent(known)
    # Nine are too few to judge by.
    assert not budget(LINEAR, stop_below=0.03, metric=metric).spent(known[:9])
    corner = trials(0.5 + 0.5 * grid(5), sign * bowl(0.5 + 0.5 * grid(5)))
    assert not budget(LINEAR, stop_below=0.01, metric=metric).spent(corner)


def test_places_in_a_space():
    space = Space({
        **SPACE, "optimizer": {"choices": ["sgd", "adamw"]},
        "nesterov": {"choices": [True, False], "when": {"optimizer": ["sgd"]}},
    })  # fmt: skip
    found = space.unit({"lr": 0.01, "momentum": 0.99, "optimizer": "adamw"})
    assert found == pytest.approx([0.5, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert space.unit({"lr": 0.1})[:2] == pytest.approx([1.0, 0.5])
