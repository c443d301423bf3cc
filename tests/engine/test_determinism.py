"""`deterministic` and the precision of float32: what is set, where, and who cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from deterministic_ops import DeterministicOnly
from engine_runs import assert_same_run, state
from torch import nn

import ekd_ray.engine.distill as engine
import ekd_ray.scale.worker as worker
from ekd_ray.engine.determinism import (
    FLOAT32,
    NotDeterministic,
    arithmetic,
    decide_determinism,
    fixed_convolutions,
)
from ekd_ray.engine.distill import distill
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.train_teacher import train_teacher
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.results import finish
from ekd_ray.results.records import RunRecord, single_run

BACKENDS = torch.backends


def switches():
    """What of torch says how it computes."""
    cudnn = BACKENDS.cudnn
    return {
        "float32": {
            part.fp32_precision
            for part in (
                BACKENDS, BACKENDS.cuda.matmul, cudnn.conv, cudnn.rnn,
                BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv,
            )
        },
        "mode": torch.get_deterministic_debug_mode(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "compiler": os.environ.get("TORCHINDUCTOR_DETERMINISTIC"),
    }  # fmt: skip


@pytest.fixture
def relaxed():
    """A caller's torch that multiplies in TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert "tf32" in switches()["float32"]
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_set_inside_and_as_before_afterwards(deterministic, relaxed):
    before, found = switches(), []

    @arithmetic(deterministic=deterministic)
    def fail():
        found.append(switches())
        with fixed_convolutions():
            assert switches()["cudnn"] == (True, False)
        found.append(switches())
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    expected = {
        "float32": {FLOAT32}, "mode": 2 if deterministic else 0,
        "cudnn": (deterministic, not deterministic), "fill": False,
        "compiler": "1" if deterministic else None,
    }  # fmt: skip
    assert found == [expected, expected]
    assert switches() == before
    assert BACKENDS.cudnn.allow_tf32, "torch's older names can be read again"


COMPILED = """
import torch
from ekd_ray.engine.determinism import arithmetic
def state():
    return torch._inductor.config.deterministic, torch.are_deterministic_algorithms_enabled()
with arithmetic(deterministic=True):
    import torch._inductor.config
    print(*state())
print(*state())
with arithmetic(deterministic=True):
    print(*state())
print(*state())
"""


@pytest.mark.slow
def test_a_compiler_learns_of_it_whenever_it_is_loaded():
    ran = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert ran.stdout.split("\n")[:4] == ["True True", "False False"] * 2, ran.stderr


@pytest.mark.quick_ids("None")
@pytest.mark.parametrize("given", [None, ":16:8"])
def test_every_process_has_a_workspace_of_cublas_that_repeats(given):
    code = "import os, ekd_ray.engine.precision; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    name = "CUBLAS_WORKSPACE_CONFIG"
    there = {key: value for key, value in os.environ.items() if key != name}
    there |= {name: given} if given else {}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=there
    )
    assert ran.stdout.strip() == (given or ":4096:8")


# Runs


class Scattering(nn.Sequential):
    """A student with an operation that is deterministic nowhere."""

    def __init__(self, name, num_classes):
        super().__init__(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))

    def forward(self, x):
        torch.zeros(2).put_(torch.tensor([1]), torch.ones(1))
        return super().forward(x)


def test_a_run_computes_so_and_in_full(tiny, monkeypatch, relaxed):
    """Evaluation included; the bits on a CPU are those of other runs."""
    found, step, evaluate = [], engine._train_step, engine.evaluate_model

    def watched(function):
        def call(*arguments, **options):
            found.append((switches()["mode"], switches()["float32"] == {FLOAT32}))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(engine, "_train_step", watched(step))
    monkeypatch.setattr(engine, "evaluate_model", watched(evaluate))
    runs = [distill(tiny(deterministic=value), threads=1) for value in (True, False, None)]
    assert found == [(2, True)] * 8 + [(0, True)] * 16
    for run in runs[1:]:
        assert_same_run(run, runs[0], state(runs[0]))


def test_a_network_that_cannot_is_refused_or_trained_without(tiny, monkeypatch, tmp_path):
    """Refused if the user asked for it, with a warning if it is the default."""
    monkeypatch.setattr(engine, "build_model", Scattering)

    def train(config):
        return distill(config, threads=1, out=tmp_path)

    with pytest.raises(NotDeterministic, match=r"^put_ .*: set deterministic to false"):
        decide_determinism(tiny(deterministic=True), train, wanted=True)
    with pytest.warns(UserWarning, match="trained without: bits may differ"):
        found = decide_determinism(tiny(), train, wanted=True)
    assert found.config.deterministic is False and len(found.history) == 2
    expected = distill(tiny(deterministic=False), threads=1)
    assert_same_run(found, expected, state(expected))
    with pytest.raises(RuntimeError, match="mine"), arithmetic(deterministic=True):
        raise RuntimeError("mine")


@pytest.mark.parametrize("deterministic", [True, False])
def test_its_end_is_as_its_training_and_recorded(deterministic, tiny, tmp_path, monkeypatch):
    result = distill(tiny(deterministic=deterministic), threads=1)
    evaluate, modes = finish.evaluate_test, []

    def watched(*arguments, **options):
        modes.append(switches()["mode"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(finish, "evaluate_test", watched)
    run = single_run(result.config, tmp_path)
    record = finish.finish_run(run, result, data_root=None, test=True)
    assert modes == [2 if deterministic else 0]
    assert record.environment is not None
    assert record.environment["deterministic"] is deterministic
    assert record.environment["float32"] == FLOAT32


class Asked(Exception):
    """Carries `deterministic` of the run that was to be trained."""


def ask(config, **options):
    raise Asked(config.deterministic)


STAGES = {"search": False, "select": False, "final": True, "single": True, "teacher": True}


@pytest.mark.parametrize("stage", RunStage)
@pytest.mark.parametrize("given", [None, False, True])
def test_what_is_exported_is_deterministic_unless_told_otherwise(
    stage, given, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker, "distill", ask)
    settings = tiny(deterministic=given).to_dict()
    run = RunRecord(folder=tmp_path, stage=stage, name="x", config=settings)
    with pytest.raises(Asked) as asked:
        worker.train_run(run, print, options=worker.TrainOptions(data_root=None, threads=1))
    assert asked.value.args == (STAGES[stage] if given is None else given,)


def test_so_is_a_teacher(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("ekd_ray.engine.train_teacher.distill", ask)
    with pytest.raises(Asked) as asked:
        train_teacher(tiny(), tmp_path / "teacher.safetensors")
    assert asked.value.args == (True,)


@pytest.mark.quick_ids("[kd]", "[mlkd+ekd]", "[wkd]", "[rld]", "[dist]")
@pytest.mark.parametrize("method", METHODS)
def test_no_method_and_no_measure_needs_what_a_gpu_refuses(method, tiny, with_teacher):
    config = tiny(train_subset=40, epochs=1, ood_dataset="digits", student_image_size=36)
    config = with_method(config, method, view_pool=4, teacher_cache="off", **with_teacher)
    with DeterministicOnly() as watched:
        distill(config, threads=1)
    assert {"convolution_backward", "upsample_bicubic2d", "index_add_"} <= watched.seen
