"""Whole studies, killed before a change of their files: see kill_at_changes.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from agreement import check_ended, ended
from kill_tally import TALLY, WITHOUT_RAY

CHANGES = int(os.environ.get("EKD_CHAOS_CHANGES", "3"))  # 0: each of them
SEED = os.environ.get("EKD_CHAOS_SEED", "0")
pytestmark = pytest.mark.timeout(5400)
FIRST, AGAIN = (f"{WITHOUT_RAY}driver, {when}" for when in ("before a change of a file", "again"))


# test_study_run.py kills a study too, at moments of its own.
@pytest.mark.slow
def test_a_study_killed_before_any_change_of_its_files_ends_whole(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_at_changes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), SEED, str(CHANGES)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"EKD_CHAOS_SEED={SEED}: killed at {CHANGES or 'all'} of {done.stdout.strip()}")
    check_ended(tmp_path / "whole")
    histories = sorted(tmp_path.glob("*.json"))
    assert len(histories) == (CHANGES or int(done.stdout.split()[0]))
    for history in histories:
        out, seen = history.with_suffix(""), json.loads(history.read_text())
        TALLY.add(FIRST, kills=1)
        TALLY.add(AGAIN, kills=seen["again"])
        now = {path: content.decode() for path, content in ended(out).items()}
        with TALLY.watch(FIRST):
            for records in seen["records"]:
                assert records.items() <= now.items(), f"{out.name}: a record was lost or changed"
            check_ended(out)
