"""A search that ends because its model expects too little of a further trial."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_searcher import make, suggest, train

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.budget import check_budget
from ekd_ray.scale.stop_rule import GROWTH, LEAST_COMPLETE, StopRule
from ekd_ray.scale.storage import open_study

EPOCHS, MOST = 2, 40
DRAW = np.random.default_rng(0)
POINTS = tuple({"lr": float(10 ** DRAW.uniform(-3, -1))} for _ in range(MOST))
NOISE = DRAW.normal(size=MOST)


def study_of(**settings):
    distill = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS)
    space = {"lr": {"low": 0.001, "high": 0.1, "log": True}}
    return StudyConfig(distill=distill, space=space, first_points=POINTS, trials=MOST,
                       scheduler="none", sampler="random", **settings)  # fmt: skip


def smooth(job):
    return 0.8 - 0.1 * (math.log10(job.config["lr"]) + 1.8) ** 2


def noise(job):
    return 0.5 + 0.05 * NOISE[job.number]


def searched(run, config, score, *, killed=False, blind=False, monkeypatch=None):
    """Trials one after the other until none is left; returns how many.

    With `killed` each has a searcher of its own; with `blind` this one dies before it looks.
    """
    run.mkdir(exist_ok=True)
    searcher = make(run, config)
    for count in range(MOST + 1):
        if killed and count:
            searcher = make(run, config)
        if not searcher.remaining:
            return count
        job = suggest(searcher, "a")
        train(searcher, "a", job, [score(job)] * EPOCHS)
        with monkeypatch.context() as patch:
            if blind:
                patch.setattr(StopRule, "look", lambda self: None)
            searcher.on_trial_complete("a", {})
    raise AssertionError


def test_a_search_ends_where_little_is_expected_and_killed_ones_there_too(tmp_path, monkeypatch):
    counts = {
        bound: searched(tmp_path / str(bound), study_of(stop_below=bound), smooth,
                        monkeypatch=monkeypatch)
        for bound in (0.5, 0.001, 1e-12)
    }  # fmt: skip
    assert counts[0.5] == LEAST_COMPLETE, "half of all accuracy is never expected"
    assert LEAST_COMPLETE <= counts[0.001] < MOST == counts[1e-12]
    config = study_of(stop_below=0.001)
    for how in ({"killed": True}, {"killed": True, "blind": True}):
        found = searched(tmp_path / str(len(how)), config, smooth, monkeypatch=monkeypatch, **how)
        assert found == counts[0.001]
    again = make(tmp_path / "0.5", study_of(stop_below=0.5))
    assert not again.remaining and "0.5" in again.stop.describe()
    assert make(tmp_path / "0.5", study_of()).remaining == MOST - LEAST_COMPLETE


def test_an_extension_runs_until_the_model_is_asked_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert searched(run, study_of(stop_below=0.5), smooth, monkeypatch=monkeypatch) == 10
    extended = study_of(stop_below=0.5).replace(trials=MOST + 4)
    assert searched(run, extended, smooth, monkeypatch=monkeypatch) == 3, "10 * GROWTH are asked"
    assert not make(run, extended).remaining


def test_a_model_that_knows_nothing_ends_nothing(tmp_path, monkeypatch):
    config = study_of(stop_below=0.5)
    assert searched(tmp_path, config, noise, monkeypatch=monkeypatch) > LEAST_COMPLETE
    looks = open_study(tmp_path, config).user_attrs
    assert looks["trials at the last look"] <= MOST


def test_the_gain_is_in_the_unit_of_the_metric_and_the_model_is_asked_seldom(tmp_path, monkeypatch):
    asked = []
    own = StopRule._expected_gain

    def watched(self, ended):
        asked.append((len(ended), own(self, ended)))
        return asked[-1][1]

    monkeypatch.setattr(StopRule, "_expected_gain", watched)
    for scale in (1.0, 0.1):
        config = study_of(stop_below=1e-12)
        searched(tmp_path / str(scale), config, lambda job, s=scale: s * smooth(job),
                 monkeypatch=monkeypatch)  # fmt: skip
    assert [count for count, _ in asked] == [10, 13, 17, 22, 28, 35] * 2 and GROWTH == 1.25
    for (_, large), (_, small) in zip(asked[:6], asked[6:], strict=True):
        assert small == pytest.approx(0.1 * large, rel=0.05)


@pytest.mark.parametrize("more", [{"objectives": ("val_ece",)}, {"constraints": ("val_ece<=0.1",)}])
def test_one_metric_alone_has_an_improvement(more):
    with pytest.raises(UserError, match="stop_below is an improvement of val_top1 alone"):
        check_budget(StudyConfig(stop_below=0.01, **more), None)
