"""Filling the teacher's cache with all the slots that the trials will have, on every node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.teacher import uses_cache
from ekd_ray.engine.teacher_fill import FillPart, fill_tables
from ekd_ray.scale.observer import Observer

# More parts than slots, so that progress is seen and no slot waits long for the last one.
PARTS_PER_SLOT = 4


def fill_cache(
    config: StudyConfig, base: DistillConfig, seeds: Sequence[int], observer: Observer
) -> None:
    """Compute the teacher's logits for the runs of `base` under `seeds`, on each node's disk.

    Runs that draw the same views share them: a search needs those of one seed, whatever the
    number of its trials. Without a cache, or with `teacher_fill: lazy`, nothing is done.

    Args:
        base: the shared settings, resolved; its validation fraction says which images.

    Raises:
        UserError: bad data. ray.exceptions.RayError: a node was lost.
    """
    if config.teacher_fill != "eager" or not uses_cache(base, config.data_root):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_retries=2)(_fill_part)
    pending: list[Any] = []
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
                ray.get(reference)
                pending.remove(reference)
                observer.filled(total - len(pending), total)
    finally:
        for reference in pending:
            ray.cancel(reference)


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
) -> int:
    return fill_tables(
        DistillConfig.from_dict(settings),
        data_root=data_root,
        seeds=seeds,
        part=FillPart(index=index, count=count),
        threads=threads,
    )
