"""A real study whose clock goes back an hour while it searches, and once more before it is
continued. `make chaos`; every Python process of it sees the clock of the test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from agreement import check_ended
from chaos_run import Run, check_records, nothing_left

from ekd_ray.results import Study

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
TRIALS = 6
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]
# Imported by every Python that starts: the seconds in a file are taken from the time.
CLOCK = """
import os, time
_real, _ns = time.time, time.time_ns
def _back():
    try:
        with open(os.environ["EKD_TEST_CLOCK"]) as file:
            return int(file.read() or 0)
    except (OSError, KeyError):
        return 0
time.time = lambda: _real() - _back()
time.time_ns = lambda: _ns() - _back() * 10**9
"""


def test_a_study_outlives_a_clock_that_is_set_back(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(CLOCK)
    clock, out = tmp_path / "clock", tmp_path / "run"
    paths = os.pathsep.join([str(tmp_path / "python"), environment.get("PYTHONPATH", "")])
    own = {**environment, "PYTHONPATH": paths, "EKD_TEST_CLOCK": str(clock)}
    with nothing_left(environment):
        run = Run(out, own, tmp_path / "first.log", TRIALS)
        assert run.wait_for(lambda: run.grown("trials")), run.log.read_text()
        clock.write_text("3600")
        searched = lambda: sum(name.startswith("trials") for name in check_records(run, {})) >= 3  # noqa: E731
        assert run.wait_for(searched), run.log.read_text()
        run.driver.kill()
        run.driver.wait()
        records = check_records(run, {})
        clock.write_text("7200")
        again = Run(out, own, tmp_path / "second.log", TRIALS)
        assert again.driver.wait(timeout=1200) == 0, again.log.read_text()
    check_records(again, records)
    check_ended(out)
    study = Study.load(out)
    assert {record.status for record in study.records()} <= {"complete", "pruned"}
    rows = [row for record in study.records() for row in record.history]
    assert all(0 <= row["seconds"] < 1000 for row in rows), json.dumps(rows)
