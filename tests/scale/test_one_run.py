"""`distill.py --workers`: what the flags mean, and runs through Ray Train."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from holding import Holds
from kill_tally import TALLY

from ekd_ray.config import DistillConfig
from ekd_ray.engine.history import read_history
from ekd_ray.engine.resolve import check_workers
from ekd_ray.errors import UserError
from ekd_ray.results.records import single_run
from ekd_ray.scale import one_run, worker
from ekd_ray.scale.one_run import check_workers_fit, parse_workers
from ekd_ray.scale.trainer import Workers, scaling_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "least", "most"), [("8", 8, 8), ("2:8", 2, 8), ("3:3", 3, 3)])
def test_counts_of_workers(text, least, most):
    scaling = scaling_config(parse_workers(text, cpus=2, gpus=2.0))
    assert (scaling.min_workers, scaling.max_workers) == (least, most)
    assert scaling.elasticity_enabled == (least < most)
    assert scaling.use_gpu and scaling.resources_per_worker == {"CPU": 2, "GPU": 2.0}
    for nodes, gpus in (([(8.0, 0.0)], 0), ([(8.0, 0.0), (8.0, 4.0)], 1)):
        asked = parse_workers(text, cpus=1, gpus="auto").on(nodes)
        assert scaling_config(asked).resources_per_worker.get("GPU", 0) == gpus
        assert scaling_config(asked).use_gpu == (gpus > 0)
    assert not scaling_config(parse_workers(text, cpus=1, gpus=0.0).on([(8.0, 4.0)])).use_gpu
    with pytest.raises(UserError, match=r"workers of a run cannot share GPUs.* got 0.5 GPU"):
        parse_workers(text, cpus=1, gpus=0.5)


def test_workers_share_the_cpus_of_this_machine(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(one_run, "local_cpus", lambda: 8)
    found = [parse_workers(text, cpus=None, gpus="auto").cpus for text in ("1", "3", "2:4", "16")]
    assert found == [8, 2, 2, 1]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert parse_workers("2", cpus=None, gpus="auto").cpus == 1


@pytest.mark.parametrize("text", ["0", "two", "", "2:", ":2", "4:2", "1:2:3", "1.5"])
def test_other_counts_are_refused(text):
    with pytest.raises(UserError, match=r"--workers takes N or MIN:MAX .*, got "):
        parse_workers(text, cpus=None, gpus="auto")


def test_room_for_the_least_number_is_enough():
    nodes = [(2.5, 1.0), (1.5, 0.0)]
    check_workers_fit(Workers(least=3, most=64, cpus=1, gpus=0.0), nodes)
    check_workers_fit(Workers(least=2, most=64, cpus=1, gpus=0.5), nodes)
    with pytest.raises(
        UserError, match=r"4 workers need 1 CPU.* 3 would fit .*: lower --workers\."
    ):
        check_workers_fit(Workers(least=4, most=64, cpus=1, gpus=0.0), nodes)
    with pytest.raises(
        UserError, match=r"the run needs 1 CPU and 2 GPUs \(there .*lower --gpus-per-"
    ):
        check_workers_fit(Workers(least=1, most=1, cpus=1, gpus=2.0), nodes)
    # There are four CPUs in all, and no node has three of them.
    with pytest.raises(UserError, match=r"lower --cpus-per-trial\."):
        check_workers_fit(Workers(least=1, most=1, cpus=3, gpus=0.0), nodes)


def test_every_worker_needs_a_row():
    check_workers(DistillConfig(batch_size=8), 8)
    with pytest.raises(UserError, match=r"workers must be <= 8, .* got 9"):
        check_workers(DistillConfig(batch_size=8), 9)
    with pytest.raises(UserError, match=r"<= 4, .*accumulation_steps 2\), got 5"):
        check_workers(DistillConfig(batch_size=8, accumulation_steps=2), 5)


# What the driver and the workers do


def test_each_epoch_is_told_once(tmp_path, monkeypatch):
    """A group that was started again trains, and logs, epoch 2 a second time."""
    monkeypatch.setattr(one_run, "PROGRESS_SECONDS", 0.01)
    history, told, ended = tmp_path / "history.jsonl", [], threading.Event()
    history.write_text('{"epoch": 1}\n')
    follower = threading.Thread(
        target=one_run.report_epochs, args=(tmp_path, 1, ended, told.append)
    )
    follower.start()
    for rows in ([1, 2], [1], [1, 2], [1, 2, 3]):
        history.write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in rows))
        time.sleep(0.05)
    ended.set()
    follower.join(10)
    assert [row["epoch"] for row in told] == [2, 3], "epoch 1 was there before"


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    """A worker may die between the record and the end of the group."""
    run, trained = single_run(DistillConfig(), tmp_path), []
    monkeypatch.setattr(worker, "_distill", lambda run, *_: trained.append(run))
    train = functools.partial(worker.train_run, run, print)
    train(options=worker.TrainOptions(data_root=None, threads=1))
    assert trained == [run]
    run.write()
    train(options=worker.TrainOptions(data_root=None, threads=1))
    assert trained == [run]


# Through Ray Train

EPOCHS = 8  # of a fraction of a second: enough for a kill to come in between


def distill(out, *flags):
    return [
        sys.executable, str(ROOT / "launchers" / "distill.py"), "--dataset", "digits",
        "--teacher", "resnet20", "--student", "resnet8", "--method", "none",
        "--epochs", str(EPOCHS), "--train-subset", "160",
        "--set", "batch_size=48", "--set", "precision=float32",
        # Few and small steps: rounding must not have grown to something by the end.
        "--set", "lr=0.001",
        "--test", "--quiet", "--json", "--out", str(out), *flags,
    ]  # fmt: skip


def run(out, *flags):
    done = subprocess.run(
        distill(out, *flags), capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(out):
    return sorted(p.name.split(".out.")[-1][:8] for p in out.iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    return out, run(out, "--cpus-per-worker", "1")


def assert_same_run(out, record, alone):
    expected_out, expected = alone
    assert contents(out) == contents(expected_out)
    assert record["fingerprint"] == expected["fingerprint"]
    assert record["metrics"].keys() == expected["metrics"].keys()
    for name in ("train_loss", "val_nll", "test_nll"):
        assert record["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-4)
    assert [row["epoch"] for row in read_history(out)] == list(range(1, EPOCHS + 1))


# The default suite has a trial of two workers (test_study_run.py): the same path, inside Tune.
through_ray = pytest.mark.skipif(
    not os.environ.get("EKD_WORKERS"), reason="minutes on two cores: set EKD_WORKERS=1"
)


@pytest.mark.ray
@pytest.mark.timeout(600)
@through_ray
def test_two_workers_leave_what_one_leaves(alone, tmp_path):
    record = run(tmp_path / "two", "--workers", "2", "--cpus-per-worker", "1")
    assert_same_run(tmp_path / "two", record, alone)


@pytest.mark.ray
@pytest.mark.timeout(900)
@through_ray
def test_an_elastic_group_goes_on_after_a_killed_worker(alone, tmp_path):
    """More workers are asked for than there is room for; one is killed after epoch 1."""
    out = tmp_path / "elastic"
    flags = ("--workers", "1:16", "--cpus-per-worker", "1")
    holds = Holds(tmp_path / "holds")
    holds.arm("epoch", "epoch 2.")
    driver = subprocess.Popen(
        distill(out, *flags), stdout=subprocess.PIPE, text=True,
        env=holds.environment({**os.environ, "OMP_NUM_THREADS": "1"}),
    )  # fmt: skip
    held = holds.wait(driver)
    assert held, "nobody came to epoch 2"
    held.kill()
    TALLY.add("worker of an elastic run", kills=1)
    stdout, _ = driver.communicate(timeout=400)
    with TALLY.watch("worker of an elastic run"):
        assert driver.returncode == 0
        assert_same_run(out, json.loads(stdout), alone)
