"""The race of searches over all recorded pairs: `python -m benchmarks.run search`.

Every contestant searches every table under the same seeds; what is compared is paired by seed.
All regrets are in points of `val_top1`, all intervals 95 %, by bootstrap over the seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.opponents import OPPONENTS
from benchmarks.simulate import CONTESTANTS, TOLD, Contestant, Outcome, base_study, race
from benchmarks.tables import TABLES, open_target
from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import local_cpus

EVERYONE = {**CONTESTANTS, **TOLD, **OPPONENTS}
REFERENCE = "random"  # whose regret at the end the others have to reach
# Whose figures are reported. The best opponent is held against the one that knows other pairs.
COLD, TRANSFER, REVERSED = "default", "default+transfer", "default+reversed"
POINTS = 100  # of val_top1
SLOW_SEEDS = 10  # of a search whose model takes a minute
DRAWS = 2000  # of the bootstrap


def flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags of the race."""
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="searches of each (8)")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="0 to 19 are for development (0)"
    )
    parser.add_argument("--budget", type=int, default=300, metavar="EPOCHS", help="(300)")
    parser.add_argument(
        "--opponents", default="all", metavar="NAME,...", help="all, none, or some by name (all)"
    )
    parser.add_argument("--tables", default=",".join(TABLES), metavar="NAME,...")
    parser.add_argument(
        "--only", metavar="NAME,...", help="these contestants, beside random search"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="outcomes as JSON lines; those that are there "
        "are not raced again: a race that was cut off goes on, and others' searches are run once",
    )  # fmt: skip


def check_flags(args: argparse.Namespace, refuse: Callable[[str], Any]) -> None:
    """Split the lists of the race, and refuse what cannot be raced."""
    for name in ("seeds", "budget"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be >= 1, got {getattr(args, name)}")
    if args.first_seed < 0:
        refuse(f"--first-seed must be >= 0, got {args.first_seed}")
    choices: dict[str, Collection[str]] = {
        "tables": TABLES, "opponents": ("all", "none", *OPPONENTS), "only": EVERYONE
    }  # fmt: skip
    for name, known in choices.items():
        names = [*filter(None, (getattr(args, name) or "").split(","))]
        for unknown in [n for n in names if n not in known]:
            refuse(f"--{name} does not know {unknown!r}: choose of {', '.join(known)}")
        setattr(args, name, names)


def entrants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Those that race."""
    if args.only:
        return {n: c for n, c in EVERYONE.items() if n in (REFERENCE, *args.only)}
    everyone, none = "all" in args.opponents, "none" in args.opponents
    chosen = {n: c for n, c in OPPONENTS.items() if everyone or (n in args.opponents and not none)}
    return {**CONTESTANTS, **chosen}


def measure(args: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Race all, in as many processes as there are CPUs."""
    racing, not_run = {}, {}
    for name, contestant in entrants(args).items():
        if contestant.package and not importlib.util.find_spec(contestant.package):
            not_run[name] = f"{contestant.package} is not installed: see docs/search.md, The race"
        else:
            racing[name] = contestant
    jobs = [
        (name, table, args.first_seed + index, args.budget)
        for name, contestant in racing.items()
        for table in args.tables
        for index in range(min(args.seeds, SLOW_SEEDS) if contestant.slow else args.seeds)
    ]
    known = _read_kept(args.keep)
    due = [job for job in jobs if job not in known]
    # Several processes share the CPUs: each is to have one thread.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with multiprocessing.get_context("spawn").Pool(local_cpus()) as pool:
        for count, (job, run) in enumerate(pool.imap(_one, due), start=1):
            known[job] = run
            if args.keep:
                with open(args.keep, "a", encoding="utf-8") as file:
                    file.write(json.dumps([*job, asdict(run)]) + "\n")
            if count == len(due) or due[count][:2] != job[:2]:
                note(f"{count}/{len(due)} searches, {job[0]} on {job[1]} is done")
    for job in jobs:
        if reason := known[job].failed:
            not_run.setdefault(job[0], reason)
    whole = [name for name in racing if name not in not_run]
    found: dict[str, dict[str, list[Outcome]]] = {n: {t: [] for t in args.tables} for n in whole}
    seconds: dict[str, list[float]] = {name: [] for name in whole}
    for job in jobs:
        outcome = known[job].outcome
        if job[0] in found and outcome:
            found[job[0]][job[1]].append(outcome)
            seconds[job[0]].append(known[job].seconds)
    for name, reason in not_run.items():
        note(f"{name:24s} was not run: {reason}")
    return {
        **summarize(found, {name: racing[name].rival for name in found}),
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "not_run": not_run,
        "seconds": {name: float(np.mean(spent)) for name, spent in seconds.items()},
        "landscapes": {table: _facts(table) for table in args.tables},
    }


def _facts(table: str) -> dict[str, Any]:
    target = open_target(table)
    return {
        "explained": target.landscape.explained,
        "noise": POINTS * target.landscape.noise,
        "best": POINTS * target.landscape.best,
        "fitted": len(target.fitted),
        "sources": {source.name: len(source.rows) for source in target.sources},
    }


@cache
def _base() -> StudyConfig:
    logging.disable(logging.WARNING)
    return base_study(Path(tempfile.mkdtemp()))


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of a search, or why an opponent has none; and its seconds of processor time."""

    outcome: Outcome | None
    seconds: float
    failed: str | None = None


Job = tuple[str, str, int, int]  # contestant, table, seed, budget


def _one(job: Job) -> tuple[Job, Run]:
    name, table, seed, budget = job
    contestant, started = EVERYONE[name], time.process_time()
    found, failed = None, None
    try:
        found = race(open_target(table), contestant, _base(), seed=seed, budget=budget)
    except Exception as error:
        if not contestant.package:
            raise
        failed = f"{type(error).__name__}: {error}"
    return job, Run(outcome=found, seconds=time.process_time() - started, failed=failed)


def _read_kept(path: Path | None) -> dict[Job, Run]:
    """The searches that were raced before; a line that a kill cut off is raced again."""
    known: dict[Job, Run] = {}
    if path is None or not path.exists():
        return known
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    path.write_text(whole, encoding="utf-8")  # what comes next begins a line
    for line in whole.splitlines():
        *job, run = json.loads(line)
        if not run["failed"]:
            outcome = Outcome(**run.pop("outcome"))
            known[tuple(job)] = Run(outcome=outcome, **run)
    return known


# Figures


def epochs_to_reach(mean: Sequence[float] | NDArray[np.float64], regret: float) -> int | None:
    """The first epoch from which on the mean regret is at most `regret`."""
    above = np.flatnonzero(np.asarray(mean) > regret)
    first = int(above[-1]) + 1 if len(above) else 0
    return first + 1 if first < len(mean) else None


Figure = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # of some searches: [tables]


def interval(count: int, figure: Figure) -> tuple[float, float]:
    """95 % interval of a figure's mean over the tables, by bootstrap over `count` searches."""
    rng = np.random.default_rng(0)
    draws = [figure(rng.integers(0, count, count)).mean() for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return low, high


def summarize(
    found: Mapping[str, Mapping[str, Sequence[Outcome]]], rivals: Mapping[str, bool]
) -> dict[str, Any]:
    """All figures of a race.

    Args:
        found: outcomes by contestant and table, in the order of the seeds; slow contestants have
            those of the first ones.
        rivals: whether a contestant is an opponent.

    Returns:
        `figures`, which are means over the tables, None where a contestant is missing; their
        `intervals` and `by_table`; `best_opponent`; the mean `regret` over the tables after every
        epoch, by contestant, and of that the epochs to random's at the end (`epochs_of_mean`); and
        all of each table and contestant (`tables`).
    """
    tables = list(next(iter(found.values()), {}))

    def points(name: str, attribute: str) -> NDArray[np.float64]:
        """[tables, searches] or [tables, searches, epochs]."""
        return POINTS * np.array([[getattr(o, attribute) for o in found[name][t]] for t in tables])

    regret, oracle, confirmed = (
        {name: points(name, attribute) for name in found}
        for attribute in ("regret", "oracle", "confirmed")
    )
    ends = {name: values[:, :, -1] for name, values in regret.items()}

    def epochs(name: str) -> Figure:
        def figure(of: NDArray[np.int64]) -> NDArray[np.float64]:
            means, targets = regret[name][:, of].mean(axis=1), ends[REFERENCE][:, of].mean(axis=1)
            reached = [epochs_to_reach(m, t) for m, t in zip(means, targets, strict=True)]
            return np.array([epoch or means.shape[1] for epoch in reached])  # at least

        return figure

    def mean_of(values: NDArray[np.float64]) -> Figure:
        return lambda of: values[:, of].mean(axis=1)

    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    by_table: dict[str, Any] = {}

    def put(key: str, figure: Figure, count: int) -> None:
        values = figure(np.arange(count))
        figures[key], intervals[key] = float(values.mean()), interval(count, figure)
        by_table[key] = dict(zip(tables, values.tolist(), strict=True))

    for key, name, make in (
        ("epochs_to_random/transfer", TRANSFER, epochs),
        ("epochs_to_random/cold", COLD, epochs),
        ("epochs_to_random/reversed", REVERSED, epochs),
        ("regret_300/confirmed", COLD, lambda name: mean_of(confirmed[name])),
        ("regret_300/reversed", REVERSED, lambda name: mean_of(ends[name])),
    ):
        figures[key] = None
        if name in found and REFERENCE in found:
            put(key, make(name), ends[name].shape[1])
    opponents = sorted((n for n in found if rivals[n]), key=lambda n: float(ends[n].mean()))
    difference = "best_opponent/paired_difference"
    figures |= dict.fromkeys((difference, f"{difference}/low", f"{difference}/high"))
    if opponents and TRANSFER in found:
        shared = min(ends[name].shape[1] for name in (opponents[0], TRANSFER))
        gain = ends[opponents[0]][:, :shared] - ends[TRANSFER][:, :shared]
        put(difference, mean_of(gain), shared)
        figures[f"{difference}/low"], figures[f"{difference}/high"] = intervals.pop(difference)
    means = {name: _spread(values.mean(axis=0)) for name, values in regret.items()}
    of_tables = {
        table: {
            name: {
                "searches": len(found[name][table]),
                "regret": _spread(regret[name][index]),
                "oracle": _spread(oracle[name][index]),
                "confirmed": _spread(confirmed[name][index][:, None]),
                "confirm_epochs": float(np.mean([o.confirming for o in found[name][table]])),
            }
            for name in found
        }
        for index, table in enumerate(tables)
    }
    reached = {}
    if REFERENCE in found:
        reached = {n: epochs_to_reach(m["mean"], ends[REFERENCE].mean()) for n, m in means.items()}
        for name in found:
            values = epochs(name)(np.arange(ends[name].shape[1]))
            for table, epoch in zip(tables, values.tolist(), strict=True):
                of_tables[table][name]["epochs_to_random"] = epoch
    return {
        "figures": figures, "intervals": intervals, "by_table": by_table,
        "best_opponent": opponents[0] if opponents else None,
        "regret": means, "epochs_of_mean": reached, "tables": of_tables,
    }  # fmt: skip


def _spread(values: NDArray[np.float64]) -> dict[str, list[float]]:
    """Mean and 95 % interval over searches [searches, epochs], at every epoch."""
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    weights = np.zeros((DRAWS, len(values)))
    np.add.at(weights, (np.arange(DRAWS)[:, None], draws), 1 / len(values))
    low, high = np.quantile(weights @ values, [0.025, 0.975], axis=0)
    mean = values.mean(axis=0)
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
