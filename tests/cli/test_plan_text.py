"""The plan's figures, against counts made by hand."""

import pytest

from ekd_ray.cli.plan_text import run_flops, study_plan
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.measure.cost import model_cost
from ekd_ray.engine.resolve import resolve

# resnet8 on 32 x 32: multiply-adds of its convolutions and of its linear layer, times two.
STAGES = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]
RESNET8 = 2 * (
    9 * 3 * 16 * 32**2
    + sum(9 * (a * b + b * b) * side**2 for a, b, side in STAGES)
    + sum(a * b * side**2 for a, b, side in STAGES[1:])
    + 64 * 10
)


def test_a_models_multiply_adds():
    parameters, flops = model_cost("resnet8", 10, 32)
    assert (parameters, flops) == (78_042, RESNET8)


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


def test_the_plan_of_a_population_and_of_changes(tmp_path):
    shared = DistillConfig(
        dataset="synthetic", student="resnet8", method="none", epochs=8, batch_size=16,
        train_subset=120, changes=[{"epoch": 3, "lr": 0.01}, {"epoch": 5, "momentum": 0.5}],
    )  # fmt: skip
    config = StudyConfig(
        distill=resolve(shared), space={"lr": {"low": 0.01, "high": 0.1}}, trials=6,
        scheduler="pbt", sampler="random", perturbation_epochs=2, baselines=(),
    )  # fmt: skip
    lines = study_plan(config, tmp_path).splitlines()
    assert "stopping   population of 6, perturbed every 2 epoch(s)" in lines
    assert "changes    from epoch 3 lr=0.01; from epoch 5 momentum=0.5" in lines
