"""Nodes that die or join in the middle of a study: EKD_CHAOS_NODES=1, `make chaos`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_marks import IN_CHAOS
from clusters import Cluster, cluster
from holding import Holds
from kill_tally import TALLY
from test_job import study

from ekd_ray.results import Bundle, Study

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    IN_CHAOS,
]
TRIALS, EPOCHS = 6, 8


def until(sign: Callable[[], bool], made: Cluster, what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not sign():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.2)


def check(out: Path) -> None:
    assert Bundle.load(out / "best").verify().ok
    records = Study.load(out).records()
    assert [record.number for record in records] == list(range(TRIALS))
    assert {record.status for record in records} == {"complete"}, [r.reason for r in records]
    for record in records:
        assert [row["epoch"] for row in record.history] == list(range(1, EPOCHS + 1))


def test_a_node_dies_in_mid_search_and_nothing_is_lost(tmp_path: Path) -> None:
    out, holds = tmp_path / "run", Holds(tmp_path / "holds")
    with TALLY.watch("node, search"), cluster() as made:
        made.add(cpus=0)
        victim, _ = [made.add(cpus=1, **holds.variables) for _ in range(2)]
        job = made.submit(*study(out, trials=TRIALS, epochs=EPOCHS))
        try:
            hold_two(out, holds, made)
            before = {p: p.read_bytes() for p in out.glob("trials/*/result.json")}
            victim.kill()
            TALLY.add("node, search", kills=1)
            holds.clear()
            said, _ = job.communicate(timeout=900)
        finally:
            job.kill()
        assert job.returncode == 0, said
        assert len(made.alive()) == 2, "the victim must be dead"
    check(out)
    assert {path: path.read_bytes() for path in before} == before


def hold_two(out: Path, holds: Holds, made: Cluster) -> None:
    """Wait until a trial has ended, and both nodes stand still in the middle of another."""
    until(lambda: len(list(out.glob("trials/*/result.json"))) >= 1, made, "a first result")
    for _ in range(2):
        holds.arm("epoch", "trials/", "epoch 3.", once=True)
    until(lambda: len(holds.held()) == 2, made, "two trials at work")


def test_a_node_that_joins_is_used(tmp_path: Path) -> None:
    out, holds = tmp_path / "run", Holds(tmp_path / "holds")
    with cluster() as made:
        made.add(cpus=0)
        made.add(cpus=1, **holds.variables)
        holds.arm("epoch", "trials/", "epoch 2.")
        job = made.submit(*study(out, trials=TRIALS, epochs=EPOCHS))
        try:
            until(lambda: len(holds.held()) == 1, made, "a first trial")
            made.add(cpus=1, **holds.variables)
            holds.clear()
            hold_two(out, holds, made)
            holds.clear()
            said, _ = job.communicate(timeout=900)
        finally:
            job.kill()
        assert job.returncode == 0, said
    check(out)
    header = json.dumps(Study.load(out).header, default=str)
    assert made.token not in header, "the token is nobody's to read"
