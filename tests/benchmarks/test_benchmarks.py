"""The benchmarks run, and their figures are what they say. How fast anything is, is no test."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import run, startup, step
from benchmarks.measure import geometric_mean, ratio, spread
from benchmarks.reference import Reference, kd_loss, training_pictures
from benchmarks.sleeper import sleeper
from ekd_ray.engine.history import read_history
from ekd_ray.losses import METHODS
from ekd_ray.losses.kd import kd_loss as ours
from ekd_ray.models import build_model


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"n": 5, "median": 3.0, "low": 2.0, "high": 4.0}


def test_ratios_are_taken_round_by_round():
    assert ratio([2.0, 40.0, 3.0], [1.0, 10.0, 3.0])["median"] == 2.0
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio([1.0, 2.0], [1.0])


def test_the_reference_learns_by_the_same_loss():
    torch.manual_seed(0)
    student, teacher, target = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    expected = 0.1 * nn.functional.cross_entropy(student, target) + 0.9 * ours(
        student, teacher, 4.0
    )
    assert kd_loss(student, teacher, target) == pytest.approx(float(expected))


def test_the_reference_trains_its_student_and_not_its_teacher():
    torch.manual_seed(0)
    student, teacher = build_model("resnet8", 10), build_model("resnet8", 10)
    made = Reference(student, teacher, training_pictures("synthetic", 32, None), batch_size=16)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (student, teacher)]
    made.step(*next(made.batches()))
    changed = [
        any(not torch.equal(v, old[k]) for k, v in m.state_dict().items())
        for m, old in zip((student, teacher), before, strict=True)
    ]
    assert changed == [True, False]
    assert made.meters["top1"].count == 16


def test_every_start_is_measured():
    found, ratios = startup.measure(1, lambda text: None)
    assert found.keys() == startup.STARTS.keys() and len(ratios) == len(found) - 1
    assert all(times["n"] == 1 and times["median"] > 0 for times in found.values())


def test_every_variant_of_the_step_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path))
    asked = []
    found = step.measure_pair(
        "resnet8-resnet8", tmp_path, steps=1, rounds=2, threads=1, peer=False, compiled=False,
        note=asked.append,
    )  # fmt: skip
    assert set(found) == {"reference", "cold", "limit", "warm"} and len(asked) == 2
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    details, ratios = step.summary({"a-b": found})
    expected = np.median(np.divide(found["reference"], found["warm"]))
    assert ratios["reference_over_warm/a-b"] == pytest.approx(expected)
    assert details["a-b"]["warm"]["median"] == pytest.approx(1e3 * np.median(found["warm"]))
    assert "torchdistill_over_warm/a-b" not in ratios


def test_every_method_is_measured_beside_kd(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(step, "METHODS", {name: METHODS[name] for name in ("none", "kd", "wkd")})
    found, ratios = step.measure_methods(
        "resnet8-resnet8", tmp_path, steps=1, rounds=1, threads=1, note=lambda text: None
    )
    assert found.keys() == {"kd", "wkd"} and ratios["step_over_kd/kd"] == 1.0
    assert ratios["step_over_kd/wkd"] == found["wkd"]["ms"]["median"] / found["kd"]["ms"]["median"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["stp"], "unknown theme 'stp'"),
        (["study"], "study needs CIFAR-10 and its teacher"),
        (["step", "--pairs", "resnet56"], "resnet56"),
        (["step", "--rounds", "0"], "--rounds"),
        (["gpu", "--rounds", "0"], "--rounds"),
        (["gpu", "--pairs", "resnet56"], "resnet56"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", *argv])
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)
    with pytest.raises(SystemExit) as left:
        run.parse()
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_what_cannot_be_measured_here_is_left_out_or_refused(monkeypatch, capsys):
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(sys, "argv", ["run"])
    assert run.parse().themes == ["step", "peer", "launches", "startup", "memory"]
    assert "compile needs a C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run", "step", "compile"])
    with pytest.raises(SystemExit) as left:
        run.parse()
    assert left.value.code == 2
    assert "compile needs a C++ compiler" in capsys.readouterr().err


def test_a_trial_that_sleeps_writes_what_trials_write(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr("ray.tune.report", reported.append)
    run = {"folder": str(tmp_path), "config": {"epochs": 2, "lr": 0.3}}
    sleeper({"run": run}, seconds=0.0)
    assert read_history(tmp_path, needed=["val_top1"]) == reported and len(reported) == 2
