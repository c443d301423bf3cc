"""The remains of many trials in Ray, in files and in their driver: counted before and after.

python -m benchmarks.leaks --trials 1000 --slots 40
python -m benchmarks.leaks --trials 64 --slots 16 --nodes 8

Searcher, scheduler, journal, records and Tune are the real ones; the trials write and report
their epochs and sleep between them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

from benchmarks.measure import machine
from benchmarks.overhead import SPACE, light_trainable
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.files import write_json

EPOCHS = 3
SETTLE_SECONDS = 60.0  # for what Ray takes away after a search has returned
MOST_LISTED = 10_000


@contextlib.contextmanager
def ray_of(slots: int, nodes: int) -> Iterator[None]:
    """A Ray with so many slots in all: of our own, or a cluster of processes of this machine."""
    from ekd_ray.scale.cluster import ADDRESS, connected

    if nodes == 0:
        # A slot costs no core here: trials only sleep.
        with patch("ekd_ray.scale.cluster.local_cpus", lambda: slots), connected():
            yield
        return
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        made.add_node(num_cpus=0, include_dashboard=True, dashboard_host="127.0.0.1")
        for _ in range(nodes):
            made.add_node(wait=False, num_cpus=slots // nodes, object_store_memory=80_000_000)
        made.wait_for_nodes(timeout=300)
        with patch.dict(os.environ, {ADDRESS: made.address}), connected():
            yield
    finally:
        made.shutdown()


def search_light(run: Path, trials: int, slots: int, seconds: float) -> Counter[str]:
    """Search with trials that sleep; how many ended in which status."""
    from ekd_ray.results.study import Study
    from ekd_ray.scale.schedulers import make_scheduler
    from ekd_ray.scale.search import run_tuner
    from ekd_ray.scale.searcher import OptunaSearcher
    from ekd_ray.studies.pipeline import check_study, open_run

    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS)
    config = check_study(
        StudyConfig(
            distill=base, space=SPACE, trials=trials, sampler="random", baselines=(),
            max_concurrent=slots,
        )
    )  # fmt: skip
    open_run(run, config, resume=False)
    searcher = OptunaSearcher(run, config, config.distill)
    make = functools.partial(light_trainable, seconds)
    with patch("ekd_ray.scale.search.make_trainable", make):
        run_tuner(
            run, config, lambda *_: None, searcher=searcher, scheduler=make_scheduler(config),
            observer=Mock(),
        )  # fmt: skip
    return Counter(record.status for record in Study.load(run).records())


def count(folder: Path) -> dict[str, int]:
    """Counts of the things that a search could leave; trials' own files are left out."""
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors, list_objects

    gc.collect()  # Tune's trials refer to each other, and each to an object
    groups = placement_group_table().values()
    address = ray.get_runtime_context().gcs_address  # left out, it must be the machine's only Ray
    alive = list_actors(address, filters=[("state", "!=", "DEAD")], limit=MOST_LISTED)
    files = [path for path in folder.rglob("*") if "trials" not in path.parts]
    return {
        "actors": len(alive),
        "placement groups": sum(group["state"] != "REMOVED" for group in groups),
        "objects in Ray's store": len(list_objects(address, limit=MOST_LISTED)),
        "files of the study": len(files),
        "open files of the driver": len(os.listdir("/proc/self/fd")),
        "threads of the driver": threading.active_count(),
    }


def measure(
    folder: Path, *, trials: int, slots: int, nodes: int = 0, seconds: float = 0.1
) -> dict[str, Any]:
    """Search once to warm up, count, search, and count until it is as before or has had its time.

    Returns:
        `before`, `after` and `left` (what grew) by name, the `statuses` of the trials, and the
        `seconds` of the search.
    """
    with ray_of(slots, nodes):
        search_light(folder / "first" / "run", 2 * slots, slots, seconds)
        before = _settled(folder / "first", None)
        began = time.monotonic()
        statuses = search_light(folder / "second" / "run", trials, slots, seconds)
        took = time.monotonic() - began
        after = _settled(folder / "second", before)
    left = {name: after[name] - before[name] for name in after if after[name] > before[name]}
    return {
        "setup": {"trials": trials, "slots": slots, "nodes": nodes, "seconds_per_epoch": seconds},
        "before": before, "after": after, "left": left, "statuses": dict(statuses),
        "seconds": took,
    }  # fmt: skip


def _settled(folder: Path, expected: dict[str, int] | None) -> dict[str, int]:
    """The counts, once nothing is above `expected`, or nothing changes any more."""
    deadline, found = time.monotonic() + SETTLE_SECONDS, count(folder)
    while time.monotonic() < deadline:
        time.sleep(2.0)
        last, found = found, count(folder)
        if expected is None and found == last:
            break
        if expected and all(found[name] <= expected[name] for name in found):
            break
    return found


def main() -> None:
    """Measure once, print and write the result; exit 1 if something was left or a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=1000, metavar="N")
    parser.add_argument("--slots", type=int, default=40, metavar="N", help="trials at once (40)")
    parser.add_argument("--nodes", type=int, default=0, metavar="N", help="of a cluster (0: none)")
    parser.add_argument("--seconds", type=float, default=0.1, metavar="X", help="an epoch (0.1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        result = {"machine": machine(threads=1)} | measure(
            Path(folder), trials=args.trials, slots=args.slots, nodes=args.nodes,
            seconds=args.seconds,
        )  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)
    raise SystemExit(bool(result["left"] or result["statuses"].get("failed")))


if __name__ == "__main__":
    main()
