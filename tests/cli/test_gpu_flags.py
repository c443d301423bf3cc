"""--gpus-per-trial of every command: what it means, what the plan says of it, what is refused."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch

from ekd_ray.engine.gpu_share import VISIBLE
from ekd_ray.errors import UserError
from ekd_ray.scale.cluster import on_cluster

SEARCH = ("--dataset", "synthetic", "--student", "resnet8", "--method", "none", "--epochs", 2,
          "--set", "lr=range:0.01:0.02:0.01")  # fmt: skip
RUN = ("--dataset", "synthetic", "--student", "resnet8", "--method", "none", "--epochs", 1)
TEACHER = ("--dataset", "synthetic", "--model", "resnet8", "--epochs", 1)
HIDDEN = "no GPU (all are hidden, as asked)"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight CPUs and as many GPUs as a test says; no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def has(gpus):
        for room in ("scale.cluster", "cli.plan_text", "studies.training"):
            monkeypatch.setattr(f"ekd_ray.{room}.local_nodes", lambda: [(8.0, gpus)])

    return has


@pytest.mark.parametrize(("given", "meant"), [("auto", "auto"), ("0.25", 0.25), ("0", 0.0)])
def test_a_number_or_auto(launch, tmp_path, machine, given, meant):
    machine(2.0)
    flags = (*SEARCH, "--gpus-per-trial", given, "--dry-run", "--out", tmp_path / "run")
    code, out, _ = launch("tune_cifar", *flags, "--json")
    assert code == 0 and json.loads(out)["gpus_per_trial"] == meant
    plan = launch("tune_cifar", *flags)[1]
    expected = {"auto": "2 trials at once here, each with 1 CPU and 1 GPU",
                "0.25": "8 trials at once here, each with 1 CPU and 0.25 GPU",
                "0": f"8 trials at once here, each with 1 CPU and {HIDDEN}"}  # fmt: skip
    assert expected[given] in plan
    assert ("at 20 TFLOP/s" in plan) == (given != "0"), "the estimate is for what is used"


@pytest.mark.parametrize(("gpus", "flags", "said"), [
    (2.0, (), "1 worker with 8 CPUs and 1 GPU\n"), (0.0, (), "8 CPUs and no GPU (there is none)\n"),
    (2.0, ("--gpus-per-trial", 0), f"1 worker with 8 CPUs and {HIDDEN}"),
    (0.0, ("--gpus-per-trial", 0), "8 CPUs and no GPU (0, as asked)"),
    (2.0, ("--workers", 2), "2 workers, each with 4 CPUs and 1 GPU\n"),
    (2.0, ("--workers", "1:4"), "1 to 4 workers (2 fit now), each with 2 CPUs and 1 GPU\n"),
    (2.0, ("--workers", "1:4"), "on 2 GPUs at"),
    (0.0, ("--cpus-per-trial", 64), "on 8 CPU cores at"),
])  # fmt: skip
def test_the_plan_of_one_run(launch, tmp_path, machine, monkeypatch, gpus, flags, said):
    machine(gpus)
    monkeypatch.setattr("ekd_ray.scale.one_run.local_cpus", lambda: 8)
    for command, settings in (("distill", RUN), ("train_teacher", TEACHER)):
        code, out, error = launch(
            command, *settings, *flags, "--dry-run", "--out", tmp_path / "run"
        )
        assert code == 0, error
        assert said in out


def test_the_plan_of_candidates(launch, tmp_path, machine):
    machine(2.0)
    flags = ("--candidates", 3, "--dry-run", "--out", tmp_path / "run")
    assert "2 trials at once here, each with " in launch("train_teacher", *TEACHER, *flags)[1]


@pytest.mark.parametrize(("flags", "said"), [
    (("--gpus-per-trial", "two"), "/--gpus-per-worker must be a number or auto, got 'two'"),
    (("--gpus-per-trial", "-1"), "/--gpus-per-worker must be >= 0, got -1.0"),
    (("--gpus-per-trial", "1"), "no GPU: leave --gpus-per-trial out (auto) or give 0, got 1."),
    (("--gpus-per-trial", "0.25"), "no GPU: leave --gpus-per-trial out (auto) or give 0, got 0.2"),
    (("--gpus-per-trial", "1.5"), "--gpus-per-trial must be a fraction of one or a whole number"),
    (("--workers", 9, "--cpus-per-worker", 1), "8 would fit (there are 8 CPUs and 0 GPUs): lower "
     "--workers.\n"),
    (("--workers", 2, "--gpus-per-worker", 1), "no GPU: leave --gpus-per-worker out"),
    (("--workers", 2, "--gpus-per-worker", 0.5), "cannot share GPUs, because NCCL takes no GPU"),
    (("--workers", 2, "--gpus-per-worker", 1.5), "or a whole number, got 1.5"),
])  # fmt: skip
def test_what_cannot_work_is_refused_by_the_dry_run(launch, tmp_path, machine, flags, said):
    machine(0.0)
    code, out, error = launch("distill", *RUN, *flags, "--dry-run", "--out", tmp_path / "run")
    assert (code, out) == (2, "") and said in error and error.count("\n") == 1
    assert ("--workers" in error) <= ("--workers" in flags)


def test_workers_on_a_cluster_elsewhere_are_not_refused_before_it_is_joined(
    launch, tmp_path, machine, monkeypatch
):
    machine(0.0)
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    flags = ("--workers", 16, "--gpus-per-worker", 1, "--dry-run", "--out", tmp_path / "run")
    code, out, _ = launch("distill", *RUN, *flags)
    assert code == 0 and "16 workers, each with 1 CPU and 1 GPU\n" in out
    assert "arithmetic auto, compile auto, " in out


def test_a_network_that_train_teacher_trains_is_no_student(launch, tmp_path, machine):
    machine(0.0)
    for flags in ((), ("--candidates", 2)):
        out = launch("train_teacher", *TEACHER, *flags, "--dry-run", "--out", tmp_path / "run")[1]
        assert "\nteacher    resnet8 (" in out and "student" not in out


@pytest.mark.parametrize(("flags", "visible"), [(("--gpus-per-trial", 0), ""), ((), "0,1")])
def test_a_run_in_this_process(launch, tmp_path, machine, monkeypatch, flags, visible):
    machine(2.0)
    monkeypatch.setenv(VISIBLE, "0,1")

    def train(*_, **__):
        raise UserError(f"sees {os.environ.get(VISIBLE)!r}")

    monkeypatch.setattr("ekd_ray.studies.training.distill", train)
    error = launch("distill", *RUN, *flags, "--quiet", "--out", tmp_path / "run")[2]
    assert error == f"error: sees {visible!r}\n"
    assert os.environ[VISIBLE] == "0,1"


def test_a_run_in_this_process_that_is_refused_memory(launch, tmp_path, machine, monkeypatch):
    def train(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("ekd_ray.studies.training.distill", train)
    code, _, error = launch("distill", *RUN, "--quiet", "--out", tmp_path / "run")
    assert code == 2 and error.startswith("error: out of GPU memory with batch_size 64 (CUDA out")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("gpus", "flags", "slots"), [
    (4.0, (), 4), (1.0, (), 0), (0.0, (), 0), (4.0, ("--gpus-per-trial", 0), 0),
    (1.0, ("--gpus-per-trial", 0.5), 2),
])  # fmt: skip
def test_a_fill_takes_all_gpus(launch, machine, monkeypatch, tmp_path, gpus, flags, slots):
    """Each in a process of its own; with one, or none, this process does."""
    machine(gpus)
    filled = []

    def fill_all(study, *_):
        filled.append((study.cpus_per_trial, study.gpus_per_trial))
        return {"rows": 7}

    def fill_here(*_, **__):
        filled.append(os.environ.get(VISIBLE))
        return 7

    monkeypatch.setenv(VISIBLE, "0")
    monkeypatch.setattr("ekd_ray.scale.cluster.local_cpus", lambda: 8)
    monkeypatch.setattr("ekd_ray.scale.cluster.connected", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("ekd_ray.scale.fill_tasks.fill_cache", fill_all)
    monkeypatch.setattr("ekd_ray.engine.teacher.fill.fill_tables", fill_here)
    monkeypatch.setattr("ekd_ray.engine.resolve.resolve", lambda config, **_: config)
    code, out, error = launch(
        "cache", "fill", "--dataset", "synthetic", "--teacher", "resnet8", "--student", "resnet8",
        *flags, "--json",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(out)["computed"] == 7
    share = "auto" if not flags else float(flags[1])
    here = [""] if gpus == 0 or share == 0.0 else ["0"]
    assert filled == ([(8 // slots, share)] if slots else here)
    code, out, _ = launch(
        "cache", "fill", "--dataset", "synthetic", "--teacher", "resnet8", "--student", "resnet8",
        *flags, "--dry-run",
    )  # fmt: skip
    assert code == 0 and len(filled) == 1
    place = f"{slots} processes, each with {8 // slots} CPU" if slots else "this process with 8 CPU"
    assert place in out and "rows       at most " in out


def test_a_fill_is_of_this_machine_whatever_cluster_there_is(launch, machine, monkeypatch):
    machine(4.0)
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    seen = []

    def fill_all(study, *_):
        seen.append(on_cluster())
        return {"rows": 7}

    monkeypatch.setattr("ekd_ray.scale.cluster.connected", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("ekd_ray.scale.fill_tasks.fill_cache", fill_all)
    monkeypatch.setattr("ekd_ray.engine.resolve.resolve", lambda config, **_: config)
    flags = ("--dataset", "synthetic", "--teacher", "resnet8", "--student", "resnet8", "--quiet")
    assert launch("cache", "fill", *flags)[0] == 0 and seen == [False]
