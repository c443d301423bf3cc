"""Filling the teacher's cache with all the slots that the trials will have, on every node."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.teacher import uses_cache
from ekd_ray.engine.teacher_fill import FillPart, fill_tables
from ekd_ray.files import write_json
from ekd_ray.results.study import CACHE_COST
from ekd_ray.scale.observer import Observer

# More parts than slots, so that progress is seen and no slot waits long for the last one.
PARTS_PER_SLOT = 4


def fill_cache(
    config: StudyConfig,
    base: DistillConfig,
    seeds: Sequence[int],
    observer: Observer,
    *,
    run: Path | None = None,
) -> None:
    """Compute the teacher's logits for the runs of `base` under `seeds`, on each node's disk.

    Runs that draw the same views share them: a search needs those of one seed, whatever the
    number of its trials. Without a cache, or with `teacher_fill: lazy`, nothing is done.

    Args:
        base: the shared settings, resolved; its validation fraction says which images.
        run: the study's folder, whose `cache.json` then says what the network was asked, and
            what it took.

    Raises:
        UserError: bad data. ray.exceptions.RayError: a node was lost.
    """
    if config.teacher_fill != "eager" or not uses_cache(base, config.data_root):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_retries=2)(_fill_part)
    pending: list[Any] = []
    rows, timed, seconds = 0, 0, 0.0
    slots = _slots(config)
    total = sum(PARTS_PER_SLOT * count for count in slots.values())
    observer.filled(0, total)
    for node, count in slots.items():
        parts = PARTS_PER_SLOT * count
        for index in range(parts):
            options = task.options(
                num_cpus=config.cpus_per_trial,
                num_gpus=config.gpus_per_trial or None,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            reference = options.remote(
                base.to_dict(), config.data_root, list(seeds), index, parts, config.cpus_per_trial
            )
            pending.append(reference)
    try:
        while pending:
            done, _ = ray.wait(pending)
            for reference in done:
                asked, of_these, took = ray.get(reference)
                rows, timed, seconds = rows + asked, timed + of_these, seconds + took
                pending.remove(reference)
                observer.filled(total - len(pending), total)
    finally:
        for reference in pending:
            ray.cancel(reference)
    if run:
        _record(run / CACHE_COST, {"rows": rows, "timed_rows": timed, "seconds": seconds})


def _slots(config: StudyConfig) -> dict[str, int]:
    """Node id -> how many parts fit there at once, for nodes on which at least one does."""
    import ray

    found = {}
    for node in ray.nodes():
        have = node["Resources"]
        slots = int(have.get("CPU", 0) // config.cpus_per_trial)
        if config.gpus_per_trial:
            slots = min(slots, int(have.get("GPU", 0) / config.gpus_per_trial + 1e-9))
        if node["Alive"] and slots:
            found[node["NodeID"]] = slots
    return found


def _fill_part(
    settings: dict[str, Any],
    data_root: str | None,
    seeds: list[int],
    index: int,
    count: int,
    threads: int,
) -> tuple[int, int, float]:
    """(rows computed, those of them that were timed, their seconds): the first batch, before
    which the network is loaded, is not."""
    marks: list[tuple[int, float]] = []
    rows = fill_tables(
        DistillConfig.from_dict(settings),
        data_root=data_root,
        seeds=seeds,
        part=FillPart(index=index, count=count),
        threads=threads,
        on_progress=lambda done, _: marks.append((done, time.monotonic())),
    )
    if len(marks) < 2:
        return rows, 0, 0.0
    return rows, marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]


def _record(path: Path, found: dict[str, float]) -> None:
    """Add to what earlier fills of the study took."""
    before = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {name: before.get(name, 0) + value for name, value in found.items()})
