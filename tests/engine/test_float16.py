"""`precision: float16`: the scaled loss, its skipped steps, and what of them is divergence."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_runs import Killed, assert_same_run, kill_at_step, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ekd_ray.engine.distill as engine
from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.learner import Learner, make_optimizer
from ekd_ray.engine.precision import (
    autocast,
    describe_slowness,
    make_scaler,
    planned_precision,
    resolve_precision,
)
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.losses.objective import Objective

CPU = torch.device("cpu")
SOLVERS = {"sgd": {"momentum": 0.9, "nesterov": True}, "adamw": {"optimizer": "adamw"}}


class Plain(nn.Sequential):
    """A student without convolutions, whose float16 a CPU computes for minutes."""

    def __init__(self, name, num_classes):
        super().__init__(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, num_classes)
        )


@pytest.fixture
def config(tiny, monkeypatch):
    monkeypatch.setattr(engine, "build_model", Plain)
    return tiny(precision="float16", train_subset=100, batch_size=4, lr=0.01)


def start_scale_at(monkeypatch, scale, interval=2000):
    """Every scaler starts there, and grows after `interval` good steps."""

    def made(precision, device):
        return torch.amp.GradScaler(
            device.type, scale, growth_interval=interval, enabled=precision == "float16"
        )

    monkeypatch.setattr(engine, "make_scaler", made)


# A step


def given_gradients(solver):
    """(learner, optimizer, scaler, function that sets scaled gradients to one value)."""
    torch.manual_seed(0)
    settings = {"method": "none", "lr": 0.1, "weight_decay": 0.01, **SOLVERS[solver]}
    config = DistillConfig(**settings)
    learner = Learner(nn.Linear(3, 2), Objective(config))
    scaler = make_scaler("float16", CPU)

    def set_gradients(value):
        scale = scaler.scale(torch.ones(()))
        for parameter in learner.parameters():
            parameter.grad = torch.full_like(parameter, value) * scale

    return learner, make_optimizer(config, learner), scaler, set_gradients


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_skipped_step_leaves_no_trace_but_the_scale(solver, request, monkeypatch):
    """The first one too, in which the fused SGD makes its buffers out of memory as it was: here
    that is NaN, which torch fills it with in this mode."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    request.addfinalizer(lambda: torch.set_deterministic_debug_mode("default"))
    torch.set_deterministic_debug_mode("error")
    learner, optimizer, scaler, set_gradients = given_gradients(solver)
    peer = Learner(nn.Linear(3, 2), learner.objective)
    peer.load_state_dict(learner.state_dict())
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[solver]
    options = {k: v for k, v in SOLVERS[solver].items() if k != "optimizer"}
    plain = kind(peer.parameters(), lr=0.1, weight_decay=0.01, foreach=False, **options)
    scales = []
    for value in (float("inf"), 0.25, float("nan"), -0.5):
        set_gradients(value)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if abs(value) < 1:
            for parameter in peer.parameters():
                parameter.grad = torch.full_like(parameter, value)
            plain.step()
        for ours, theirs in zip(learner.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert scales == [2.0**15, 2.0**15, 2.0**14, 2.0**14]


class NothingRead(TorchDispatchMode):
    """Fails where the host reads a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_no_step_reads_a_value_on_the_host(solver, value):
    _, optimizer, scaler, set_gradients = given_gradients(solver)
    set_gradients(value)
    with NothingRead():
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0 ** (16 if value == 1.0 else 15)


# A run


def test_it_learns_as_float32_does(config):
    """Twice the same; `loss_scale` is in its rows and in no other's."""
    found, again = distill(config, threads=1), distill(config, threads=1)
    assert_same_run(again, found, state(found))
    exact = distill(config.replace(precision="float32"), threads=1)
    assert found.precision == "float16" and found.config.precision == "float16"
    assert all(p.dtype == torch.float32 for p in found.model.parameters())
    assert [row["loss_scale"] for row in found.history] == [2.0**16, 2.0**16]
    assert not any("loss_scale" in row for row in exact.history)
    for ours, theirs in zip(found.history, exact.history, strict=True):
        assert ours["lr"] == theirs["lr"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.01)
        assert ours["train_loss"] != theirs["train_loss"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_resumed_inside_an_epoch_it_ends_with_the_same_bits(
    solver, parts, config, tmp_path, monkeypatch
):
    """Steps are skipped, the scale grows, and the run is killed between two changes of it."""
    config = config.replace(**SOLVERS[solver], accumulation_steps=parts)
    start_scale_at(monkeypatch, 2.0**18, interval=3)
    expected = distill(config, threads=1)
    scales = []
    save = engine._save

    def saved(run, path):
        scales.append((run.scaler.get_scale(), run.scaler.state_dict()["_growth_tracker"]))
        save(run, path)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_save", saved)
        kill_at_step(patch, 12 * parts)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    changes = {one < other for (one, _), (other, _) in itertools.pairwise(scales) if one != other}
    assert changes == {False, True} and scales[-1][1] > 0, "fallen, grown, and on the way"
    start_scale_at(monkeypatch, 2.0**3, interval=3)  # which the checkpoint must overrule
    assert_same_run(distill(config, out=tmp_path, threads=1), expected, state(expected))


def test_a_run_of_another_precision_takes_the_checkpoint(config, tmp_path, monkeypatch):
    """Under `auto` a run may go on on a machine where another one is fast."""
    config = config.replace(precision="auto")
    for first, then in (("float16", "float32"), ("float32", "float16")):
        out = tmp_path / first
        with monkeypatch.context() as patch:
            patch.setattr(engine, "resolve_precision", lambda *_, name=first: name)
            kill_at_step(patch, 3)
            with pytest.raises(Killed):
                distill(config, out=out, threads=1, checkpoint_steps=1)
        monkeypatch.setattr(engine, "resolve_precision", lambda *_, name=then: name)
        assert distill(config, out=out, threads=1).precision == then


# Divergence


class Overflow(torch.autograd.Function):
    """Passes values on; its gradient is infinite, at any scale."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_a_scale_that_falls_to_nothing_is_divergence(config, monkeypatch):
    """The loss stays finite and no weight moves: nothing else would tell. 10 steps say nothing."""

    class Overflowing(Plain):
        def forward(self, x):
            return Overflow.apply(super().forward(x))

    monkeypatch.setattr(engine, "build_model", Overflowing)
    found = distill(config.replace(train_subset=70, epochs=1), threads=1)
    assert found.metrics["loss_scale"] == 2.0**6
    with pytest.raises(Diverged, match=r"scale of the loss fell to .* set precision to float32"):
        distill(config.replace(train_subset=200, epochs=1), threads=1)


def test_a_network_that_overflows_is_divergence(config, monkeypatch):
    class Large(Plain):
        def forward(self, x):
            return super().forward(x) * torch.tensor(60000.0, dtype=torch.float16) * 60000

    monkeypatch.setattr(engine, "build_model", Large)
    with pytest.raises(Diverged, match=r"train_loss became (nan|inf).* set precision to float32"):
        distill(config, threads=1)


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_float16_logits_are_those_of_float32(method):
    """Up to the largest that float16 has, with autocast on."""
    config = with_method(DistillConfig(batch_size=6, epochs=2), method)
    objective = Objective(config)
    torch.manual_seed(0)
    logits = (30 * torch.randn(2, 6, 5)).half()
    logits[:, 0, 0], logits[:, 1, 1] = 65504.0, -65504.0
    teacher, target = 3 * torch.randn(2, 6, 5), torch.arange(6) % 5
    cosines = torch.eye(5) + 0.3 * (1 - torch.eye(5)) if objective.method.class_cosines else None
    losses = []
    for student in (logits, logits.float()):
        with autocast("float16" if student is logits else "float32", CPU):
            loss, terms = objective(
                student[0], teacher[0], target, 2,
                student_strong=student[1], teacher_strong=teacher[1], class_cosines=cosines,
            )  # fmt: skip
        assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}
        losses.append(loss.detach())
    assert losses[0].isfinite()
    assert torch.equal(*losses)


# The choice

# name: (compute capability, native bfloat16, what `auto` takes)
GPUS = {
    "P100": ((6, 0), False, "float32"),
    "V100": ((7, 0), False, "float16"),
    "T4": ((7, 5), False, "float16"),
    "A100": ((8, 0), True, "bfloat16"),
}


@pytest.mark.parametrize("name", GPUS)
def test_auto_takes_what_a_gpu_has_in_hardware(name, monkeypatch):
    capability, native, expected = GPUS[name]
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda", 0)
    assert resolve_precision("auto", cuda) == expected
    assert resolve_precision("bfloat16", cuda) == "bfloat16"
    lines = f"[N/A], unknown\n{capability[0]}.{capability[1]}, {name}\n9.0, H100"
    monkeypatch.setattr("ekd_ray.engine.precision.output_of", lambda command: lines)
    for precision, slow in (
        ("bfloat16", not native), ("float16", expected == "float32"), ("float32", False),
        ("auto", False),
    ):  # fmt: skip
        said = describe_slowness(precision, on_gpu=True)
        assert (said or "").startswith(name) if slow else said is None, precision
    assert planned_precision("auto", on_gpu=True) == (expected if native else None), "they differ"
    lines = "\n".join(lines.splitlines()[:2])
    assert planned_precision("auto", on_gpu=True) == expected
    assert not torch.cuda.is_initialized()


def test_a_cpu_says_what_is_slow(monkeypatch):
    for found, native in (({"amx_tile": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert resolve_precision("auto", CPU) == ("bfloat16" if native else "float32")
        assert (describe_slowness("bfloat16", on_gpu=False) is None) == native
        float16 = describe_slowness("float16", on_gpu=False)
        assert float16 and "hardware" not in float16, "it may have avx512_fp16"
