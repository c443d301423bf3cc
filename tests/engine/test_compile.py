"""`compile`: the same training by a compiled program, when that pays, and what if it fails."""

import functools
import shutil
import warnings

import pytest
import torch
from engine_runs import CPU, kill_at_step, Killed, same_weights, state, untimed
from torch._dynamo.testing import CompileCounterWithBackend

import ekd_ray.engine.compiling as compiling
import ekd_ray.engine.distill as engine
from ekd_ray.config import DistillConfig
from ekd_ray.engine.compiling import compilation_pays, wants_compilation
from ekd_ray.engine.distill import distill, start_run, train_epoch
from ekd_ray.engine.resolve import check_workers, resolve
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, with_method

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture
def backend(monkeypatch):
    """Lets torch.compile trace with a backend of torch's, or with a function in its place."""
    compile_ = torch.compile

    def choose(kind):
        chosen = CompileCounterWithBackend(kind) if isinstance(kind, str) else kind
        monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=chosen))
        return chosen

    return choose


# Settings that make a method's every factor change from one epoch to the next.
RAMPS = {
    "ekd": {"ekd_warmup": 3, "prior_kl_weight": 0.1, "prior_kl_warmup": 3, "learn_log_prior": True},
    "dkd": {"kd_warmup": 3},
    "ctkd": {"ctkd_warmup": 3},
}


def ramped(tiny, with_teacher, method, **values):
    """A run of `method` over three epochs in which everything that can ramp does."""
    for name in [*method.split("+"), *(["ekd"] if METHODS[method].evidential else [])]:
        values |= RAMPS.get(name, {})
    values = {k: v for k, v in values.items() if k in METHODS[method].setting_names or k == "epochs"}
    teacher = with_teacher if METHODS[method].needs_teacher else {}
    return with_method(tiny(epochs=3, view_pool=4, lr=1e-3), method, **values, **teacher)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_one_graph_over_all_epochs(method, tiny, with_teacher, backend):
    config = ramped(tiny, with_teacher, method)
    expected = distill(config, threads=1)
    weights = state(expected)
    counter = backend("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fall-back is a warning
        found = distill(config.replace(compile="on"), threads=1)
    assert found.compiled and not expected.compiled
    assert counter.frame_count == 1, "graphs, of which breaks and recompilations make several"
    for name, value in state(found).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5, msg=name)
    for mine, other in zip(found.history, expected.history, strict=True):
        assert mine == pytest.approx(other | {"seconds": mine["seconds"]}, rel=1e-3, abs=1e-5)
