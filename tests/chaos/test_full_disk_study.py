"""A study whose disk fills up while it searches: it stops with one sentence and goes on once there
is room. `make chaos`; needs a file system that can be mounted."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agreement import check_ended
from chaos_run import Run, check_records, nothing_left
from holding import Holds

from ekd_ray.results import Study

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
TRIALS = 6
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with a little more than a study asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Write until nothing goes in, for the study writes too, then give `left` bytes back."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        file.truncate(file.tell() - left)
    return disk / "filler"


@pytest.mark.parametrize("left", [0, 100_000])
def test_a_study_outlives_a_full_disk(
    left: int, disk: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Without room for a byte, and with room for a history but not for a checkpoint."""
    holds = Holds(tmp_path / "holds")
    holds.arm("epoch", "trials/0003", "epoch 1.")
    with nothing_left(environment):
        run = Run(disk / "run", holds.environment(environment), tmp_path / "first.log", TRIALS)
        held = holds.wait(run.driver)
        assert held, run.log.read_text()
        filler = fill(disk, left)
        held.release()
        assert run.wait() == 2, run.log.read_text()
        said = run.log.read_text().strip().splitlines()[-1]
        assert said.startswith("error: ") and "--resume" in said and "free" in said, said
        filler.unlink()
        records = check_records(run, {})
        assert 2 <= len(records) < TRIALS
        again = Run(run.out, environment, tmp_path / "second.log", TRIALS)
        assert again.wait() == 0, again.log.read_text()
    check_records(again, records)
    check_ended(run.out)
    statuses = {record.status for record in Study.load(run.out).records()}
    assert statuses <= {"complete", "pruned"}, "a full disk is no trial's fault"
