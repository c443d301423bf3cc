"""`compile`: the same training by a compiled program."""

import shutil

import pytest
import torch
from engine_runs import same_weights, state

from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def config(tiny, with_teacher):
    """One epoch of 3 steps with two passes of the student in each."""
    return with_method(tiny(epochs=1, view_pool=4, lr=1e-3), "mlkd", **with_teacher)


@needs_compiler
@pytest.mark.timeout(600)
def test_a_compiled_run_is_the_run(config, monkeypatch):
    plain, calls = distill(config, threads=1), []
    compile_ = torch.compile

    def counted(function, **options):
        program = compile_(function, **options)

        def run(*args):
            calls.append(args)
            return program(*args)

        return run

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.utils.counters.clear()
    compiled = distill(config.replace(compile=True), threads=1)
    counters = torch._dynamo.utils.counters
    assert len(calls) == 6
    assert counters["frames"]["ok"] >= 1
    assert not counters["graph_break"], "the student is one program"
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(
            compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name
        )
    assert compiled.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-4)
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())
    # A second run in this process compiles its own student, and gives the same bits.
    again = distill(config.replace(compile=True), threads=1)
    assert same_weights(state(again), state(compiled))


def test_without_a_compiler_it_is_refused(config, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"compile needs a C\+\+ compiler .* set compile=false"):
        resolve(config.replace(compile=True))
