"""Nothing of a Ray of our own outlives its driver, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ekd_ray.scale import session_end

pytestmark = pytest.mark.skipif(not session_end.PROCESSES.exists(), reason="needs /proc")
DRIVER = """
import sys, time
from pathlib import Path
from ekd_ray.scale.session_end import ended_with_driver
log = open(Path(sys.argv[1], "driver.log"), "a")
with ended_with_driver(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
print("went on", flush=True)
"""
WRITER, READER = (
    f"import sys, time; file = open(sys.argv[1], {mode!r}); print('ready', flush=True); "
    "time.sleep(100)"
    for mode in ("a", "r")
)


def begin(code: str, *words: object, apart: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], text=True, start_new_session=apart,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("killed", [True, False])
def test_who_writes_logs_of_a_ray_ends_with_its_driver(tmp_path: Path, killed: bool) -> None:
    """Who only reads one, writes elsewhere or has joined from another session is let be."""
    mine, other = tmp_path / "mine", tmp_path / "mine2"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "log").touch()
    driver = begin(DRIVER, mine)
    agent = begin(WRITER, mine / "log")
    others = [
        begin(READER, mine / "log"),
        begin(WRITER, other / "log"),
        begin(WRITER, mine / "log", apart=True),
    ]
    try:
        if killed:
            driver.kill()
        said, _ = driver.communicate(timeout=30)
        assert said == ("" if killed else "went on\n")
        assert driver.returncode == (-signal.SIGKILL if killed else 0)
        assert agent.wait(timeout=30) == -signal.SIGKILL
        time.sleep(2 * session_end.ROUND_SECONDS)
        assert [process.poll() for process in others] == [None] * len(others)
    finally:
        for process in (driver, agent, *others):
            process.kill()
            process.communicate()


STUDY = """
import os, sys, time
from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import connected
with connected(StudyConfig()):
    import ray
    if sys.argv[1] == "at work":
        # Neither the driver nor what a trial has started may keep Ray's processes.
        @ray.remote(num_cpus=0.1)
        def work(): time.sleep(100)
        at_work = [work.remote() for _ in range(2)]
        time.sleep(2)
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow  # the test above has the mechanism
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["start of Ray", "at work"])
def test_no_process_of_ray_outlives_a_killed_driver(tmp_path: Path, moment: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", STUDY, moment], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    process, deadline = psutil.Process(driver.pid), time.monotonic() + 120
    if moment == "at work":
        assert driver.stdout and driver.stdout.readline() == "ready\n"
    else:
        while not any("Agent" in child.name() for child in children(process)):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    started = children(process)
    assert {"raylet", "gcs_server"} <= {child.name() for child in started}
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []


def children(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)
