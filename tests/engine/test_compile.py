"""`compile`: the same training by a compiled program, when that pays, and what if it fails."""

import functools
import shutil
import warnings

import pytest
import torch
from engine_runs import Killed, assert_same_run, kill_at_step, same_weights, state
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import ekd_ray.engine.compiling as compiling
from ekd_ray.config import DistillConfig
from ekd_ray.engine.compiling import CompiledForward, compilation_pays, wants_compilation
from ekd_ray.engine.distill import distill, start_run, train_epoch
from ekd_ray.engine.resolve import check_workers, resolve
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, with_method

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def backend(monkeypatch):
    """Lets torch.compile take another backend: one of torch's, counted, or a function."""
    compile_ = torch.compile

    def choose(kind):
        chosen = CompileCounterWithBackend(kind) if isinstance(kind, str) else kind
        monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=chosen))
        return chosen

    return choose


@pytest.fixture
def no_warning():
    """A fall-back is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What makes a method's factors change from one epoch to the next.
RAMPS = {
    "learn_log_prior": True, "ekd_warmup": 3, "prior_kl_weight": 0.1, "prior_kl_warmup": 3,
    "kd_warmup": 3, "ctkd_warmup": 3,
}  # fmt: skip


@pytest.fixture
def ramped(tiny, with_teacher):
    """Three epochs of a method in which everything ramps that can."""

    def config(method, **values):
        known = METHODS[method].setting_names
        ramps = {name: value for name, value in RAMPS.items() if name in known}
        teacher = with_teacher if METHODS[method].needs_teacher else {}
        return with_method(
            tiny(epochs=3, view_pool=4, lr=1e-3, **values), method, **ramps, **teacher
        )

    return config


def assert_near(found, expected, weights):
    for name, value in state(found).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4, msg=name)
    for mine, other in zip(found.history, expected.history, strict=True):
        assert mine == pytest.approx(other | {"seconds": mine["seconds"]}, rel=1e-3, abs=1e-4)


# The conformance suite traces every method (test_objective.py); here two go through the engine, and
# the slow tests the others.
@pytest.mark.quick_ids("[ekd]")
@pytest.mark.parametrize(
    "method",
    [m if m in ("ekd", "mlkd+ekd") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_a_method_is_one_graph_over_all_epochs(method, ramped, backend, no_warning):
    assert_one_graph(ramped(method), backend)


def test_mixed_pictures_and_smoothed_labels_are_in_the_graph(ramped, backend, no_warning):
    aids = {"mixup_alpha": 1.0, "label_smoothing": 0.1, "max_grad_norm": 1.0, "ema_decay": 0.9}
    assert_one_graph(ramped("ekd", **aids), backend)


def assert_one_graph(config, backend):
    expected = distill(config, threads=1)
    weights = state(expected)
    counter = backend("eager")
    found = distill(config.replace(compile="on"), threads=1)
    assert (expected.compiled, found.compiled) == (False, True)
    assert counter.frame_count == 1  # each break, and each recompilation, makes one more
    assert_near(found, expected, weights)


@pytest.mark.slow  # the tests above have the program, this one what a compiler makes of it
@needs_compiler
@pytest.mark.timeout(600)
def test_a_compiled_run_is_the_run(ramped, no_warning):
    config = ramped("ekd")
    expected = distill(config, threads=1)
    weights = state(expected)
    compiled = distill(config.replace(compile="on"), threads=1)
    assert_near(compiled, expected, weights)
    assert set(state(compiled)) == set(weights)


@torch._dynamo.config.patch(recompile_limit=1)
def test_runs_of_a_process_compile_each_their_own_student(ramped, backend, no_warning):
    """However many: torch gives one function so many programs and no more."""
    counter = backend("eager")
    runs = []
    for _ in range(2):
        runs.append(start_run(ramped("none", compile="on", accumulation_steps=2), None))
        train_epoch(runs[-1])
    assert counter.frame_count == 2
    assert same_weights(*(run.learner.state_dict() for run in runs))


def test_in_parts_too_a_compiled_run_is_the_run(ramped, backend, no_warning):
    expected = distill(ramped("none", accumulation_steps=2), threads=1)
    weights = state(expected)
    backend("eager")
    found = distill(ramped("none", compile="on", accumulation_steps=2), threads=1)
    assert_near(found, expected, weights)


@pytest.mark.slow
def test_what_a_graph_changes_lies_where_it_is(ramped, backend):
    """Else torch would record no CUDA graph of it."""
    seen = []

    def look(graph, inputs):
        seen.append(torch._guards.TracingContext.get().fw_metadata)
        return make_boxed_func(graph)

    backend(aot_autograd(fw_compiler=look))
    run = start_run(ramped("ctkd+ekd", compile="on"), None)
    run.steps_per_epoch = 1
    train_epoch(run)
    changed = {i for i, given in enumerate(seen[0].input_info) if given.mutates_data}
    assert len(changed) == len([*run.learner.student.buffers(), run.learner.sums])
    assert changed <= set(seen[0].static_input_indices)


@pytest.mark.slow
def test_a_resumed_compiled_run_is_the_run(ramped, backend, tmp_path, monkeypatch, no_warning):
    backend("eager")
    config = ramped("ekd", compile="on")
    expected = distill(config, threads=1)
    weights = state(expected)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 6)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    # What was decided is kept: the rule would not compile here.
    monkeypatch.setattr("ekd_ray.engine.distill.wants_compilation", lambda *_: False)
    resumed = distill(config, out=tmp_path, threads=1)
    assert resumed.compiled
    assert_same_run(resumed, expected, weights)


def test_who_switches_it_off_for_the_rest_of_a_run_is_heard(ramped, backend, tmp_path, monkeypatch):
    """`auto` and `off` have one fingerprint: the run may go on."""
    backend("eager")
    config = ramped("none")
    with monkeypatch.context() as patch:
        patch.setattr("ekd_ray.engine.distill.wants_compilation", lambda *_: True)
        kill_at_step(patch, 2)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    assert not distill(config.replace(compile="off"), out=tmp_path, threads=1).compiled


# Failing


def fails_at_once(graph, inputs):
    raise NotImplementedError("no such operation\nand a long report")


def fails_in_the_step(graph, inputs):
    def program(*args):
        graph(*args)  # batch norms and sums have moved
        raise NotImplementedError("no such operation\nand a long report")

    return program


@pytest.mark.quick_ids("fails_in_the_step")
@pytest.mark.parametrize("kind", [fails_at_once, fails_in_the_step])
def test_a_failure_leaves_the_run_without_compilation(kind, ramped, backend, tmp_path, monkeypatch):
    config = ramped("ekd")
    expected = distill(config, threads=1)
    weights = state(expected)
    backend(kind)
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        kill_at_step(patch, 6)
        with pytest.raises(Killed):
            distill(config.replace(compile="on"), out=tmp_path, threads=1, checkpoint_steps=1)
    (said,) = [str(warning.message) for warning in warned]
    assert "no such operation" in said and "\n" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it does not try again
        found = distill(config.replace(compile="on"), out=tmp_path, threads=1)
    assert not found.compiled
    assert_same_run(found, expected, weights)


def test_a_lack_of_memory_is_no_failure_to_compile(ramped, backend):
    def full(graph, inputs):
        def program(*args):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return program

    backend(full)
    with pytest.raises(torch.OutOfMemoryError):
        distill(ramped("none", compile="on"), threads=1)


def test_a_later_failure_is_the_callers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    program = CompiledForward(torch.nn.BatchNorm1d(2), graphs=False)
    assert program.survives(lambda: None)

    def fail():
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        program.survives(fail)


# Deciding


@pytest.mark.parametrize(
    ("steps", "start_up", "pays"),
    [(66_000, 66.0, False), (66_001, 66.0, True), (1, 0.0, True), (10_000, 66.0, False)],
)
def test_the_rule(steps, start_up, pays):
    assert compilation_pays(steps, start_up) == pays


def test_who_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "_start_up", 5.0)
    long, short = 10**6, 10**3
    cpu = torch.device("cpu")
    wanted = {
        (setting, device.type, steps): wants_compilation(
            DistillConfig(compile=setting), device, steps
        )
        for setting in ("auto", "on", "off")
        for device in (cpu, CUDA)
        for steps in (short, long)
    }
    assert {case for case, wants in wanted.items() if wants} == {
        ("auto", "cuda", long),
        *(("on", kind, steps) for kind in ("cpu", "cuda") for steps in (short, long)),
    }
    monkeypatch.setattr(compiling.ranks, "world_size", lambda: 2)
    assert not wants_compilation(DistillConfig(compile="on"), CUDA, long)


@pytest.mark.parametrize(("graphs", "calls"), [(False, 1), (True, 3)])
def test_the_first_calls_tell_how_long_a_start_up_is(graphs, calls, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options))
    monkeypatch.setattr(compiling, "_start_up", 66.0)
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(compiling.time, "monotonic", lambda: next(ticks))
    program = CompiledForward(torch.nn.Linear(1, 1), graphs=graphs)
    for call in range(5):
        assert compiling._start_up == (66.0 if call < calls else 10 * calls)
        assert program.survives(lambda: None)
    assert [options["mode"] for options in made] == ["reduce-overhead" if graphs else None]


def test_the_rate_of_a_graph_is_a_tensor(tiny, monkeypatch):
    """The same steps as with a number, within rounding."""
    runs = [start_run(tiny(lr_warmup=1, momentum=0.5), None) for _ in range(2)]
    rate = runs[1].optimizer.param_groups[0]["lr"] = torch.tensor(9.0)
    for run in runs:
        train_epoch(run)
    assert runs[1].optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(runs[0].optimizer.param_groups[0]["lr"])
    for one, other in zip(*(run.learner.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_several_workers_do_not_compile(tiny):
    check_workers(tiny(compile="on"), 1)
    check_workers(tiny(compile="auto"), 2)
    with pytest.raises(
        UserError, match=r"^compile=on is for one worker, got 2, .* compile=auto\.$"
    ):
        check_workers(tiny(compile="on"), 2)


def test_without_a_compiler_it_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolve(tiny())
    with pytest.raises(UserError, match=r"compile needs a C\+\+ compiler .* set compile=off"):
        resolve(tiny(compile="on"))
