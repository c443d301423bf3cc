"""Studies whose driver lives while parts of them get SIGKILL, and Ray's own processes with it:
`make chaos`.

All kills of a study are armed at its start, each at a point of a run of its own: whoever comes to
one stands still there until it, or what it belongs to, is dead (holds/sitecustomize.py). So one
start of Ray serves many kills, and none finds nobody.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_run import (
    Run,
    check_metrics,
    check_records,
    check_whole,
    nothing_left,
    processes,
    start_held,
)
from holding import LIMIT, Held, Holds, kill
from kill_tally import TALLY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not os.environ.get("EKD_CHAOS_KILLS"), reason="minutes: make chaos"),
]
# The points of a run at which its process dies; each run loses one.
FATES = (
    ("run", ()),
    ("epoch", ("epoch 1.",)),
    ("rename", ("checkpoint.pt",)),
    ("epoch", ("epoch 2.",)),
    ("epoch", ("epoch 3.",)),
    ("begin", ("history.jsonl",)),
)
CONFIRM_FATES = {"select": ("finish", "rename"), "final": ("epoch", "begin")}
NESTED = ("--workers-per-trial", "2", "--max-concurrent", "1")
# No trial is stopped early, so that each comes to its point.
FULL = ("--set", "scheduler=none")


def names_of(held: Held, environment: dict[str, str], name: str) -> list[int]:
    return sorted(pid for pid, command in processes(environment).items() if name in command)


def kill_all(
    start: Callable[[], Run], holds: Holds, kind_of: dict[str, str]
) -> tuple[Run, dict[str, bytes]]:
    """Kill whoever comes to a point, until the driver ends; returns it and the records by then.

    Args:
        kind_of: a word of the label -> the kind of process that dies. Of `controller` the
            controller of the group dies while its worker stands.
    """
    records: dict[str, bytes] = {}
    run, held = start_held(start, holds)
    while held:
        kind = next(kind for word, kind in kind_of.items() if word in held.label)
        victim = held.pid
        if "controller" in kind:
            # Groups run one at a time, and what an earlier one has left is idle.
            victim = names_of(held, run.environment, "ray::TrainController")[-1]
        held.kill(victim)
        TALLY.add(kind, kills=1)
        print(f"kill: {run.age():5.1f} s, {kind}, at {held.file.name} {held.label}", flush=True)
        records = check_records(run, records, kind)
        held = holds.wait(run.driver, 2 * LIMIT)
    return run, records


@pytest.mark.parametrize("study", range(2))
def test_killed_processes_of_runs_and_cache_cost_nothing(
    study: int, environment: dict[str, str], tmp_path: Path
) -> None:
    trials = 18
    holds = Holds(tmp_path / "holds")
    cache = {"EKD_CACHE_DIR": str(tmp_path / "cache")}  # one that is filled is not filled again
    own = holds.environment({**environment, **cache})
    for number in range(trials):
        point, words = FATES[(number + study) % len(FATES)]
        holds.arm(point, f"trials/{number:04d}", *words, once=True)
    for stage, points in CONFIRM_FATES.items():
        for point in points:
            words = ("epoch 2.",) if point == "epoch" else () if point == "finish" else ("json",)
            holds.arm(point, f"confirm/{stage}", *words, once=True)
    for part in (0, 1, 2, 3, 3, 5, 7):  # one of them twice
        holds.arm("fill", f"part {part}. seed 0.")
    for part in (1, 4):
        holds.arm("fill", f"part {part}. seed 1.")
    kinds = {"trials/": "process of a trial", "confirm/": "process of a confirm run"}
    kinds["part "] = "process that fills the teacher's cache"
    with nothing_left(environment):
        start = functools.partial(Run, tmp_path / "run", own, tmp_path / "log", trials, FULL)
        run, records = kill_all(start, holds, kinds)
        check_whole(run, records, "process of a trial")
    assert not holds.armed(), f"nobody came to {holds.armed()}"
    check_metrics(run.out, "process of a trial")


def test_killed_workers_and_controllers_of_groups_cost_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Trials of two workers: of one a worker dies, of the next the controller of its group."""
    trials = 6
    holds = Holds(tmp_path / "holds")
    own = holds.environment(environment)
    points = ("epoch", "run", "epoch")
    for number in range(trials):
        words = ("epoch 2.",) if points[number % 3] == "epoch" else ()
        holds.arm(points[number % 3], f"trials/{number:04d}", *words, once=True)
    holds.arm("epoch", "confirm/select", "epoch 1.", once=True)
    holds.arm("epoch", "confirm/final", "epoch 2.", once=True)
    worker, controller = "worker of a run of two", "controller of a run of two"
    kinds = {f"trials/{n:04d}": controller if n % 2 else worker for n in range(trials)}
    kinds |= {"confirm/select": worker, "confirm/final": controller}
    with nothing_left(environment):
        flags = (*FULL, *NESTED)
        start = functools.partial(Run, tmp_path / "run", own, tmp_path / "log", trials, flags)
        run, records = kill_all(start, holds, kinds)
        check_whole(run, records, worker)
    assert not holds.armed(), f"nobody came to {holds.armed()}"


# At which points of a study Ray's own processes die, and how these are called.
RAYS_OWN = {"raylet": "raylet/raylet", "GCS": "gcs_server"}
STAGES = {
    "teacher's cache": ("fill", ("part 1.",)),
    "search": ("epoch", ("trials/", "epoch 2.")),
    "confirm": ("epoch", ("confirm/", "epoch 1.")),
}


def test_a_study_outlives_its_ray(environment: dict[str, str], tmp_path: Path) -> None:
    """Without them nothing can run: the driver ends, and the same command goes on."""
    out, holds = tmp_path / "run", Holds(tmp_path / "holds")
    own = holds.environment({**environment, "EKD_CACHE_DIR": str(tmp_path / "cache")})
    records: dict[str, bytes] = {}
    with nothing_left(environment):
        for stage, (point, words) in STAGES.items():
            for process, name in RAYS_OWN.items():
                kind = f"{process}, {stage}"
                log = tmp_path / f"{process}-{stage.split()[-1]}.log"
                holds.arm(point, *words)
                run, held = start_held(functools.partial(Run, out, own, log, 4), holds)
                (victim,) = names_of(held, run.environment, name)[:1]
                kill(victim)
                TALLY.add(kind, kills=1)
                print(f"kill: {run.age():5.1f} s, {kind}", flush=True)
                # Until the driver is dead, for what stands there could else fail of it.
                code, said = run.wait(240), log.read_text()
                held.release()
                assert code not in (0, 2) and "--resume" in said, said
                records = check_records(run, records, kind)
                with nothing_left(environment):  # what Ray itself has not ended by now
                    time.sleep(0.1)
        run = Run(out, own, tmp_path / "last.log", 4)
        check_whole(run, records, "raylet, search")
