"""Trials that take unequally long: improvement per second of the sampler `model`."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from search_runs import FLOATS, run, study_of

from ekd_ray.scale.model_sampler import LEAST_TIMED, SECONDS, ModelSampler, costs_differ
from ekd_ray.scale.space import Space
from ekd_ray.scale.storage import open_study

SPACE = {
    "student": {"choices": ["resnet8", "resnet20"]},
    "lr": {"low": 0.001, "high": 0.1, "log": True},
}
SLOWER = 20.0  # of resnet20


def proposed(count, seed, *, timed, rare="resnet20"):
    """The students that are proposed after `count` trials of equal worth, one in five `rare`."""
    config = study_of("model", space=SPACE, seed=seed)
    sampler = ModelSampler(config, seed=seed, n_startup_trials=4)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    rng, space = np.random.default_rng(seed), Space(SPACE)
    for index in range(count):
        # The median of all and the quartiles are those of the others.
        student = next(s for s in ("resnet20", "resnet8") if (s == rare) == (index % 5 == 0))
        study.enqueue_trial({"student": student, "lr": float(10 ** rng.uniform(-3, -1))})
        trial = study.ask()
        space(trial)
        trial.report(score := float(0.5 + 0.05 * rng.normal()), 9)
        if timed:
            trial.set_user_attr(SECONDS, SLOWER if student == "resnet20" else 1.0)
        study.tell(trial, score)
    found = [space(study.ask())["student"] for _ in range(4)]
    return sampler, study, found


def test_of_two_that_are_as_good_the_fast_one_is_tried():
    drawn = {
        timed: [s for seed in range(3) for s in proposed(15, seed, timed=timed)[2]]
        for timed in (True, False)
    }
    assert drawn[True].count("resnet20") <= 1 < drawn[False].count("resnet20")


@pytest.mark.parametrize("rare", ["resnet20", "resnet8"])
def test_the_seconds_are_those_of_full_length_and_none_is_taken_for_luck(rare):
    sampler, study, _ = proposed(15, 0, timed=True, rare=rare)
    rows = sampler._encode([{"student": s, "lr": 0.01} for s in ("resnet8", "resnet20")])
    fast, slow = sampler._log_seconds(study, rows)
    assert slow - fast == pytest.approx(np.log(SLOWER), abs=0.3)
    assert fast == pytest.approx(np.log(9), abs=0.3)  # epochs of `study_of`
    sampler, study, _ = proposed(LEAST_TIMED - 1, 0, timed=True)
    assert (sampler._log_seconds(study, rows) == 0).all()


def test_seconds_are_kept_where_costs_differ_alone(tmp_path):
    for name, space in (("differ", {**SPACE, **FLOATS}), ("same", FLOATS)):
        config = study_of("model", space=space)
        assert costs_differ(config) == (name == "differ")
        (tmp_path / name).mkdir()
        run(tmp_path / name, config, 4)
        trials = open_study(tmp_path / name, config).get_trials(states=[TrialState.COMPLETE])
        assert trials and all((SECONDS in t.user_attrs) == (name == "differ") for t in trials)
