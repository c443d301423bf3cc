"""Whole studies whose disk is full at a change of their files: see fill_at_changes.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILLS = int(os.environ.get("EKD_CHAOS_FILLS", "4"))  # 0: at each change
SEED = os.environ.get("EKD_CHAOS_SEED", "0")
pytestmark = pytest.mark.timeout(5400)


# tests/scale/test_full_disk.py has one run of a study, and one run alone.
@pytest.mark.slow
def test_a_study_whose_disk_is_full_at_any_change_says_so_and_ends_whole(small_disk: Path) -> None:
    script = Path(__file__).with_name("fill_at_changes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(small_disk), SEED, str(FILLS)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"EKD_CHAOS_SEED={SEED}: the disk was full at {found}")
    assert found["stopped"] + found["harmless"] == FILLS or not FILLS
    assert found["stopped"], "no change needed room"
