"""A vital process of Ray is killed under a driver that lives: it says so and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DRIVER = """
import time
from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import connected
with connected(StudyConfig()):
    print("ready", flush=True)
    time.sleep(100)
print("went on")
"""


@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_a_driver_does_not_wait_for_a_ray_that_is_dead(name: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout and driver.stdout.readline() == "ready\n"
    processes = psutil.Process(driver.pid).children(recursive=True)
    (victim,) = [p for p in processes if p.cmdline() and Path(p.cmdline()[0]).name == name]
    os.kill(victim.pid, signal.SIGKILL)
    said, errors = driver.communicate(timeout=30)
    assert driver.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: Ray's {name} died") and "--resume" in last
    assert "went on" not in said
    # Its workers and agents end with it.
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
