"""The kernel ends a process that needs more memory than its control group has: a trial's, and one
that trains alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chaos_marks import IN_CHAOS
from launchers_run import DIGITS
from memory_groups import join_group, limit_memory
from safetensors.torch import load_file
from tuned_runs import tune_with

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.results.records import RunRecord, read_record, trial_folder
from ekd_ray.scale.worker import Report

ROOM = 256 * 2**20
GROUP = "EKD_TEST_MEMORY_GROUP"
# Faster: processes that are killed (test_deaths.py), Ray's own limit (test_low_memory.py).
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), IN_CHAOS]


def needs_much(job: RunRecord, report: Report) -> None:
    """A run that trains nothing; the first trial takes four times what its group has."""
    row = {"epoch": 1, "val_top1": 0.5, "seconds": 0.1}
    (job.folder / HISTORY).write_text(json.dumps(row) + "\n")
    if job.number == 0:
        with open(f"{os.environ['EKD_TEST_MEMORY_GROUP']}/cgroup.procs", "w") as group:
            group.write(str(os.getpid()))
        torch.ones(4 * 256 * 2**18)
    report(row)


@pytest.mark.ray
def test_a_trial_that_the_kernel_ends_has_failed_and_the_search_goes_on(
    memory_group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill: tests/scale/test_deaths.py."""
    limit_memory(memory_group, ROOM)
    monkeypatch.setenv(GROUP, str(memory_group))
    run = tmp_path / "run"
    config = StudyConfig(
        distill=DistillConfig(dataset="digits", student="resnet8", method="none", epochs=1),
        space={"lr": {"low": 0.01, "high": 0.1}}, trials=3, scheduler="none", max_concurrent=1,
    )  # fmt: skip
    tune_with(run, config, needs_much)
    records = [read_record(trial_folder(run, number)) for number in range(3)]
    assert [record and record.status for record in records] == ["failed", "complete", "complete"]
    assert records[0] is not None and "process died (killed, or out of memory)" in str(
        records[0].reason
    )


def test_a_run_that_the_kernel_ends_goes_on_where_there_is_room(
    memory_group: Path, tmp_path: Path
) -> None:
    """Its weights are those of a run that was let alone."""

    def distill(out: Path, room: int) -> int:
        limit_memory(memory_group, room)
        command = [
            sys.executable, "-m", "ekd_ray", "distill", *DIGITS, "--method", "none",
            "--train-subset", "120", "--epochs", "3", "--quiet", "--out", str(out),
        ]  # fmt: skip
        return subprocess.run(
            [*command, *(["--resume"] if (out / "config.yaml").exists() else [])],
            preexec_fn=lambda: join_group(memory_group, os.getpid()),
        ).returncode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plenty = 16 * 2**30
    assert distill(whole, plenty) == 0
    name = next(n for n in ("memory.max_usage_in_bytes", "memory.peak")
                if (memory_group / n).exists())  # fmt: skip
    peak = int((memory_group / name).read_text())
    codes = [distill(killed, int(share * peak)) for share in (0.5, 0.85)]
    assert -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}, codes
    if codes[-1]:
        assert distill(killed, plenty) == 0
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
