"""Every sampler behind the searcher, the schedulers, and which of them go together."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import MedianStoppingRule
from search_runs import COMBINATIONS, EPOCHS, FLOATS, MIXED, points, run, score, study_of

from ekd_ray.config.study_config import SAMPLERS as NAMES
from ekd_ray.config.study_config import SCHEDULERS as SCHEDULER_NAMES
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.results.records import read_record, trial_folder
from ekd_ray.scale.samplers import SAMPLERS, SCHEDULERS, make_scheduler
from ekd_ray.scale.search import replay_trials
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.space import Space
from ekd_ray.scale.storage import open_study
from ekd_ray.scale.worker import RUNG_SCORE
from ekd_ray.studies.pipeline import check_study


def test_the_names_are_those_of_the_configuration():
    assert tuple(SAMPLERS) == NAMES
    assert tuple(SCHEDULERS) == SCHEDULER_NAMES


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_points_lie_in_the_space_and_none_comes_twice(sampler, tmp_path):
    config = study_of(sampler)
    ran = [*run(tmp_path, config, 9), *run(tmp_path, config, 3)]  # resumed
    assert len(ran) == 12
    space = Space(config.space)
    for settings in ran:
        for name, parameter in space.parameters.items():
            if parameter.applies(settings):
                assert parameter.contains(settings[name])
    assert len(set(points(ran, config.space))) == 12
    ended = open_study(tmp_path, config).get_trials()
    kept = [trial for trial in ended if "repeats trial" not in trial.user_attrs]
    states = {TrialState.COMPLETE} | (set() if config.scheduler == "none" else {TrialState.PRUNED})
    assert len(kept) == 12 and {trial.state for trial in kept} == states


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides(sampler, tmp_path):
    config = study_of(sampler)
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        ran = run(tmp_path / name, config.replace(seed=seed), 10)
        drawn.append(points(ran, config.space))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture(scope="module")
def late_mean(tmp_path_factory):
    """The mean score of the last 10 of 30 points of a sampler."""

    @functools.cache
    def made(sampler):
        folder = tmp_path_factory.mktemp(sampler)
        config = study_of(sampler, space=FLOATS, trials=30)
        return np.mean([score(settings) for settings in run(folder, config, 30)[20:]])

    return made


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "nsga3"])
def test_those_that_learn_do_better_than_chance(sampler, late_mean):
    assert late_mean(sampler) > late_mean("random") + 0.3


def test_a_finite_space_is_tried_whole_and_then_the_search_is_over(tmp_path):
    config = study_of("grid", trials=40)
    ran = run(tmp_path, config, 40)
    combinations = {
        (s["optimizer"], s["optimizer"] == "sgd" and s["nesterov"], s["batch_size"], s["lr"])
        for s in ran
    }
    assert len(ran) == len(combinations) == COMBINATIONS
    again = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert again.remaining == 0 and not again.unfinished


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_point_that_comes_again_is_not_run_again(sampler, tmp_path):
    config = study_of(sampler, space={"lr": {"choices": [0.01, 0.02, 0.05]}}, trials=10)
    ran = run(tmp_path, config, 10, at_once=1)
    assert sorted(s["lr"] for s in ran) == [0.01, 0.02, 0.05]
    trials = open_study(tmp_path, config).get_trials()
    repeated = [trial for trial in trials if "repeats trial" in trial.user_attrs]
    assert repeated
    # A scheduler's rungs must not count a run twice.
    resumed = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert len(resumed.finished()) == 3
    for trial in repeated:
        first = trials[trial.user_attrs["repeats trial"]]
        assert (trial.params, trial.intermediate_values) == (
            first.params, first.intermediate_values,
        )  # fmt: skip
        assert (trial.state, trial.value) == (first.state, first.value)


# Several objectives and constraints

SEVERAL = [name for name, kind in SAMPLERS.items() if not kind.plain]


@pytest.mark.parametrize("sampler", SEVERAL)
def test_several_objectives_and_constraints(sampler, tmp_path):
    config = study_of(
        sampler, objectives=["val_ece", "parameters"], constraints=["parameters<=40"],
        scheduler="none",
    )  # fmt: skip
    run(tmp_path, config, 8)
    ran = run(tmp_path, config, 4)  # resumed
    assert len(ran) == 4
    trials = [t for t in open_study(tmp_path, config).get_trials() if t.user_attrs == {}]
    assert len(trials) == 12
    for trial in trials:
        record = read_record(trial_folder(tmp_path, trial.number))
        last = record.history[-1]
        assert trial.values == [last["val_top1"], last["val_ece"], last["parameters"]]
        assert trial.constraints == {"parameters<=40": last["parameters"] - 40}


def test_a_stopped_trial_tells_what_it_broke(tmp_path):
    config = study_of("tpe", constraints=["val_ece<=0.01"], trials=6)
    run(tmp_path, config, 6)
    trials = open_study(tmp_path, config).get_trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials:
        assert trial.constraints == {"val_ece<=0.01": pytest.approx(trial.params["lr"] - 0.01)}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_constraints_turn_the_search(sampler, tmp_path):
    """Best at lr 0.01; kept below 0.004, the search ends there and not at 0.01."""
    config = study_of(
        sampler, space={**FLOATS, "batch_size": {"low": 16, "high": 64}}, trials=30,
        scheduler="none", constraints=["val_ece<=0.004"],
    )  # fmt: skip
    late = run(tmp_path, config, 30)[15:]
    free = study_of(sampler, space=config.space, trials=30, scheduler="none")
    (tmp_path / "free").mkdir()
    freely = run(tmp_path / "free", free, 30)[15:]
    kept = [np.mean([settings["lr"] <= 0.004 for settings in ran]) for ran in (late, freely)]
    assert kept[0] > kept[1] + 0.2


def test_without_cmaes_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sampler cmaes needs cmaes, .* 'ekd_ray\[cmaes\]'\.$"):
        check_study(study_of("cmaes"))
    check_study(study_of("tpe"))


# Which go together


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        ("cmaes", {"constraints": ["val_ece<=1"]}, "knows one objective and no constraints"),
        ("cmaes", {"scheduler": "none", "objectives": ["val_ece"]}, "knows one objective"),
        ("tpe", {"objectives": ["val_ece"]}, r"asha would stop .* by val_top1 alone"),
        ("tpe", {"constraints": ["val_ood_auroc>=0.9"]}, "needs a second data set"),
        ("gp", {"scheduler": "asha"}, "gp learns only from .* scheduler"),
        ("nsga2", {"scheduler": "median"}, "nsga2 learns only from .* scheduler"),
        ("grid", {"space": MIXED}, "grid tries every combination, but lr has endlessly"),
    ],
)
def test_what_does_not_go_together_is_refused(sampler, changes, message):
    with pytest.raises(UserError, match=message):
        check_study(study_of(sampler, **changes))


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ({"low": 16, "high": 64}, 49),
        ({"low": 16, "high": 64, "step": 16}, 4),
        ({"low": 16, "high": 16}, 1),
        ({"choices": [16, 32]}, 2),
    ],
)
def test_how_many_values_a_parameter_has(entry, count):
    assert Space({"batch_size": entry}).parameters["batch_size"].number_of_values() == count
    assert Space(FLOATS).parameters["momentum"].number_of_values() is None


# Schedulers


def stopped(scheduler: Any, curves: dict[str, list[float]]) -> dict[str, int]:
    """After which epoch the scheduler stops each trial; one trial after the other."""
    found = {}
    for name, values in curves.items():
        trial = Mock(trial_id=name)
        scheduler.on_trial_add(None, trial)
        for epoch, value in enumerate(values, start=1):
            result = {"epoch": epoch, "training_iteration": epoch, "val_top1": value}
            result[RUNG_SCORE] = sum(values[:epoch]) / epoch
            if epoch == len(values):
                scheduler.on_trial_complete(None, trial, result)
            elif scheduler.on_trial_result(None, trial, result) == "STOP":
                found[name] = epoch
                break
    return found


CURVES = {f"t{i}": [i / 10 + e / 100 for e in range(EPOCHS)] for i in (5, 6, 7, 8)}


def test_the_median_rule_stops_what_is_worse_than_the_median():
    scheduler = make_scheduler(study_of("tpe", scheduler="median"))
    assert isinstance(scheduler, MedianStoppingRule)
    assert not stopped(scheduler, CURVES)
    later = {"bad": [0.1] * EPOCHS, "good": [0.9] * EPOCHS}
    assert stopped(scheduler, later) == {"bad": 1}


def test_a_resumed_median_rule_knows_the_curves_before():
    finished = [
        SimpleNamespace(number=n, intermediate_values=dict(enumerate(values, start=1)))
        for n, values in enumerate(CURVES.values())
    ]
    scheduler = make_scheduler(study_of("tpe", scheduler="median"))
    replay_trials(scheduler, finished, study_of("tpe").distill)
    later = {"bad": [0.1] * EPOCHS, "good": [0.9] * EPOCHS}
    assert stopped(scheduler, later) == {"bad": 1}


def of_schedule(scheduler, epochs, schedule):
    config = study_of("tpe", scheduler=scheduler, grace_epochs=1, reduction_factor=3)
    return config.replace(distill=config.distill.replace(epochs=epochs, schedule=schedule))


# (epochs, schedule, the rungs below full length): a stepped rate falls after 5 / 8 of the epochs.
LADDERS = [
    (9, "step", [1, 7]),
    (240, "step", [1, 151]),
    (9, "cosine", [1, 3]),
    (27, "cosine", [1, 3, 9]),
]


@pytest.mark.parametrize(("epochs", "schedule", "rungs"), LADDERS)
def test_trials_are_still_compared_at_the_last_rung_below_full_length(epochs, schedule, rungs):
    """docs/search.md: all but the best are stopped *at each rung*; nowhere else is anything."""
    last, good = rungs[-1], [0.5] * epochs
    worse_late = [0.6] * (last - 1) + [0.0] * (epochs - last + 1)
    config = of_schedule("asha", epochs, schedule).replace(rung_score="last")
    found = stopped(make_scheduler(config), {"good": good, "late": worse_late})
    assert found == {"late": last}
    after = [0.6] * last + [0.0] * (epochs - last)
    assert not stopped(make_scheduler(config), {"good": good, "after": after})


@pytest.mark.parametrize(("epochs", "schedule", "rungs"), LADDERS)
def test_brackets_of_hyperband_begin_at_later_and_later_rungs(epochs, schedule, rungs):
    """A trial that is bad from the beginning is stopped at the first rung of its bracket."""
    np.random.seed(0)  # Ray draws the brackets
    scheduler = make_scheduler(of_schedule("hyperband", epochs, schedule))
    good = {f"good{i}": [0.9] * epochs for i in range(20)}
    bad = {f"bad{i}": [0.1] * epochs for i in range(20)}
    assert not stopped(scheduler, good)
    assert sorted(set(stopped(scheduler, bad).values())) == rungs


def test_asha_compares_at_its_rungs_and_nowhere_else():
    """Four trials that are equally good until they differ; the rungs are no geometric series."""
    config = study_of("tpe", rungs=[2, 7], rung_score="last")
    scheduler = make_scheduler(config)
    first = [0.5] * EPOCHS
    late = [*[0.4] * 6, 0.3, 0.9, 0.9]  # worse at 7
    early = [0.9, 0.3, *[0.9] * 7]  # worse at 2
    middle = [0.5, 0.6, 0.1, 0.1, 0.1, 0.1, 0.6, 0.1, 0.6]  # worse at others
    curves = {"first": first, "late": [0.5, 0.5, *late[2:]], "early": early, "middle": middle}
    assert stopped(scheduler, curves) == {"late": 7, "early": 2}


@pytest.mark.parametrize(("epochs", "schedule"), [(9, "step"), (9, "cosine"), (27, "cosine")])
def test_every_bracket_of_hyperband_stops_bad_trials_early(epochs, schedule):
    """None begins at full length, where every trial is over anyway."""
    np.random.seed(0)  # Ray draws the brackets
    distill = study_of("tpe").distill.replace(epochs=epochs, schedule=schedule)
    config = study_of("tpe", scheduler="hyperband", grace_epochs=1, reduction_factor=3)
    scheduler = make_scheduler(config.replace(distill=distill))
    assert not stopped(scheduler, {f"good{i}": [0.9] * epochs for i in range(20)})
    bad = {f"bad{i}": [0.1] * epochs for i in range(20)}
    assert stopped(scheduler, bad).keys() == bad.keys()


def test_a_resumed_sampler_repeats_none_of_its_draws(tmp_path):
    """Repeated points are not run, but too many of them in a row end a search."""
    config = study_of("random", space=FLOATS, trials=8)
    for _ in range(2):
        run(tmp_path, config, 4)
    assert len(open_study(tmp_path, config).get_trials()) == 8
