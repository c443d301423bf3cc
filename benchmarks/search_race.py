"""The race of searches over all recorded pairs: `python -m benchmarks.run search`.

Every contestant searches every table under the same seeds; what is compared is paired by seed.
All regrets are in points of `val_top1`, all intervals 95 %, by bootstrap over the seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
DRAWS = 2000  # of the bootstrap
Figure = Callable[[Mapping[str, NDArray[np.float64]]], float]


def flags(parser: argparse.ArgumentParser) -> None:
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


def check_flags(args: argparse.Namespace, refuse: Callable[[str], Any]) -> None:
    """Split the lists of the race, and refuse what cannot be raced."""
    for name in ("seeds", "budget"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be >= 1, got {getattr(args, name)}")
    if args.first_seed < 0:
        refuse(f"--first-seed must be >= 0, got {args.first_seed}")
    choices = {"tables": TABLES, "opponents": {"all": 0, "none": 0, **OPPONENTS}, "only": EVERYONE}
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
            not_run[name] = f"{contestant.package} is not installed: pip install '.[bench]'"
        else:
            racing[name] = contestant
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(name, table, seed, args.budget)
            for name in racing for table in args.tables for seed in seeds]  # fmt: skip
    found: dict[str, dict[str, list[Outcome]]] = {n: {t: [] for t in args.tables} for n in racing}
    seconds: dict[str, list[float]] = {name: [] for name in racing}
    # Several processes share the CPUs: each is to have one thread.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with multiprocessing.get_context("spawn").Pool(local_cpus()) as pool:
        for (name, table, _, _), (outcome, spent) in zip(jobs, pool.imap(_one, jobs), strict=True):
            if isinstance(outcome, str):
                not_run.setdefault(name, outcome)
                continue
            found[name][table].append(outcome)
            seconds[name].append(spent)
            if len(seconds[name]) == len(args.tables) * args.seeds:
                ends = [o.regret[-1] for of_table in found[name].values() for o in of_table]
                note(f"{name:24s} regret {POINTS * float(np.mean(ends)):.2f}, "
                     f"{np.mean(seconds[name]):.1f} s a search")  # fmt: skip
    for name, reason in not_run.items():
        note(f"{name:24s} was not run: {reason}")
    whole = {name: found[name] for name in racing if name not in not_run}
    return {
        **summarize(whole, {name: racing[name].rival for name in whole}),
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "not_run": not_run,
        "seconds": {name: float(np.mean(seconds[name])) for name in whole},
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


def _one(job: tuple[str, str, int, int]) -> tuple[Outcome | str, float]:
    """The outcome of a search, or why an opponent has none; and its seconds of processor time."""
    name, table, seed, budget = job
    contestant, started = EVERYONE[name], time.process_time()
    try:
        found: Outcome | str = race(
            open_target(table), contestant, _base(), seed=seed, budget=budget
        )
    except Exception as error:
        if not contestant.package:
            raise
        found = f"{type(error).__name__}: {error}"
    return found, time.process_time() - started


# Figures


def epochs_to_reach(mean: Sequence[float] | NDArray[np.float64], regret: float) -> int | None:
    """The first epoch from which on the mean regret is at most `regret`."""
    above = np.flatnonzero(np.asarray(mean) > regret)
    first = int(above[-1]) + 1 if len(above) else 0
    return first + 1 if first < len(mean) else None


def interval(count: int, figure: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
    """95 % interval of a figure of some of `count` searches, by bootstrap over these."""
    rng = np.random.default_rng(0)
    draws = [figure(rng.integers(0, count, count)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return low, high


def summarize(
    found: Mapping[str, Mapping[str, Sequence[Outcome]]], rivals: Mapping[str, bool]
) -> dict[str, Any]:
    """All figures of a race.

    Args:
        found: outcomes by contestant and table, in the order of the seeds.
        rivals: whether a contestant is an opponent.

    Returns:
        `figures`, which are means over the tables, None where a contestant is missing; their
        `intervals` and, by table, `by_table`; the mean `regret` of each contestant over the tables
        after every epoch, and by table `tables`.
    """
    names = list(found)
    tables = list(found[names[0]]) if names else []
    regret = {n: {t: POINTS * np.array([o.regret for o in found[n][t]]) for t in tables}
              for n in names}  # fmt: skip
    oracle = {n: {t: POINTS * np.array([o.oracle for o in found[n][t]]) for t in tables}
              for n in names}  # fmt: skip
    confirmed = {n: {t: POINTS * np.array([o.confirmed for o in found[n][t]]) for t in tables}
                 for n in names}  # fmt: skip
    count = len(next(iter(regret[names[0]].values()))) if names else 0
    budget = regret[names[0]][tables[0]].shape[1] if names else 0

    def epochs(name: str, table: str, of: NDArray[np.int64]) -> float:
        target = regret[REFERENCE][table][of, -1].mean()
        return epochs_to_reach(regret[name][table][of].mean(axis=0), target) or budget

    def at_end(name: str, table: str, of: NDArray[np.int64]) -> float:
        return float(regret[name][table][of, -1].mean())

    def after_confirm(name: str, table: str, of: NDArray[np.int64]) -> float:
        return float(confirmed[name][table][of].mean())

    def ahead(rival: str) -> Callable[[str, str, NDArray[np.int64]], float]:
        return lambda name, table, of: at_end(rival, table, of) - at_end(name, table, of)

    everyone = np.arange(count)
    kinds: dict[str, tuple[str, Callable[[str, str, NDArray[np.int64]], float]]] = {
        "epochs_to_random/transfer": (TRANSFER, epochs),
        "epochs_to_random/cold": (COLD, epochs),
        "epochs_to_random/reversed": (REVERSED, epochs),
        "regret_300/confirmed": (COLD, after_confirm),
        "regret_300/reversed": (REVERSED, at_end),
    }
    figures: dict[str, Any] = dict.fromkeys(kinds)
    intervals: dict[str, Any] = {}
    by_table: dict[str, Any] = {}

    def put(key: str, name: str, figure: Callable[[str, str, NDArray[np.int64]], float]) -> None:
        by_table[key] = {table: figure(name, table, everyone) for table in tables}
        figures[key] = float(np.mean([*by_table[key].values()]))
        intervals[key] = interval(
            count, lambda of: float(np.mean([figure(name, table, of) for table in tables]))
        )

    for key, (name, figure) in kinds.items():
        if name in found and REFERENCE in found:
            put(key, name, figure)
    mean_end = {n: float(np.mean([at_end(n, t, everyone) for t in tables])) for n in names}
    opponents = sorted((n for n in names if rivals[n]), key=mean_end.__getitem__)
    difference = "best_opponent/paired_difference"
    figures |= dict.fromkeys((difference, f"{difference}/low", f"{difference}/high"))
    if opponents and TRANSFER in found:
        put(difference, TRANSFER, ahead(opponents[0]))
        figures[f"{difference}/low"], figures[f"{difference}/high"] = intervals.pop(difference)
    return {
        "figures": figures,
        "intervals": intervals,
        "by_table": by_table,
        "best_opponent": opponents[0] if opponents else None,
        "regret": {
            n: _spread(np.mean([regret[n][t] for t in tables], axis=0)) for n in names
        },
        "tables": {
            table: {
                n: {
                    "regret": _spread(regret[n][table]),
                    "oracle": _spread(oracle[n][table]),
                    "confirmed": _spread(confirmed[n][table][:, None]),
                    "confirm_epochs": float(np.mean([o.confirming for o in found[n][table]])),
                    "epochs_to_random": epochs(n, table, everyone) if REFERENCE in found else None,
                }
                for n in names
            }
            for table in tables
        },
    }  # fmt: skip


def _spread(values: NDArray[np.float64]) -> dict[str, list[float]]:
    """Mean and 95 % interval over searches [searches, epochs], at every epoch."""
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    weights = np.zeros((DRAWS, len(values)))
    np.add.at(weights, (np.arange(DRAWS)[:, None], draws), 1 / len(values))
    low, high = np.quantile(weights @ values, [0.025, 0.975], axis=0)
    mean = values.mean(axis=0)
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
