"""The sampler that learns from trials of any length: what it expects, and where it looks."""

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from ekd_ray.scale.curve_sampler import CurveSampler, promised
from ekd_ray.scale.space import Space
from ekd_ray.scale.surrogate import fitted

EPOCHS = 9


# What a curve promises


def test_a_whole_curve_promises_its_last_value_and_no_doubt():
    values, errors = promised([[0.1] * 8 + [0.7], [0.5] * 9], EPOCHS)
    assert values.tolist() == [0.7, 0.5] and errors.tolist() == [0.0, 0.0]


def test_a_stopped_curve_promises_what_least_squares_says():
    """The final score is twice the mean of the first two epochs plus noise: numpy's fit."""
    rng = np.random.default_rng(0)
    early = rng.random((12, 2))
    finals = 2 * early.mean(axis=1) + 0.1 + rng.normal(0, 0.02, 12)
    whole = [[*pair, *[0.0] * 6, final] for pair, final in zip(early, finals, strict=True)]
    slope, offset = np.polyfit(early.mean(axis=1), finals, 1)
    values, errors = promised([*whole, [0.3, 0.5]], EPOCHS)
    assert values[-1] == pytest.approx(offset + slope * 0.4)
    left = finals - offset - slope * early.mean(axis=1)
    assert errors[-1] == pytest.approx(np.sqrt((left**2).sum() / 10))


def test_who_does_better_early_is_not_expected_to_end_worse():
    whole = [[early, *[0.0] * 7, 1 - early] for early in (0.1, 0.2, 0.3, 0.4, 0.5)]
    values, _ = promised([*whole, [0.0], [0.9]], EPOCHS)
    assert values[-1] == values[-2] == pytest.approx(0.7)


def test_with_few_whole_curves_a_stopped_one_is_shifted():
    whole = [[0.2, *[0.0] * 7, 0.6], [0.4, *[0.0] * 7, 0.8]]
    values, _ = promised([*whole, [0.1]], EPOCHS)
    assert values[-1] == pytest.approx(0.5)


# The process


def test_what_is_uncertain_weighs_less():
    points = np.linspace(0, 1, 11)[:, None]
    values = points[:, 0].copy()
    values[5] = 3.0
    doubts = np.where(np.arange(11) == 5, 50.0, 0.0)
    certain, uncertain = (
        fitted(points, values, seed=0, errors=errors).predict(points[5:6])[0][0]
        for errors in (np.zeros(11), doubts)
    )
    assert uncertain == pytest.approx(0.5, abs=0.05)
    assert certain > uncertain + 0.1


def test_a_point_that_is_believed_promises_less():
    rng = np.random.default_rng(0)
    points = rng.random((15, 2))
    values = -((points - 0.4) ** 2).sum(axis=1)
    surrogate = fitted(points, values, seed=0)
    here = np.array([[0.95, 0.05]])
    before = surrogate.predict(here)
    believed = surrogate.believing(points, values, np.zeros(15), here).predict(here)
    assert believed[0] == pytest.approx(before[0], abs=0.02)
    assert believed[1] < before[1]


def test_equal_values_have_no_process():
    assert fitted(np.array([[0.1], [0.9]]), np.array([0.5, 0.5]), seed=0) is None


# Where it looks

FLOATS = {"lr": {"low": 0.001, "high": 0.1, "log": True}, "momentum": {"low": 0.5, "high": 0.99}}
BRANCHES = {
    "optimizer": {"choices": ["sgd", "adamw"]},
    "momentum": {"low": 0.5, "high": 0.99, "when": {"optimizer": ["sgd"]}},
    "batch_size": {"low": 16, "high": 64, "step": 16},
}


def study_of(space, direction="maximize", startup=4):
    sampler = CurveSampler(Space(space), epochs=EPOCHS, startup=startup, seed=0)
    return optuna.create_study(direction=direction, sampler=sampler)


def told(study, space, params, curve, state=TrialState.COMPLETE):
    distributions = {name: Space(space).parameters[name].distribution() for name in params}
    study.add_trial(
        create_trial(
            state=state, params=params, distributions=distributions,
            value=curve[-1] if state == TrialState.COMPLETE else None,
            intermediate_values=dict(enumerate(curve, start=1)),
        )
    )  # fmt: skip


def test_it_learns_from_trials_that_were_stopped():
    """Whole trials say nothing of momentum; stopped ones say that it should be low."""
    study = study_of(FLOATS)
    for lr in (0.003, 0.01, 0.03, 0.09, 0.002):
        told(study, FLOATS, {"lr": lr, "momentum": 0.9}, [0.5 - 0.1 * abs(np.log(lr / 0.01))] * 9)
    for momentum in (0.95, 0.85, 0.75, 0.65, 0.55):
        score = 0.5 + (0.9 - momentum)
        told(study, FLOATS, {"lr": 0.01, "momentum": momentum}, [score] * 3, TrialState.PRUNED)
    assert Space(FLOATS)(study.ask())["momentum"] < 0.65


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_it_goes_where_the_metric_is_better(direction, sign):
    study = study_of(FLOATS, direction)
    for place in np.linspace(0.02, 0.98, 12):
        lr = Space(FLOATS).parameters["lr"].at(place)
        told(study, FLOATS, {"lr": lr, "momentum": 0.7}, [sign * -((place - 0.8) ** 2)] * 9)
    found = Space(FLOATS)(study.ask())
    assert 0.6 < Space(FLOATS).parameters["lr"].place(found["lr"]) < 1.0


def test_a_failed_trial_keeps_it_away():
    study = study_of(FLOATS)
    for place in (0.1, 0.3, 0.5, 0.7):
        lr = Space(FLOATS).parameters["lr"].at(place)
        told(study, FLOATS, {"lr": lr, "momentum": 0.7}, [place] * 9)
    for momentum in (0.55, 0.7, 0.85, 0.95):
        told(study, FLOATS, {"lr": 0.09, "momentum": momentum}, [0.1], TrialState.FAIL)
    found = Space(FLOATS)(study.ask())
    assert Space(FLOATS).parameters["lr"].place(found["lr"]) < 0.95


def test_two_workers_look_at_different_places():
    study = study_of(FLOATS)
    for place in np.linspace(0.05, 0.95, 8):
        lr = Space(FLOATS).parameters["lr"].at(place)
        told(study, FLOATS, {"lr": lr, "momentum": 0.5 + place / 2.1}, [place] * 9)
    first, second = (np.array(Space(FLOATS).unit(Space(FLOATS)(study.ask()))) for _ in range(2))
    assert np.abs(first - second).max() > 0.01


def test_branches_get_what_their_conditions_ask_for():
    study = study_of(BRANCHES)
    space = Space(BRANCHES)
    for index in range(24):
        trial = study.ask()
        point = space(trial)
        assert ("momentum" in point) == (point["optimizer"] == "sgd")
        assert all(space.parameters[name].contains(value) for name, value in point.items())
        for epoch in range(1, EPOCHS + 1):
            trial.report(0.1 * (point["optimizer"] == "sgd") + index / 1000, epoch)
        study.tell(trial, 0.1 * (point["optimizer"] == "sgd") + index / 1000)
    late = [trial.params["optimizer"] for trial in study.trials[-8:]]
    assert late.count("sgd") > 4


@pytest.mark.parametrize(
    ("entry", "places", "values"),
    [
        ({"low": 1, "high": 100, "log": True}, [0.0, 0.5, 1.0], [1.0, 10.0, 100.0]),
        ({"low": 0.5, "high": 0.9}, [0.0, 0.25, 1.0], [0.5, 0.6, 0.9]),
        ({"low": 1.0, "high": 2.0, "step": 0.5}, [0.0, 0.4, 1.0], [1.0, 1.5, 2.0]),
        ({"choices": [1.0, 2.0, 4.0]}, [0.0, 0.34, 1.0], [1.0, 2.0, 4.0]),
    ],
)
def test_values_at_places(entry, places, values):
    parameter = Space({"temperature": entry}).parameters["temperature"]
    found = [parameter.at(place) for place in places]
    assert found == pytest.approx(values)
    assert all(parameter.distribution()._contains(parameter.distribution().to_internal_repr(v))
               for v in found)  # fmt: skip


def test_whole_numbers_at_places():
    parameter = Space({"batch_size": {"low": 16, "high": 60, "step": 16}}).parameters["batch_size"]
    found = [parameter.at(place) for place in (0.0, 0.4, 1.0)]
    assert found == [16, 32, 48] and all(isinstance(value, int) for value in found)
