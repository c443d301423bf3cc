"""The costs of a student, which rows carry where a study asks."""

import time

import pytest
import torch
from torch import nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine.measure.cost import (
    core_rate,
    latency_ms,
    model_cost,
    student_costs,
)
from ekd_ray.engine.resolve import resolve
from ekd_ray.models import build_model
from ekd_ray.results.records import single_run
from ekd_ray.scale.worker import TrainOptions, train_run

CONFIG = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", train_subset=80, batch_size=16, epochs=2,
    validation_fraction=0.4,
    precision="float32",
)  # fmt: skip


def test_parameters_and_flops_against_a_plain_count():
    """Two operations per multiply-add of convolutions and of the last layer, by hooks."""
    parameters, flops = model_cost("resnet8", 10, 32)
    model = build_model("resnet8", 10)
    assert parameters == sum(value.numel() for value in model.parameters())
    counted = []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            taps = module.in_channels // module.groups * module.kernel_size[0] ** 2
            counted.append(2 * taps * output.numel())
        elif isinstance(module, nn.Linear):
            counted.append(2 * module.in_features * output.numel())

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert flops == sum(counted)


def test_latency_is_the_median_of_the_passes_after_the_warm_up(monkeypatch):
    """Pass i takes i seconds; the first five warm up, and 19.5 lies amid those from 5 to 34."""
    readings = iter([sum(range(i)) for i in range(36) for _ in (0, 1)][1:])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    assert latency_ms.__wrapped__("resnet8", 10, 32, 1) == 19_500


def test_a_cores_rate_is_that_of_the_best_pass_after_the_first(monkeypatch):
    """Passes of about 0.7 GFLOP take 9, .2, .1 and .3 seconds."""
    readings = iter([0, 9, 10, 10.2, 11, 11.1, 12, 12.3])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings, 99))
    flops = model_cost("resnet8", 10, 32)[1]
    random, threads = torch.random.get_rng_state(), torch.get_num_threads()
    found = core_rate.__wrapped__("resnet8", 10, 32, "float32")
    assert found == pytest.approx(round(7e8 / flops) * flops / 0.1)
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("of", [("ResNet50", 1000, 224, "float32"), ("resnet8", 10, 32, "float16")])
def test_a_plan_waits_for_no_large_model_and_no_emulated_precision(of):
    assert core_rate(*of) is None


def test_only_what_is_asked_for_is_measured(monkeypatch):
    config = resolve(CONFIG)
    monkeypatch.setattr(
        "ekd_ray.engine.measure.cost.latency_ms", lambda *_: pytest.fail("measured")
    )
    assert student_costs(config, ()) == {}
    assert student_costs(config, ("parameters",)) == {
        "parameters": model_cost("resnet8", 10, 32)[0]
    }


def test_the_rows_of_a_trial_carry_the_costs_and_are_else_the_same(tmp_path):
    reported = {}
    for name, costs in (("plain", ()), ("costs", ("parameters", "latency_ms"))):
        rows = reported.setdefault(name, [])
        options = TrainOptions(data_root=None, threads=1, costs=costs)
        run = single_run(resolve(CONFIG), tmp_path / name)
        assert train_run(run, rows.append, options=options) is not None
    for plain, row in zip(reported["plain"], reported["costs"], strict=True):
        assert row.pop("parameters") == model_cost("resnet8", 10, 32)[0]
        assert row.pop("latency_ms") > 0
        assert {**plain, "seconds": 0} == {**row, "seconds": 0}
