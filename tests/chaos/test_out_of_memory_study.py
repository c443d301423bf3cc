"""A real study whose driver the kernel ends in the search, because its control group has no more
memory. `make chaos`; tests/scale/test_memory_groups.py does so to a trial."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agreement import check_ended
from chaos_run import Run, check_records, nothing_left
from memory_groups import join_group, limit_memory

from ekd_ray.results import Study

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
TRIALS = 6
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]


def test_a_study_outlives_a_driver_that_the_kernel_ends(
    environment: dict[str, str], memory_group: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    limit_memory(memory_group, 2**20)
    with nothing_left(environment):
        run = Run(out, environment, tmp_path / "first.log", TRIALS)
        assert run.wait_for(lambda: run.grown("trials")), run.log.read_text()
        join_group(memory_group, run.driver.pid)  # from now on it gets no other page
        assert run.driver.wait(timeout=300) == -signal.SIGKILL, run.log.read_text()
        records = check_records(run, {})
        again = Run(out, environment, tmp_path / "second.log", TRIALS)
        assert again.driver.wait(timeout=1200) == 0, again.log.read_text()
    check_records(again, records)
    check_ended(out)
    assert {record.status for record in Study.load(out).records()} <= {"complete", "pruned"}
