"""Samplers that model the objective from a bounded number of trials."""

from __future__ import annotations

import math
import random
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import Trial, TrialState

from ekd_ray.scale import optuna_private
from ekd_ray.scale.optuna_private import BoundedGP, BoundedTPE, KnownTrials


def draw(trial: Trial) -> dict[str, Any]:
    point: dict[str, Any] = {
        "lr": trial.suggest_float("lr", 1e-3, 0.1, log=True),
        "kind": trial.suggest_categorical("kind", ["a", "b", 3]),
    }
    if point["kind"] == "a":  # exists for some trials only
        point["m"] = trial.suggest_float("m", 0.5, 0.99)
    return point | {"batch": trial.suggest_int("batch", 16, 64, step=16)}


def end(study: optuna.Study, trial: Trial, point: dict[str, Any], dice: random.Random) -> None:
    score = round(-abs(math.log(point["lr"] / 0.01)) - 0.1 * point["batch"] / 64, 1)  # with ties
    kind = dice.random()
    if len(study.directions) > 1:
        study.tell(trial, [score, point["batch"] * dice.random()])
    elif kind < 0.1:
        study.tell(trial, state=TrialState.FAIL)
    elif kind < 0.6:
        for epoch in range(dice.choice([0, 1, 3])):
            trial.report(score if dice.random() < 0.9 else math.nan, epoch)
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, score)


def search(
    sampler: BaseSampler, trials: int, directions: tuple[str, ...], *, bounded: bool = False
) -> tuple[list[dict[str, Any]], optuna.Study]:
    """The points of a search with nine trials at once, which end in another order."""
    study = optuna.create_study(directions=list(directions), sampler=sampler)
    dice, running, points = random.Random(0), [], []
    for _ in range(trials):
        trial = study.ask()
        points.append(draw(trial))
        running.append((trial, points[-1]))
        if len(running) > 8:
            trial, point = running.pop(dice.randrange(8))
            if bounded:
                trial.set_constraint("c", dice.random() - 0.5)
            end(study, trial, point, dice)
    return points, study


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("directions", [("maximize",), ("minimize",), ("maximize", "minimize")])
def test_tpe_draws_what_optunas_draws(directions: tuple[str, ...], bounded: bool) -> None:
    own = BoundedTPE(n_startup_trials=8, seed=3)
    reference = TPESampler(multivariate=False, constant_liar=True, n_startup_trials=8, seed=3)
    points = [search(s, 90, directions, bounded=bounded)[0] for s in (own, reference)]
    assert points[0] == points[1]


def test_of_many_trials_the_best_and_some_of_the_others_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optuna_private, "MOST_TRIALS", 20)
    _, study = search(BoundedTPE(n_startup_trials=8, seed=3), 80, ("maximize",))
    known = KnownTrials()
    known.update(study)
    good, others = known.choose(5)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: -trial.values[0])[:5]
    assert sorted(t.number for t in best) == good
    assert len(good) + len(others) == 20 and not {*good} & {*others}
    assert others[0] == min({*known.ended} - {*good}), "evenly, both ends included"
    assert others[-1] == max({*known.ended} - {*good})


def test_a_gaussian_process_is_given_a_bounded_number_of_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optuna_private, "MOST_TRIALS", 10)
    sampler, seen = BoundedGP(n_startup_trials=4, seed=0, warn_independent_sampling=False), []

    def remember(study: object, complete: list[Any], running: object, space: object) -> dict:
        seen.append(len(complete))
        return {}

    monkeypatch.setattr(sampler, "_sample_relative_impl", remember)
    study = optuna.create_study(sampler=sampler)
    for _ in range(25):
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0, 1))
    assert max(seen) == 10
