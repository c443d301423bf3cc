"""Nodes that die or join in the middle of a study: EKD_CHAOS_NODES=1, `make chaos`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster, cluster
from test_job import study

from ekd_ray.results import Bundle, Study

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not os.environ.get("EKD_CHAOS_NODES"), reason="minutes: make chaos"),
]
TRIALS, EPOCHS = 6, 8
# A node takes up to a minute to come up beside a study, which must still be at work then.
LONG = 60


def until(sign: Callable[[], bool], made: Cluster, what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not sign():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.2)


def epochs_done(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob("trials/*/history.jsonl"))


def check(out: Path, epochs: int = EPOCHS) -> None:
    assert Bundle.load(out / "best").verify().ok
    records = Study.load(out).records()
    assert [record.number for record in records] == list(range(TRIALS))
    assert {record.status for record in records} == {"complete"}, [r.reason for r in records]
    for record in records:
        assert [row["epoch"] for row in record.history] == list(range(1, epochs + 1))


def test_a_node_dies_in_mid_search_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with cluster() as made:
        made.add(cpus=0)
        victim, _ = made.add(cpus=1), made.add(cpus=1)
        job = made.submit(*study(out, trials=TRIALS, epochs=EPOCHS))
        try:
            # Both nodes are at work, and one trial has ended.
            until(lambda: len(list(out.glob("trials/*/result.json"))) >= 1, made, "a first result")
            until(lambda: len(running(out)) >= 2, made, "two trials at work")
            before = {p: p.read_bytes() for p in out.glob("trials/*/result.json")}
            victim.kill()
            said, _ = job.communicate(timeout=900)
        finally:
            job.kill()
        assert job.returncode == 0, said
        assert len(made.alive()) == 2, "the victim must be dead"
    check(out)
    assert {path: path.read_bytes() for path in before} == before


def running(out: Path) -> list[Path]:
    return [
        path.parent for path in out.glob("trials/*/history.jsonl")
        if path.read_text() and not (path.parent / "result.json").exists()
    ]  # fmt: skip


def test_a_node_that_joins_is_used(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with cluster() as made:
        made.add(cpus=0)
        made.add(cpus=1)
        job = made.submit(*study(out, trials=TRIALS, epochs=LONG))
        try:
            until(lambda: epochs_done(out) >= 1, made, "a first epoch")
            assert len(running(out)) == 1
            made.add(cpus=1)
            until(lambda: len(running(out)) >= 2 or job.poll() is not None, made, "a second trial")
            assert job.poll() is None, "the study ended before the node had a trial"
            said, _ = job.communicate(timeout=900)
        finally:
            job.kill()
        assert job.returncode == 0, said
    check(out, LONG)
    header = json.dumps(Study.load(out).header, default=str)
    assert made.token not in header, "the token is nobody's to read"
