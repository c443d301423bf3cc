"""Configurations that together are good for several studies."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results.records import RESULT, STUDY_FILE, trial_folder
from ekd_ray.results.study import Study
from ekd_ray.scale.model_sampler import APART
from ekd_ray.scale.space import Space
from ekd_ray.studies.portfolio import choose_greedily, choose_portfolio
from ekd_ray.studies.recipes import Recipe

SPACE = {
    "temperature": {"low": 1.0, "high": 8.0},
    "kd_weight": {"low": 0.5, "high": 20.0, "log": True},
}


@pytest.fixture
def finished(tmp_path):
    """Writes a study whose scores are best at a temperature."""

    def write(name, best, *, space=SPACE, trials=20, **distill):
        run = tmp_path / name
        config = StudyConfig(distill=DistillConfig(**{"method": "kd", **distill}), space=space)
        run.mkdir()
        (run / STUDY_FILE).write_text(f"study: {json.dumps(config.to_dict())}")
        for number, point in enumerate(Space(space).sample(trials, seed=best)):
            folder = trial_folder(run, number)
            folder.mkdir(parents=True)
            score = 0.8 - 0.05 * abs(point["temperature"] - best)
            record = {
                "number": number, "params": point, "config": {}, "reason": None,
                "status": "complete", "history": [{"epoch": 1, "val_top1": score}],
            }  # fmt: skip
            (folder / RESULT).write_text(json.dumps(record))
        return run

    return write


def load(*runs):
    return {str(run): Study.load(run) for run in runs}


def test_the_first_ones_are_as_good_as_any_so_many():
    """Greedy choice is at least 1 - 1/e of the best set (Nemhauser et al., 1978)."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        expected, places = rng.random((9, 4)), 10 * rng.random((9, 5))
        chosen = choose_greedily(expected, places, 3)
        sets = itertools.combinations(range(9), 3)
        best = max(expected[list(s)].max(axis=0).mean() for s in sets)
        found = expected[chosen].max(axis=0).mean()
        assert chosen[0] == expected.mean(axis=1).argmax()
        assert (1 - 1 / math.e) * best <= found <= best


def test_what_is_chosen_lies_apart_and_a_study_that_says_nothing_counts_nothing():
    expected = np.array([[2.0, np.nan], [1.9, np.nan], [np.nan, 0.5], [0.1, 0.1]])
    places = np.array([[0.0], [APART / 2], [0.5], [1.0]])
    assert choose_greedily(expected, places, 4) == [0, 2, 3]


def test_each_study_finds_what_is_good_for_it(finished):
    studies = load(finished("warm", 2), finished("hot", 7))
    found = choose_portfolio(studies, size=4)
    assert len(found.points) == 4 and found.expected.shape == (4, 2)
    temperatures = [point["temperature"] for point in found.points]
    assert min(abs(t - 2) for t in temperatures) < 1.3
    assert min(abs(t - 7) for t in temperatures) < 1.3
    assert (found.expected[:3].max(axis=0) > 1).all()


def test_it_is_a_recipe_that_names_its_studies_and_that_others_extend(finished, tmp_path):
    wider = {**SPACE, "temperature": {"low": 1.0, "high": 10.0}}
    studies = load(finished("warm", 2), finished("hot", 7, space=wider, dataset="cifar10"))
    file = tmp_path / "portfolio.yaml"
    found = choose_portfolio(studies, size=3)
    file.write_text(found.to_yaml())
    config = Recipe.load(file).config
    assert [*config.first_points] == [*found.points] and config.distill.method == "kd"
    assert config.space["temperature"] == {"low": 1.0, "high": 10.0}
    text = file.read_text()
    for name, study in studies.items():
        assert study.config.fingerprint()[:12] in text and name not in text
    (tmp_path / "mine.yaml").write_text("extends: portfolio.yaml\ntrials: 7\n")
    mine = Recipe.load(tmp_path / "mine.yaml").config
    assert mine.trials == 7 and mine.first_points == config.first_points


def test_it_has_what_all_studies_search(finished):
    less = {"temperature": SPACE["temperature"]}
    found = choose_portfolio(load(finished("a", 2), finished("b", 3, space=less)), size=2)
    assert {*found.space} == {"temperature"} == {name for p in found.points for name in p}


def test_what_no_portfolio_can_be_made_of_is_refused(finished):
    whole, few = finished("a", 2), finished("few", 2, trials=7)
    dkd, other = finished("dkd", 2, method="dkd"), finished("o", 2, standardize=True)
    with pytest.raises(UserError, match=r"few has 7 trials of full length, .* >= 8"):
        choose_portfolio(load(whole, few))
    with pytest.raises(UserError, match=r"differ in method \(dkd, kd\)"):
        choose_portfolio(load(whole, dkd))
    with pytest.raises(UserError, match="differ in standardize"):
        choose_portfolio(load(whole, other))
    with pytest.raises(UserError, match="1 to 1000 configurations, got 0"):
        choose_portfolio(load(whole), size=0)
    with pytest.raises(UserError, match="give one or more"):
        choose_portfolio({})


def test_the_command_writes_it_once(finished, launch, tmp_path):
    runs = [finished("warm", 2), finished("hot", 7)]
    code, out, err = launch("portfolio", *runs, "--size", 2, "--out", "sub/p.yaml")
    assert (code, err) == (0, "") and "sub/p.yaml" in out and "warm" in out
    assert len(Recipe.load(tmp_path / "sub" / "p.yaml").config.first_points) == 2
    code, out, err = launch("portfolio", *runs, "--out", "sub/p.yaml")
    assert (code, out) == (2, "") and "is there already" in err
    code, out, err = launch("portfolio", *runs, "--size", 2, "--out", "q.yaml", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "") and len(told["points"]) == len(told["expected"]) == 2
    code, out, err = launch("portfolio", tmp_path / "none", "--out", "r.yaml")
    assert (code, out) == (2, "") and not (tmp_path / "r.yaml").exists()
