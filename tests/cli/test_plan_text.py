"""The plan's figures, against counts made by hand."""

import re

import pytest

from ekd_ray.cli import plan_text
from ekd_ray.cli.plan_text import run_flops, run_plan
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.scale.trainer import Workers

CONFIG = resolve(DistillConfig(dataset="synthetic", student="resnet8", method="none", epochs=2))
# resnet8 on 32 x 32: multiply-adds of its convolutions and of its linear layer, times two.
STAGES = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]
RESNET8 = 2 * (
    9 * 3 * 16 * 32**2
    + sum(9 * (a * b + b * b) * side**2 for a, b, side in STAGES)
    + sum(a * b * side**2 for a, b, side in STAGES[1:])
    + 64 * 10
)


@pytest.mark.parametrize(
    ("final", "forwards"),
    [
        # 80 images: 32 held out, 48 in 3 steps; forward and backward cost three forwards.
        (False, 2 * (3 * 48 + 32)),
        # All 80 train, and the test split's 500 are read once.
        (True, 2 * 3 * 80 + 500),
    ],
)
def test_a_run_costs_its_steps_and_its_evaluation(final, forwards):
    config = resolve(
        DistillConfig(
            dataset="synthetic", student="resnet8", method="none", epochs=2, batch_size=16,
            train_subset=80, validation_fraction=0.4,
        )
    )  # fmt: skip
    assert run_flops(config, None, final=final) == RESNET8 * forwards


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_precision_that_is_slow_is_said(gpus, monkeypatch, tmp_path):
    """Of a GPU where there is one, else of the CPU."""
    asked = []

    def slowness(precision, *, on_gpu):
        asked.append((precision, on_gpu))
        return "a reason" if precision == "bfloat16" else None

    monkeypatch.setattr(plan_text, "describe_slowness", slowness)
    monkeypatch.setattr(plan_text.torch.cuda, "device_count", lambda: gpus)
    config = DistillConfig(dataset="synthetic", student="resnet8", method="none", epochs=1)
    for precision in ("auto", "bfloat16"):
        plan = run_plan(resolve(config.replace(precision=precision)), tmp_path, None)
        said = "bfloat16 (slower than auto: a reason)"
        assert (said in plan) == (precision == "bfloat16")
    assert asked == [("bfloat16", gpus > 0)]


@pytest.mark.parametrize(("asked", "on_gpu"), [(0.0, False), ("auto", True)])
def test_the_precision_of_a_study_is_that_of_its_trials(asked, on_gpu, monkeypatch, tmp_path):
    seen = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        plan_text, "planned_precision", lambda _, *, on_gpu: seen.append(on_gpu) or "float16"
    )
    monkeypatch.setattr(plan_text.torch.cuda, "device_count", lambda: 1)
    config = DistillConfig(dataset="synthetic", student="resnet8", method="none", epochs=3)
    study = StudyConfig(
        distill=resolve(config), gpus_per_trial=asked, space={"lr": {"low": 0.01, "high": 0.1}}
    )
    plan = plan_text.study_plan(study, tmp_path)
    assert {*seen} == {on_gpu}
    line = "arithmetic float16 (auto), compile off (auto), deterministic in what is exported\n"
    assert line in plan


def test_a_long_run_on_a_gpu_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_text.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(plan_text, "known_nodes", lambda: [(8, 2)])
    long = resolve(
        DistillConfig(dataset="synthetic", student="resnet8", method="none", epochs=99999)
    )
    for workers, compiled in ((None, "on"), (Workers(least=2, most=2, cpus=1, gpus=1.0), "off")):
        plan = run_plan(long.replace(deterministic=False), tmp_path, None, workers)
        assert f", compile {compiled} (auto), deterministic no\n" in plan


def test_a_plan_names_what_else_a_training_has_and_how_many_views(tmp_path):
    config = DistillConfig(dataset="synthetic", student="resnet8", method="none", epochs=1)
    plain = run_plan(resolve(config), tmp_path, None)
    assert "aids" not in plain and "162 views each" in plain
    helped = resolve(config.replace(mixup_alpha=0.5, max_grad_norm=2.0, view_pool=9))
    plan = run_plan(helped, tmp_path, None)
    assert "aids       mixup_alpha 0.5, max_grad_norm 2\n" in plan and " 9 views each" in plan


@pytest.mark.parametrize(("limit", "said"), [(0, True), (10**9, False)])
def test_the_plan_of_a_long_study_says_what_makes_it_shorter(limit, said, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_text, "LONG", limit)
    config = StudyConfig(
        distill=DistillConfig(dataset="synthetic", teacher="resnet14", student="resnet8"),
        space={"lr": {"low": 0.01, "high": 0.1}},
        recipe_name="some/recipe",
    )
    text = plan_text.study_plan(config, tmp_path / "out")
    assert ("--budget-hours" in text) is said
    assert "--set image_size" not in text  # of fixed size
    assert "some/recipe" in text


@pytest.mark.parametrize(("trials", "said"), [(2, True), (3, True), (4, False)])
def test_trials_that_end_with_the_known_values_are_warned_of(trials, said, tmp_path):
    config = StudyConfig(
        distill=DistillConfig(dataset="synthetic", teacher="resnet14", student="resnet8"),
        space={"lr": {"low": 0.01, "high": 0.1}},
        first_points=[{"lr": 0.02}, {"lr": 0.03}, {"lr": 0.04}],
        trials=trials,
    )
    text = plan_text.study_plan(config, tmp_path / "out")
    assert ("--trials more than 3" in text) is said


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"mixup_alpha": {"low": 0.2, "high": 0.8}}, "mixup_alpha"),
        ({"mixup_alpha": {"choices": [0.2, 0.8]}}, None),
        ({"lr": {"low": 0.01, "high": 0.1}}, None),
        (
            {
                "auto_augment": {"choices": ["none", "randaugment"]},
                "randaugment_magnitude": {
                    "low": 5, "high": 15, "when": {"auto_augment": ["randaugment"]}
                },
            },
            "randaugment_magnitude",
        ),
    ],
)  # fmt: skip
def test_a_range_that_gives_each_trial_a_cache_of_its_own_is_warned_of(space, named, tmp_path):
    shared = DistillConfig(dataset="synthetic", teacher="resnet14", student="resnet8", method="kd")
    text = plan_text.study_plan(StudyConfig(distill=shared, space=space), tmp_path / "out")
    found = [line for line in text.splitlines() if "shares none" in line]
    assert len(found) == (named is not None) and all(f"{named}=choice:" in line for line in found)


def test_the_estimate_follows_the_rate_that_this_machine_shows(monkeypatch, tmp_path):
    def estimate(rate):
        monkeypatch.setattr(plan_text, "core_rate", lambda *_: rate)
        return run_plan(CONFIG, tmp_path, None).splitlines()[-1]

    slow, fast = estimate(1e6), estimate(2e6)
    hours = [float(re.search(r"roughly ([\d.]+) h", line)[1]) for line in (slow, fast)]
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.01)
    assert slow.endswith("measured") and "measured" not in estimate(None)


def test_nothing_is_measured_here_for_another_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_text, "core_rate", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(plan_text, "assumed_nodes", lambda: [(8, 0)])
    assert "25 GFLOP/s" in run_plan(CONFIG, tmp_path, None)
