"""Filling a teacher's table ahead of the runs that will read it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ekd_ray.config import DistillConfig
from ekd_ray.data import epoch_samples, epoch_strong_ids, epoch_views, steps_per_epoch
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.precision import cpu_threads, pick_device, resolve_precision
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import RunData, load_run_data, strong_images
from ekd_ray.engine.teacher.source import Teacher, load_teacher
from ekd_ray.engine.teacher.table import Ids
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import method_of

FILL_BATCH = 256
CHECK_ROWS = 1 << 14  # looked at together: 33 MB at 1,000 classes


@dataclass(frozen=True, kw_only=True)
class FillPart:
    """One of `count` equal parts of the work, `index` from 0; parts share no row."""

    index: int = 0
    count: int = 1


def fill_tables(
    config: DistillConfig,
    *,
    data_root: str | None,
    seeds: Sequence[int],
    part: FillPart | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute the rows that runs of `config` under `seeds` will read, where they are missing.

    Args:
        config: resolved, with a teacher; its epochs say which views are drawn.
        part: the share of the samples to do.
        on_progress: called with (rows done, rows in all) of this part.

    Returns:
        The number of rows that the network was asked for.

    Raises:
        UserError: bad configuration or data.
    """
    part = part or FillPart()
    with cpu_threads(threads), arithmetic(deterministic=False):
        config = resolve(config, data_root=data_root)
        device = pick_device()
        precision = resolve_precision(config.precision, device)
        data = load_run_data(config, data_root=data_root, device=device)
        jobs: list[tuple[Teacher, Ids, Ids, bool]] = []
        method = method_of(config)
        for strong in (False, True) if method.strong_view else (False,):
            teacher = load_teacher(config, data, precision=precision, device=device, strong=strong)
            jobs.append((teacher, *_missing(teacher, config, data, seeds, part, strong), strong))
        total, done = sum(len(samples) for _, samples, _, _ in jobs), 0
        for teacher, samples, views, strong in jobs:
            for start in range(0, len(samples), FILL_BATCH):
                ids = samples[start : start + FILL_BATCH], views[start : start + FILL_BATCH]
                if teacher.table is None:  # it could not be opened, or the disk is full now
                    return done
                images = strong_images(config, data, *ids) if strong else data.views(*ids)
                teacher.logits(images, *ids)
                done += len(ids[0])
                if on_progress:
                    on_progress(done, total)
            teacher.flush()
            if not strong and teacher.table and (teacher.computed or method.class_cosines):
                with contextlib.suppress(UserError):  # a teacher without one suits other methods
                    _ = teacher.classifier  # which stores it beside the rows
        return done


def _missing(
    teacher: Teacher,
    config: DistillConfig,
    data: RunData,
    seeds: Sequence[int],
    part: FillPart,
    strong: bool,
) -> tuple[Ids, Ids]:
    """(sample ids, view ids) of this part's rows that are not in the table, each once."""
    num_views = config.view_pool if strong else data.num_views
    drawn = [
        samples * num_views + views for samples, views in _drawn(config, data, seeds, part, strong)
    ]
    positions = np.unique(np.concatenate(drawn))
    samples, views = positions // num_views, positions % num_views
    if teacher.table is None:
        return samples[:0], views[:0]
    missing = np.zeros(len(samples), dtype=bool)
    for start in range(0, len(samples), CHECK_ROWS):
        chunk = slice(start, start + CHECK_ROWS)
        missing[chunk] = ~teacher.table.read(samples[chunk], views[chunk])[1]
    return samples[missing], views[missing]


def _drawn(
    config: DistillConfig, data: RunData, seeds: Sequence[int], part: FillPart, strong: bool
) -> Iterator[tuple[Ids, Ids]]:
    """(sample ids, view ids) that the training loop draws of this part's samples, by epochs."""
    num_views = data.num_views
    trained = steps_per_epoch(len(data.train_ids), config.batch_size) * config.batch_size
    for seed in seeds:
        for epoch in range(1, config.epochs + 1):
            # The loop drops an incomplete last batch: another part of the order every epoch.
            samples, turns = epoch_samples(
                data.train_ids, seed, epoch,
                labels=data.train_labels, class_balance=config.class_balance,
            )  # fmt: skip
            own = np.flatnonzero(samples[:trained] % part.count == part.index)
            samples, turns = samples[own], turns[own]
            if strong:
                yield samples, epoch_strong_ids(samples, seed, turns, config.view_pool)
            else:
                yield samples, epoch_views(samples, seed, turns, num_views)
