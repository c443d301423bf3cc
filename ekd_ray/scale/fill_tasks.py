"""Filling the teacher's cache with all the slots that the trials will have, on every node."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import default_cache_dir
from ekd_ray.engine.decoding import share_cores
from ekd_ray.engine.teacher.fill import FillPart, fill_tables
from ekd_ray.engine.teacher.source import uses_cache
from ekd_ray.errors import UserError
from ekd_ray.files import make_private, read_text, write_json
from ekd_ray.results.progress import read_fill
from ekd_ray.results.records import CACHE_COST
from ekd_ray.scale.cluster import count_workers, live_nodes, own_cores, with_gpus
from ekd_ray.scale.tasks import as_task
from ekd_ray.scale.tracking import Observer

# More parts than slots, so that progress is seen and no slot waits long for the last one.
PARTS_PER_SLOT = 4
PARTS_PER_GPU_SLOT = 2  # each in a process of its own, which is seconds in coming up
IDENTITY = "identity"  # in a cache folder: the same for all nodes that see it


def fill_cache(
    config: StudyConfig,
    base: DistillConfig,
    seeds: Sequence[int],
    observer: Observer,
    *,
    run: Path | None = None,
) -> Counter[str]:
    """Compute the teacher's logits for the runs of `base` under `seeds`, once on each disk.

    Runs that draw the same views share them: a search needs those of one seed, whatever the
    number of its trials. Without a cache, or with `teacher_fill: lazy`, nothing is done. What a
    node that is lost had still to do, or one that joins later lacks, its trials ask themselves.

    Args:
        base: the shared settings, resolved; its validation fraction says which images.
        run: the study's folder, whose `cache.json` then says what the network was asked, and
            what it took.

    Returns:
        `rows` computed, those of them that were timed (`timed_rows`), and their `seconds`.

    Raises:
        UserError: bad data. ray.exceptions.RayError: a process died on a node that lives.
    """
    cost: Counter[str] = Counter()
    if config.teacher_fill != "eager" or not uses_cache(base, config.data_root):
        return cost
    import ray

    config = with_gpus(config)
    task = as_task(_fill_part, config)
    pending: dict[Any, str] = {}
    parts_per_slot = PARTS_PER_GPU_SLOT if config.gpus else PARTS_PER_SLOT
    for slots in _slots_by_disk(config):
        parts = parts_per_slot * len(slots)
        for index in range(parts):
            node = slots[index % len(slots)]
            reference = task.options(scheduling_strategy=_on(node)).remote(
                base.to_dict(), config.data_root, list(seeds), index, parts, config.cpus_per_trial
            )
            pending[reference] = node
    total = len(pending)
    observer.filled(0, total)
    try:
        while pending:
            for reference in ray.wait(list(pending))[0]:
                node = pending.pop(reference)
                try:
                    cost.update(ray.get(reference))
                except ray.exceptions.RayError:
                    if node in live_nodes():
                        raise
                observer.filled(total - len(pending), total)
    finally:
        for reference in pending:
            ray.cancel(reference)
    if run:
        cost.update(read_fill(run))  # what earlier fills of the study took
        write_json(
            run / CACHE_COST, {name: cost[name] for name in ("rows", "timed_rows", "seconds")}
        )
    return cost


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _slots_by_disk(config: StudyConfig) -> list[list[str]]:
    """The slots of each cache folder of the cluster: ids of the nodes that share it, in turns,
    each as often as workers fit on the node at once."""
    import ray

    cpus, gpus = config.cpus_per_trial, config.gpus
    slots = {
        name: count
        for name, node in live_nodes().items()
        if (count := count_workers(node, cpus=cpus, gpus=gpus))
    }
    if len(slots) < 2:
        return [[node] * count for node, count in slots.items()]
    task = ray.remote(num_cpus=0, max_retries=2)(name_cache_folder)
    asked = {node: task.options(scheduling_strategy=_on(node)).remote() for node in slots}
    found: dict[str, str] = {}
    for node, reference in asked.items():
        try:
            found[node] = ray.get(reference)
        except ray.exceptions.RayError:
            if node in live_nodes():
                raise
    return take_turns(slots, found)


def take_turns(slots: Mapping[str, int], disks: Mapping[str, str]) -> list[list[str]]:
    """The nodes of each disk, in turns, each as often as it has slots.

    Args:
        slots: how many each node has; disks: which of them each node sees.
    """
    shared: dict[str, list[str]] = {}
    for node, disk in disks.items():
        shared.setdefault(disk, []).append(node)
    return [
        [node for turn in range(max(map(slots.__getitem__, nodes))) for node in nodes
         if turn < slots[node]]
        for nodes in shared.values()
    ]  # fmt: skip


def name_cache_folder() -> str:
    """The name of this node's cache folder, which nodes that share it find there."""
    path = default_cache_dir() / IDENTITY
    mine = uuid.uuid4().hex
    try:
        make_private(path.parent)
        new = path.with_name(f".{path.name}.{mine}.tmp")
        new.write_text(mine, encoding="utf-8")
        with contextlib.suppress(FileExistsError):  # linked as a whole, by the first
            os.link(new, path)
        new.unlink()
        return read_text(path)
    except (OSError, UserError):  # nothing is kept there, so nothing is shared
        return mine


def _fill_part(
    settings: dict[str, Any],
    data_root: str | None,
    seeds: list[int],
    index: int,
    count: int,
    threads: int,
) -> dict[str, float]:
    """Fill one part: rows computed, those of them that were timed, and their seconds.

    The first batch, before which the network is loaded, is not timed.
    """
    share_cores(own_cores())
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
        return {"rows": rows, "timed_rows": 0, "seconds": 0.0}
    (first, began), (last, ended) = marks[0], marks[-1]
    return {"rows": rows, "timed_rows": last - first, "seconds": ended - began}
