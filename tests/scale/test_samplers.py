"""Every sampler behind the searcher, and which schedulers they go with."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from search_runs import COMBINATIONS, FLOATS, MIXED, points, run, score, study_of

from ekd_ray.config import StudyConfig
from ekd_ray.config.study_config import SAMPLERS as NAMES
from ekd_ray.config.study_config import SCHEDULERS
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.results.records import read_record, trial_folder
from ekd_ray.results.surrogate import Surrogate
from ekd_ray.scale import model_sampler
from ekd_ray.scale.samplers import SAMPLERS, STARTUP_TRIALS, make_sampler
from ekd_ray.scale.schedulers import RULES
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.space import Space
from ekd_ray.scale.storage import open_study
from ekd_ray.studies.pipeline import check_study


def test_the_names_are_those_of_the_configuration():
    assert tuple(SAMPLERS) == NAMES
    assert tuple(RULES) == SCHEDULERS


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


@pytest.mark.quick_ids("tpe", "model", "random")
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
        return np.mean([np.log(score(settings)) for settings in run(folder, config, 30)[20:]])

    return made


@pytest.mark.quick_ids("tpe", "gp")
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
    assert len(resumed.records()) == 3
    for trial in repeated:
        first = trials[trial.user_attrs["repeats trial"]]
        assert (trial.params, trial.intermediate_values) == (
            first.params, first.intermediate_values,
        )  # fmt: skip
        assert (trial.state, trial.value) == (first.state, first.value)


# Several objectives and constraints

SEVERAL = [name for name, kind in SAMPLERS.items() if not kind.plain]


@pytest.mark.quick_ids("tpe", "nsga2", "random")
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


def test_a_resumed_sampler_repeats_none_of_its_draws(tmp_path):
    """Repeated points are not run, but too many of them in a row end a search."""
    config = study_of("random", space=FLOATS, trials=8)
    for _ in range(2):
        run(tmp_path, config, 4)
    assert len(open_study(tmp_path, config).get_trials()) == 8


def test_the_model_goes_on_at_random_where_every_trial_failed():
    config = StudyConfig(space={"lr": {"low": 0.01, "high": 1.0, "log": True}}, sampler="model")
    study = optuna.create_study(sampler=make_sampler(config), direction="maximize")
    drawn = set()
    for _ in range(STARTUP_TRIALS + 3):
        trial = study.ask()
        drawn.add(Space(config.space)(trial)["lr"])
        study.tell(trial, state=TrialState.FAIL)
    assert len(drawn) == STARTUP_TRIALS + 3


@pytest.mark.parametrize(
    "entry", [{"low": 0.0, "high": 1.0}, {"low": 0.0, "high": 1.0, "step": 0.01}]
)
def test_the_model_proposes_no_point_again_where_a_corner_is_best(entry):
    """Too many repeated points in a row end a search, long before its trials are."""
    config = StudyConfig(space={"kd_weight": entry, "ce_weight": entry}, sampler="model")
    study = optuna.create_study(sampler=make_sampler(config), direction="maximize")
    drawn = []
    for _ in range(STARTUP_TRIALS + 20):
        trial = study.ask()
        drawn.append(Space(config.space)(trial))
        trial.report(sum(drawn[-1].values()), config.distill.epochs)
        study.tell(trial, sum(drawn[-1].values()))
    assert len({tuple(point.values()) for point in drawn}) == len(drawn)
    assert max(sum(point.values()) for point in drawn) > 1.99


def test_trials_that_begin_at_once_are_spread_over_what_others_know():
    space = {"lr": {"low": 0.01, "high": 1.0, "log": True}}
    trials = [{"point": {"lr": 0.02 * k}, "scores": [-abs(k - 10) / 9]} for k in range(1, 20)]
    config = StudyConfig(space=space, known_studies={"other": trials})
    assert config.chosen_sampler == "model"
    study = optuna.create_study(sampler=make_sampler(config), direction="maximize")
    drawn = [Space(space)(study.ask())["lr"] for _ in range(16)]
    assert len({*drawn}) == 16
    assert all(0.1 < lr < 0.4 for lr in drawn)


def test_a_model_is_told_every_trial_and_fitted_anew_now_and_then(monkeypatch):
    """The fit is nearly all of what a draw costs, and hardly changes with one trial more."""
    seen, fitted = [], []
    made, fit = Surrogate.__init__, Surrogate._fit
    monkeypatch.setattr(
        Surrogate, "__init__", lambda self, known, **more: (seen.append(len(known.scores)),
        made(self, known, **more))[1],
    )  # fmt: skip
    monkeypatch.setattr(Surrogate, "_fit", lambda self: (fitted.append(len(seen)), fit(self))[1])
    monkeypatch.setattr(model_sampler, "ALWAYS_FITTED", 20)
    config = StudyConfig(space=FLOATS, sampler="model")
    study = optuna.create_study(sampler=make_sampler(config), direction="maximize")
    for number in range(STARTUP_TRIALS + 40):
        trial = study.ask()
        Space(config.space)(trial)
        trial.report(number % 7, config.distill.epochs)
        study.tell(trial, number % 7)
    assert seen == list(range(STARTUP_TRIALS, STARTUP_TRIALS + 40))
    often = 20 - STARTUP_TRIALS + 1  # models of as many trials or fewer
    assert fitted[:often] == list(range(1, often + 1))
    # 1.1 times 20, 22, 25, 28, ... or the next whole number
    assert fitted[often:] == [
        trials - STARTUP_TRIALS + 1 for trials in (22, 25, 28, 31, 35, 39, 43)
    ]


@pytest.mark.parametrize(
    ("more", "sampler"),
    [
        ({}, "model"),
        ({"sampler": "tpe"}, "tpe"),
        ({"objectives": ["val_nll"]}, "tpe"),
        ({"constraints": ["val_ece<=0.1"]}, "tpe"),
    ],
)
def test_the_sampler_is_the_model_where_it_can_be(more, sampler):
    assert StudyConfig(space=FLOATS, **more).chosen_sampler == sampler
