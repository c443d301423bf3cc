"""Studies whose driver lives while parts of them get SIGKILL, and Ray's own processes with it.

`make chaos` runs it (EKD_CHAOS_KILLS=20: twenty trial processes, and so many of the others as
`PARTS` says). Every kill is printed with what was killed and when.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agreement import check_ended
from chaos_run import Run, check_records, processes

from ekd_ray.results import Study
from ekd_ray.results.records import RESULT

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
SEED = int(os.environ.get("EKD_CHAOS_SEED", "0"))
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]
NESTED = ("--workers-per-trial", "2", "--max-concurrent", "1")
# What is killed: how its processes are called, of KILLS how many, and the flags of its study.
PARTS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "trial": ("ray::ImplicitFunc", 1.0, ()),
    "worker of a trial of two": ("ray::RayTrainWorker", 0.3, NESTED),
    "controller of a trial of two": ("ray::TrainController", 0.2, NESTED),
    "teacher's cache": ("ray::_fill_part", 0.2, ()),
}
RAYS_OWN = {"raylet": "raylet/raylet", "GCS": "gcs_server"}


def victims(environment: dict[str, str], name: str) -> list[int]:
    return sorted(pid for pid, command in processes(environment).items() if name in command)


def say(run: Run, count: int, what: str) -> None:
    print(f"kill {count}: {what}, {run.age():5.1f} s, during {run.stage()}", flush=True)


def at_work(run: Run) -> dict[int, Path]:
    """Process id -> folder of the runs that have begun and not ended, by their events' names."""
    found = {}
    for events in run.out.glob("*/*/events.out.tfevents.*"):
        pid = re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.(\d+)\.\d+", events.name)
        if pid and not (events.parent / RESULT).exists():
            found[int(pid[1])] = events.parent
    return found


def in_turn(run: Run) -> Path | None:
    """The run that a study of one trial at once is at: begun last, and not ended."""
    begun = [path for stage in ("trials", "confirm") for path in (run.out / stage).glob("*")]
    newest = max(begun, key=lambda path: path.stat().st_mtime, default=None)
    return newest if newest and not (newest / RESULT).exists() else None


def kill_one(run: Run, name: str, draw: random.Random, struck: set[Path] | None) -> bool:
    """Kill one such process as soon as there is one; False if the driver ended before.

    Args:
        struck: runs that have lost their process once. They are spared, since a second death is
            a failure (tests/scale/test_deaths.py), and so is a process of which is not known
            what it runs. None: any process will do.
    """
    while run.driver.poll() is None:
        time.sleep(draw.uniform(0, 1.5))
        found = victims(run.environment, name)
        if struck is not None:
            if NESTED[0] in run.extra:
                now = in_turn(run)
                runs = dict.fromkeys(found, now) if now else {}
            else:
                runs = at_work(run)
            found = [pid for pid in found if pid in runs and runs[pid] not in struck]
        if found:
            pid = draw.choice(found)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                if struck is not None:
                    struck.add(runs[pid])
                return True
    return False


def check_whole(run: Run) -> None:
    assert run.driver.wait() == 0, run.log.read_text()
    check_ended(run.out)
    statuses = [record.status for record in Study.load(run.out).records()]
    assert set(statuses) <= {"complete", "pruned"}, statuses


@pytest.fixture
def studies(environment: dict[str, str], tmp_path: Path) -> Iterator[list[Path]]:
    """Folders for studies, one after the other; what still runs at the end is ended."""
    yield [tmp_path / f"run-{index}" for index in range(50)]
    for pid in processes(environment):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_costs_no_trial(
    part: str, environment: dict[str, str], studies: list[Path]
) -> None:
    name, share, flags = PARTS[part]
    kills, draw, count = max(1, round(share * KILLS)), random.Random(SEED), 0
    struck: set[Path] | None = None if "cache" in part else set()
    trials = 4 if flags else 12
    for out in studies:
        # A teacher's cache that is filled already is not filled again.
        own = {**environment, "EKD_CACHE_DIR": str(out.with_suffix(".cache"))}
        run = Run(out, own, out.with_suffix(".log"), trials, flags)
        before: dict[str, bytes] = {}
        had, at_most = count, count + (2 if "cache" in part else kills)
        while count < min(kills, at_most) and kill_one(run, name, draw, struck):
            count += 1
            say(run, count, part)
            before = check_records(run, before)
            pause = run.age() + draw.uniform(1, 4)
            run.wait_for(lambda run=run, pause=pause: run.age() >= pause)
        check_whole(run)
        check_records(run, before)
        if count >= kills:
            return
        assert count > had, f"nothing to kill by the name of {name}"
    pytest.fail(f"only {count} of {kills} kills came")


@pytest.mark.parametrize("process", RAYS_OWN)
def test_a_study_outlives_its_ray(
    process: str, environment: dict[str, str], studies: list[Path]
) -> None:
    """Without them nothing can run: the driver ends, and the same command goes on."""
    draw, out = random.Random(SEED), studies[0]
    records: dict[str, bytes] = {}
    for count in range(max(1, KILLS // 7)):
        run = Run(out, environment, out.with_suffix(f".{count}.log"), 8)
        assert run.wait_for(lambda run=run: run.newer(".ray")), run.log.read_text()
        delay = run.age() + draw.uniform(0, 10)
        run.wait_for(lambda run=run, delay=delay: run.age() >= delay)
        own = victims(environment, RAYS_OWN[process])
        if run.driver.poll() is not None or not own:  # it was too quick
            break
        os.kill(own[0], signal.SIGKILL)
        say(run, count + 1, process)
        assert run.driver.wait(timeout=240) != 0
        assert "--resume" in run.log.read_text(), run.log.read_text()
        records = check_records(run, records)
        for pid in processes(environment):  # what Ray itself has not ended by now
            os.kill(pid, signal.SIGKILL)
    run = Run(out, environment, out.with_suffix(".last.log"), 8)
    check_whole(run)
    check_records(run, records)
