"""A real study on machines that are not like ours: its driver is killed there in the search, and it
is continued to its end. `make chaos`."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from chaos_run import Run, check_metrics, check_records, check_whole, nothing_left, start_held
from holding import Holds
from kill_tally import TALLY
from memory_groups import limit_memory
from odd_machines import FEW_FILES, PROXIES, SMALL_SHM, can_mount, on_machine, ports_taken

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
TRIALS = 4
ROOM = 2 * 2**30  # of a small container
MEMORY = "join the group"
# Kind -> what a shell does before the command, and variables.
MACHINES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "a small container": (
        (SMALL_SHM, MEMORY, FEW_FILES), {"HOME": "/nonexistent", "LANG": "C", "LC_ALL": "C"},
    ),
    "ports taken, a proxy": ((), PROXIES),
}  # fmt: skip
ALONE = ("--max-concurrent", "1")  # as the plan has it of itself where 2 GiB are all
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]


@pytest.mark.parametrize("kind", MACHINES)
def test_a_study_is_continued_on_an_odd_machine(
    kind: str, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    setup, variables = MACHINES[kind]
    if SMALL_SHM in setup and not can_mount():
        pytest.skip("no file system can be mounted here")
    if MEMORY in setup:
        group: Path = request.getfixturevalue("memory_group")
        limit_memory(group, ROOM)
        join = f"echo $$ > {group}/cgroup.procs"
        setup = tuple(join if word == MEMORY else word for word in setup)
    machine, holds, name = on_machine(*setup), Holds(tmp_path / "holds"), f"machine, {kind}"
    own = holds.environment({**environment, **variables})
    holds.arm("epoch", "trials/0001", "epoch 2.")
    start = functools.partial(Run, tmp_path / "run", own, machine=machine, extra=ALONE)
    with nothing_left(environment), ports_taken():
        run, held = start_held(lambda: start(tmp_path / "first.log", TRIALS), holds)
        held.kill(run.driver.pid)
        run.driver.wait()
        TALLY.add(name, kills=1)
        records = check_records(run, {}, name)
        check_whole(start(tmp_path / "second.log", TRIALS), records, name)
    check_metrics(run.out, name)
