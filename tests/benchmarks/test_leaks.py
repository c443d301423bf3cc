"""Many trials at once, on one head and on many nodes, end without time-outs and leave nothing."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import leaks

pytestmark = [
    pytest.mark.slow,  # `make test` has one trial after another in one process
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.mark.skipif("EKD_CHAOS_KILLS" not in os.environ, reason="dozens of processes: make chaos")
@pytest.mark.parametrize(("trials", "slots", "nodes"), [(80, 40, 0), (64, 16, 8)])
def test_trials_at_once_leave_nothing(
    tmp_path: Path, trials: int, slots: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = leaks.measure(tmp_path, trials=trials, slots=slots, nodes=nodes, seconds=0.1)
    assert sum(found["statuses"].values()) == trials
    assert set(found["statuses"]) <= {"complete", "pruned"}
    assert found["left"] == {}, found


def test_each_kind_of_leak_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util import placement_group

    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    class Kept:
        """An actor that stays; Ray's workers cannot import this module."""

    ended = threading.Event()
    with leaks.ray_of(2, 0):
        before = leaks.count(tmp_path)
        group = placement_group([{"CPU": 1}])
        ray.get(group.ready())
        actor = ray.remote(num_cpus=0)(Kept).remote()
        ray.get(actor.__ray_ready__.remote())
        held = ray.put(bytes(1_000_000))
        thread = threading.Thread(target=ended.wait)
        thread.start()
        with open(tmp_path / "left", "wb"):
            grown = {name: n - before[name] for name, n in leaks.count(tmp_path).items()}
        ended.set()
        del held
    assert min(grown.values()) >= 1, grown
