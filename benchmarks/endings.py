"""How studies end on recorded learning curves, under several rules of early stopping.

    python -m benchmarks.endings benchmarks/curves/NAME.parquet --trials 12 --seeds 40

A study of so many trials is searched on the curves as `benchmarks.simulate` does it, and its best
`--top-k` trials of full length are scored under three fresh seeds: the best mean wins. Printed
are medians over studies, with the quartiles: the trials of full length, the finalists, the epochs
of the search, what the winner lacks of the best there is (regret, in points, noise left out), and
the regret of the best configuration that the study tried at all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.curves import recorded_study
from benchmarks.landscape import Landscape
from benchmarks.simulate import CHANCE, Epoch, Ours, play, stand_in
from ekd_ray.config import StudyConfig
from ekd_ray.files import write_json
from ekd_ray.scale.full_runs import FullRuns
from ekd_ray.scale.samplers import SAMPLERS
from ekd_ray.scale.schedulers import NoStopping, make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.space import Space

SEEDS = 3  # fresh ones of each finalist
# What is changed of a study, whether chance is looked at, and whether stopped trials run in full.
RULES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "all compared, no full runs": ({}, False, False),
    "chance rule": ({}, True, False),
    "full runs": ({}, False, True),
    "both (default)": ({}, True, True),
    "nothing stopped": ({"scheduler": "none"}, False, False),
    **{f"first rung at {n}": ({"grace_epochs": n}, True, True) for n in (1, 2, 3, 4, 6)},
}
FIGURES = ("full length", "finalists", "epochs", "regret", "best tried")


def end_study(
    job: tuple[int, str, int], landscape: Landscape, base: StudyConfig
) -> dict[str, float]:
    """The figures of one study of so many trials, under a rule and a seed: see the module."""
    trials, name, seed = job
    changes, by_chance, in_full = RULES[name]
    config = base.replace(trials=trials, seed=seed, **changes)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        epochs = list(_search(landscape, config, Path(folder), rng, by_chance, in_full))
    ends = [done for done in epochs if done.epoch == landscape.epochs]
    ranked = sorted(ends, key=lambda done: -done.seen)[: config.confirm_top_k]
    means = [np.mean(landscape.fresh_scores(done.true, SEEDS, rng)) for done in ranked]
    winner = ranked[int(np.argmax(means))]
    found = (
        len(ends), len(ranked), len(epochs), 100 * (landscape.best - winner.true),
        100 * (landscape.best - max(done.true for done in epochs)),
    )  # fmt: skip
    return dict(zip(FIGURES, map(float, found), strict=True))


def _search(
    landscape: Landscape, config: StudyConfig, folder: Path, rng: np.random.Generator,
    by_chance: bool, in_full: bool,
) -> Iterator[Epoch]:  # fmt: skip
    searcher = OptunaSearcher(folder, config, config.distill)
    scheduler = make_scheduler(config, chance=CHANCE if by_chance else None)
    yield from play(landscape, Ours(searcher), scheduler, rng)
    if in_full:
        full_runs = FullRuns(folder, config, config.distill, budget=searcher.budget, chance=CHANCE)
        yield from play(landscape, Ours(full_runs), NoStopping(), rng)


def main() -> None:
    """Let studies end under all rules."""
    parser = argparse.ArgumentParser(description="How studies end on recorded curves.")
    parser.add_argument("table", type=Path)
    parser.add_argument("--trials", type=int, nargs="+", default=[12, 32], metavar="N")
    parser.add_argument("--top-k", type=int, default=3, metavar="K")
    parser.add_argument("--seeds", type=int, default=40, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument("--sampler", default="tpe", choices=tuple(SAMPLERS))
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="rules with this in the name"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    recorded = json.loads(pq.read_schema(args.table).metadata[b"ekd_ray"])["base"]
    study = recorded_study()
    landscape = Landscape(args.table, Space(study.space))
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        schedule = {"epochs": recorded["epochs"], "schedule": recorded["schedule"]}
        distill = stand_in(Path(folder), **schedule)
        base = study.replace(distill=distill, confirm_top_k=args.top_k, sampler=args.sampler)
        names = [name for name in RULES if any(text in name for text in args.only)]
        jobs = [(n, name, seed) for n in args.trials for name in names for seed in seeds]
        end = partial(end_study, landscape=landscape, base=base)
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for (n, name, _), one in zip(jobs, pool.imap(end, jobs), strict=True):
                figures = results.setdefault(f"{n} trials, {name}", {f: [] for f in FIGURES})
                for figure, value in one.items():
                    figures[figure].append(value)
                if len(figures["regret"]) == args.seeds:
                    cells = " | ".join(map(_spread, figures.values()))
                    print(f"| {n} | {name} | {cells} |", flush=True)
    if args.json:
        write_json(args.json, {"n": args.seeds, "schedule": schedule, "endings": results})


def _spread(values: list[float]) -> str:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{median:.2f} [{low:.2f}, {high:.2f}] mean {np.mean(values):.2f}"


if __name__ == "__main__":
    main()
