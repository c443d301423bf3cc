"""The checks of `make gpu`, by their own code: on a CPU, tiny, with fakes of what only CUDA has."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, run
from ekd_ray.losses.methods import METHODS

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
TOTAL = 2**33  # bytes of the GPU that there is not


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def site(folder):
    return gpu.Site(
        device=torch.device("cpu"), folder=folder, workers=1,
        settings={
            "teacher": "resnet8", "student": "resnet8", "epochs": 2, "batch_size": 16,
            "train_subset": 60, "validation_fraction": 0.2, "view_pool": 2, "lr": 0.01,
        },
        pairs=("resnet8-resnet8",), batches=(16,), rounds=2, most_steps=2,
    )  # fmt: skip


@pytest.fixture
def fake_cuda(monkeypatch):
    """The memory of a GPU as torch limits it; other processes are functions."""
    state = SimpleNamespace(fraction=1.0, modes=[])
    monkeypatch.setattr(gpu, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr("ekd_ray.engine.gpu_share.uses_gpu", lambda: True)

    def allocate(size):
        if size > state.fraction * TOTAL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    monkeypatch.setattr(gpu, "_allocate", allocate)
    cuda = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=TOTAL),
        "set_per_process_memory_fraction": lambda share: setattr(state, "fraction", share),
        "set_sync_debug_mode": state.modes.append,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return state


def test_losses_are_compared_with_float64(site, monkeypatch):
    assert f"{len(METHODS)} methods" in gpu.check_losses(site)
    compute = gpu._loss_and_gradient

    def off(objective, drawn, target, device):
        loss, gradient = compute(objective, drawn, target, device)
        return loss, gradient * (1.0 if drawn.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(gpu, "_loss_and_gradient", off)
    with pytest.raises(AssertionError, match="the gradient is off"):
        gpu.check_losses(site)


def test_an_epoch_that_waits_is_found(site, fake_cuda, monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", {name: METHODS[name] for name in ("none", "mlkd+ekd")})
    gpu.check_waits(site)
    assert fake_cuda.modes == ["error", "default"] * 2
    epoch = gpu.train_epoch

    def waits(run):
        epoch(run)
        if fake_cuda.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(gpu, "train_epoch", waits)
    with pytest.raises(AssertionError, match="none: called a synchronizing"):
        gpu.check_waits(site)
    assert fake_cuda.modes[-1] == "default"


def test_the_table_is_full_in_the_epoch_that_must_not_wait(site, fake_cuda, monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", {"mlkd": METHODS["mlkd"]})
    asked, start = [], gpu.start_run
    monkeypatch.setattr(gpu, "start_run", lambda *a: asked.append(start(*a)) or asked[-1])
    gpu.check_waits(site)
    assert [teacher.computed for teacher in asked[0].teachers] == [0, 0]


def trained(weight, **values):
    """What `distill` returns, of a network with one weight."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    history = [{"epoch": 1, "train_loss": weight, "seconds": torch.rand(()).item()}]
    return SimpleNamespace(
        model=model, history=history, metrics=history[-1], compiled=True, **values
    )


@pytest.mark.parametrize(
    ("check", "weights", "message"),
    [
        (gpu.check_graphs, [1.0, 1.0001], None),
        (gpu.check_graphs, [1.0, 1.1], "weight: Tensor-likes are not close"),
        (gpu.check_deterministic, [1.0, 1.0], None),
        (gpu.check_deterministic, [1.0, 1.0 + 2**-20], "1 tensors differ"),
        (gpu.check_float16, [1.0, 1.01], None),
        (gpu.check_float16, [1.0, 1.2], "loss 1.2000, not 1.0000"),
        (gpu.check_float16, [1.0, float("nan")], "loss nan, not 1.0000"),
    ],
)
def test_runs_that_differ_are_found(check, weights, message, site, monkeypatch):
    asked = []

    def distill(config):
        asked.append(config)
        return trained(weights[(len(asked) - 1) % 2])

    monkeypatch.setattr(gpu, "distill", distill)
    if message is None:
        assert check(site)
    else:
        with pytest.raises(AssertionError, match=message):
            check(site)
    one, other = asked[:2]
    differ = {k for k, v in one.to_dict().items() if other.to_dict()[k] != v}
    assert differ == {
        gpu.check_graphs: {"compile"}, gpu.check_deterministic: set(),
        gpu.check_float16: {"precision"},
    }[check]  # fmt: skip


def test_graphs_that_fell_back_are_found(site, monkeypatch):
    eager = trained(1.0)
    eager.compiled = False
    monkeypatch.setattr(gpu, "distill", lambda config: eager)
    with pytest.raises(AssertionError, match="has fallen back"):
        gpu.check_graphs(site)


def test_deterministic_runs_are_compared(site):
    assert gpu.check_deterministic(site)


@pytest.mark.slow  # a CPU takes float16 slowly
def test_a_run_in_float16_is_compared(site):
    assert gpu.check_float16(site)


@pytest.mark.slow  # compiles a student and its objective
@needs_compiler
@pytest.mark.timeout(900)
def test_compiled_runs_are_compared(site, monkeypatch):
    monkeypatch.setattr(gpu, "COMPILED", ("ctkd",))
    assert gpu.check_graphs(site).startswith("ctkd: weights within")


@pytest.mark.slow  # starts two processes, as tests/engine/test_rank_curves.py does
def test_workers_are_compared(site):
    assert "2 workers" in gpu.check_workers(dataclasses.replace(site, workers=2))


def test_one_gpu_has_no_workers_to_compare(site):
    with pytest.raises(gpu.LeftOut):
        gpu.check_workers(site)


def test_a_fraction_that_is_not_kept_is_found(site, fake_cuda, monkeypatch):
    assert "0.25" in gpu.check_fractions(site)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    fake_cuda.fraction = 1.0
    with pytest.raises(AssertionError, match="a process took"):
        gpu.check_fractions(site)


def test_a_refused_run_is_recorded_and_its_process_goes_on(site, fake_cuda, monkeypatch):
    import ekd_ray.scale.worker as worker

    def refused(*_, **__):
        assert fake_cuda.fraction < 0.1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    shutil.rmtree(site.folder / "refused", ignore_errors=True)
    site = dataclasses.replace(site, settings={**site.settings, "train_subset": 1280})
    monkeypatch.setattr(worker, "distill", refused)
    assert "memory" in gpu.check_memory(site)
    assert fake_cuda.fraction == 1.0
    shutil.rmtree(site.folder / "refused")
    monkeypatch.setattr(worker, "distill", lambda *_, **__: None)
    with pytest.raises((AssertionError, OSError)):
        gpu.check_memory(site)


@pytest.fixture
def checks(monkeypatch):
    """One check of each end, and no times."""

    def leaves(site):
        raise gpu.LeftOut("one GPU")

    def fails(site):
        raise ValueError("a cable\nis out")

    found = {"fails": fails, "leaves": leaves, "passes": lambda site: "all well"}
    monkeypatch.setattr(gpu, "CHECKS", found)
    monkeypatch.setattr(gpu, "time_pair", lambda *_: iter([("warm", [2.0]), ("published", [6.0])]))
    monkeypatch.setattr(gpu, "time_epochs", lambda *_, **__: [1.0])


def test_a_check_that_fails_stops_no_other(site, checks):
    found = gpu.run_checks(site, lambda text: None)
    states = [(entry["name"], entry["state"]) for entry in found["checks"]]
    assert states == [
        ("fails", "failed"), ("leaves", "left out"), ("passes", "passed"),
        ("steps of resnet8-resnet8, batch 16", "passed"),
        ("compiled steps of resnet8-resnet8, batch 16", "passed"),
    ]  # fmt: skip
    assert (found["passed"], found["failed"]) == (3, 1)
    assert "a cable is out (test_gpu_checks.py:" in found["checks"][0]["found"]
    case = "resnet8-resnet8, batch 16"
    assert found["ratios"][f"published_over_warm/{case}"] == 3.0
    assert found["ratios"][f"warm_over_compiled/{case}"] == 2.0
    text = io.StringIO()
    gpu.print_table(found, Console(file=text, width=160))
    assert "3 passed, 1 failed" in text.getvalue() and "a cable is out" in text.getvalue()
    json.dumps(found)


def test_nothing_is_begun_after_the_deadline(site, checks):
    found = gpu.run_checks(dataclasses.replace(site, deadline=0.0), lambda text: None)
    assert {entry["state"] for entry in found["checks"]} == {"left out"}
    assert (found["passed"], found["failed"]) == (0, 0)


def test_every_variant_is_timed(site):
    found = dict(gpu.time_pair(site, "resnet8-resnet8", 16))
    assert set(found) == {"published", "alone", "warm"}
    assert all(len(times) == site.rounds and min(times) > 0 for times in found.values())


def test_without_a_gpu_nothing_is_checked_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "before"))
    monkeypatch.setattr(sys, "argv", ["run", "gpu", "--save", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as left:
        run.main()
    assert left.value.code == 0
    said = capsys.readouterr()
    assert "0 passed, 0 failed" in said.out and "nothing is saved" in said.err
    assert not run.RESULTS.exists()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["checks"] == [] and written["machine"]["gpus"] == []


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (2, 1)])
def test_the_exit_code_says_whether_one_failed(failed, code, tmp_path, monkeypatch):
    result = {"passed": 3, "failed": failed, "checks": [], "steps": {}, "ratios": {}}
    monkeypatch.setattr(gpu, "measure", lambda folder, note: result)
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run", "gpu"])
    with pytest.raises(SystemExit) as left:
        run.main()
    assert left.value.code == code


def test_it_runs_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "gpu", "step"])
    with pytest.raises(SystemExit) as left:
        run.parse()
    assert left.value.code == 2 and "gpu runs alone" in capsys.readouterr().err
