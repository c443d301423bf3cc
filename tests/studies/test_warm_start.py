"""Finished studies as first points of another."""

import json
import math

import numpy as np
import optuna
import pytest
import yaml

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results.records import RESULT, STUDY_FILE, trial_folder
from ekd_ray.scale.confirm import champions
from ekd_ray.scale.model_sampler import ModelSampler
from ekd_ray.scale.space import Space, check_space, first_points
from ekd_ray.studies.warm_start import LEAST_TRIALS, MOST_TRIALS, POINTS, warm_started

SPACE = {
    "kd_weight": {"low": 0.5, "high": 20.0, "log": True},
    "temperature": {"low": 1.0, "high": 4.0},
}


@pytest.fixture
def finished(tmp_path):
    """Writes a study's folder: trials of (params, score), a score of None for one stopped."""

    def write(name, trials, space=SPACE, **distill):
        run = tmp_path / name
        config = StudyConfig(distill=DistillConfig(**{"method": "kd", **distill}), space=space)
        run.mkdir()
        (run / STUDY_FILE).write_text(f"study: {json.dumps(config.to_dict())}")
        for number, (params, score) in enumerate(trials):
            folder = trial_folder(run, number)
            folder.mkdir(parents=True)
            record = {
                "number": number, "params": params, "config": {}, "reason": None,
                "status": "pruned" if score is None else "complete",
                "history": [{"epoch": 1, "val_top1": score or 0.99}],
            }  # fmt: skip
            (folder / RESULT).write_text(json.dumps(record))
        return run

    return write


def point(kd_weight, temperature=2.0):
    return {"kd_weight": kd_weight, "temperature": temperature}


@pytest.fixture
def config():
    return StudyConfig(
        distill=DistillConfig(method="kd"), space=SPACE, first_points=(point(9.0),),
    )  # fmt: skip


def test_the_best_of_full_length_come_after_the_studys_own_by_its_name(finished, config):
    trials = [(point(1), 0.3), (point(2), 0.5), (point(3), None), (point(4), 0.4), (point(5), 0.1)]
    result = warm_started(config, [finished("a", trials)])
    found = [(name, brought["kd_weight"]) for name, brought in result.warm_points.items()]
    assert found == [("from a trial 1", 2), ("from a trial 3", 4), ("from a trial 0", 1)]
    assert result.replace(warm_points=None) == config
    assert list(first_points(result)) == [point(9.0), point(2), point(4), point(1)]


def test_each_study_adds_its_own_and_no_point_comes_twice(finished, config):
    first = finished("a", [(point(w), 1 - w / 100) for w in range(1, LEAST_TRIALS)])
    second = finished("b", [(point(1), 0.9), (point(9.0), 0.8), (point(12), 0.7)])
    result = warm_started(config, [first, second])
    weights = {name: p["kd_weight"] for name, p in result.warm_points.items()}
    assert list(weights.values()) == [*range(1, POINTS + 1), 9.0, 12]
    assert weights["from b trial 1"] == 9.0 and result.first_points == (), "by hand, too"
    assert warm_started(result, [first, second]) == result
    known = config.replace(authors={**point(12), "lr": 0.1}, first_points=[])
    assert list(warm_started(known, [second]).warm_points) == ["from b trial 0", "from b trial 1"]


def test_points_are_mapped_onto_the_space(finished, config):
    """Beyond a range: its end. Not searched here: left out. Not searched there: sampled."""
    run = finished(
        "a", [({"kd_weight": 90.0, "lr": 0.1}, 0.5)],
        space={"kd_weight": {"low": 0.5, "high": 99.0}, "lr": {"low": 0.01, "high": 0.2}},
    )  # fmt: skip
    assert warm_started(config, [run]).warm_points == {"from a trial 0": {"kd_weight": 20.0}}


def test_points_keep_the_evidence_function_that_they_were_found_under(finished):
    space = {"kd_weight": {"low": 0.0, "high": 9.0, "step": 0.5},
             "evidence": {"choices": ["softplus", "log1p_softplus"]}}  # fmt: skip
    config = StudyConfig(distill=DistillConfig(method="ekd"), space=space)
    run = finished(
        "a", [({"kd_weight": 3.2}, 0.5)], method="ekd", evidence="log1p_softplus",
        space={"kd_weight": {"low": 0.5, "high": 9.0}},
    )  # fmt: skip
    points = warm_started(config, [run]).warm_points
    assert points == {"from a trial 0": {"kd_weight": 3.0, "evidence": "log1p_softplus"}}


def test_a_searched_method_takes_the_method_of_the_other_study(finished):
    config = StudyConfig(
        distill=DistillConfig(method="kd"),
        space={
            "method": {"choices": ["kd", "dkd"]},
            "temperature": {"low": 1.0, "high": 4.0},
            "dkd_beta": {"low": 1.0, "high": 9.0, "when": {"method": ["dkd"]}},
        },
    )
    run = finished("a", [({"temperature": 3.0, "dkd_beta": 2.0}, 0.5)], method="dkd",
                   space={"temperature": {"low": 1.0, "high": 4.0},
                          "dkd_beta": {"low": 1.0, "high": 9.0}})  # fmt: skip
    assert warm_started(config, [run]).warm_points == {
        "from a trial 0": {"method": "dkd", "temperature": 3.0, "dkd_beta": 2.0}
    }


@pytest.mark.parametrize(
    ("trials", "distill", "words"),
    [
        ([], {}, "has no trial of full length"),
        ([(point(1), None)], {}, "has no trial of full length"),
        ([(point(1), 0.5)], {"method": "dkd"}, "method dkd, .* with kd, .*--method dkd"),
        ([({"lr": 0.1}, 0.5)], {}, r"searched here \(kd_weight, temperature\)"),
    ],
)
def test_a_study_that_gives_nothing_is_refused(trials, distill, words, finished, config):
    with pytest.raises(UserError, match=words):
        warm_started(config, [finished("a", trials, **distill)])


def test_a_folder_without_a_study_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        warm_started(config, [tmp_path])


def searched(best, count=20, seed=3):
    """Trials of a study in which one weight is best."""
    drawn = Space(SPACE).sample(count, seed=seed)
    return [(p, 1 - abs(math.log(p["kd_weight"] / best)) / 9) for p in drawn]


def test_larger_studies_are_learned_from(finished, config):
    """Their trials are kept, and the points of which they expect most together come first."""
    runs = [finished("a", searched(3.0)), finished("b", searched(5.0, seed=4))]
    result = warm_started(config, runs)
    assert list(result.known_studies) == ["a", "b"]
    assert all(len(trials) == 20 for trials in result.known_studies.values())
    assert list(result.warm_points) == ["from a + b", "from a + b (2)", "from a + b (3)"]
    assert all(2.0 < p["kd_weight"] < 8.0 for p in result.warm_points.values())
    assert StudyConfig.from_dict(yaml.safe_load(yaml.safe_dump(result.to_dict()))) == result
    assert warm_started(result, runs) == result


@pytest.mark.parametrize(("weight", "tried"), [(3.5, True), (19.0, False)])
def test_authors_values_are_tried_where_others_expect_no_less_of_them_than_of_any(
    finished, config, weight, tried
):
    """They stay a champion, legal and in the range either way; the user's word is kept."""
    known = config.replace(authors={**point(weight), "lr": 0.1}, first_points=())
    runs = [finished("a", searched(3.0)), finished("b", searched(4.0, seed=4))]
    result = warm_started(known, runs)
    assert result.try_authors is tried
    assert (known.authors in first_points(result)) is tried
    assert "authors' values" in champions(result, result.distill.replace(teacher="resnet20"))
    for said in (True, False):
        assert warm_started(known.replace(try_authors=said), runs).try_authors is said
    assert known.authors in first_points(known), "nothing is known of others"
    with pytest.raises(UserError, match="kd_weight"):
        check_space(result.replace(authors=point(500.0)))


def test_of_many_trials_some_are_kept_and_what_diverged_is_not(finished, config):
    run = finished("a", searched(3.0, count=MOST_TRIALS + 20))
    failed = {
        "number": 0, "params": point(1), "config": {}, "status": "failed", "history": [],
        "reason": "train_loss became nan in epoch 1 of 2 (lr 1): lower it.",
    }  # fmt: skip
    (trial_folder(run, 0) / RESULT).write_text(json.dumps(failed))
    (trials,) = warm_started(config, [run]).known_studies.values()
    assert len(trials) == MOST_TRIALS
    assert all(math.isfinite(score) for trial in trials for score in trial["scores"])


def test_first_points_have_no_value_that_no_study_has_tried(finished, config):
    space = {"kd_weight": SPACE["kd_weight"]}
    trials = [({"kd_weight": p["kd_weight"]}, score) for p, score in searched(3.0)]
    result = warm_started(config, [finished("a", trials, space=space)])
    assert all(set(p) == {"kd_weight"} for p in result.warm_points.values())


def test_a_prior_counts_before_there_is_a_score(finished, config):
    """In the first points and in what the sampler proposes next: of two values that the studies
    find as good, the believed one."""
    run = finished("a", searched(3.0))
    prior = {"center": 3.5, "confidence": "high"}
    believed = {**SPACE, "temperature": {**SPACE["temperature"], "prior": prior}}
    away = []
    for space in (SPACE, believed):
        own = warm_started(config.replace(space=space), [run])
        study = optuna.create_study(sampler=ModelSampler(own, seed=0, n_startup_trials=8))
        # Trials of odd number are drawn evenly: the prior is in their ranking alone.
        asked = [Space(space)(study.ask()) for _ in range(20)][1::2]
        for points in ([*own.warm_points.values()], asked):
            away.append(np.mean([abs(p["temperature"] - 3.5) for p in points]))
            assert 1.5 < np.median([p["kd_weight"] for p in points]) < 8.0
    assert away[2] < 0.5 < away[0] and away[3] < 0.5 < away[1]
