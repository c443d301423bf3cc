"""Searches raced on recorded learning curves: regret against epochs spent.

    python -m benchmarks.simulate benchmarks/curves/NAME.parquet --seeds 20 --json out.json \
        --first-from benchmarks/curves/OTHER.parquet ...

Forests fitted to the recorded curves stand for training: a configuration's curve is what they
predict for it, plus the residual curve of a recorded configuration that does about as well (what
fails is noisier than what works), chosen by a hash of the configuration, so that a search sees
noise and sees the same again. Four workers train an epoch
in about the same time; the scheduler is told of every epoch in the order of the clock, and a
free worker asks for the next configuration at once, as under Ray Tune.

Regret is the best value that there is minus the value, without noise, of the configuration
that the search holds for the best after so many epochs.

With tables of other pairs (`--first-from`), the search that starts from their best points races
too: what the pairs' own table says plays no part in those.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from benchmarks.curves import EPOCHS, IMAGES, VALIDATION, recorded_study
from benchmarks.landscape import METRIC, Landscape, Point
from benchmarks.reference import random_teacher
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.files import write_json
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.schedulers import Chance, make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.space import Space
from ekd_ray.scale.worker import RUN
from ekd_ray.studies.warm_start import POINTS

WORKERS = 4
CHANCE = Chance(classes=10, images=round(IMAGES * VALIDATION))


def best_points(table: Path, space: Space) -> list[dict[str, Any]]:
    """The points that a warm start takes from a pair: its best `POINTS` after the last epoch."""
    rows = pq.read_table(table, filters=[("epoch", "=", EPOCHS)]).to_pylist()
    ranked = sorted(rows, key=lambda row: -row[METRIC])[:POINTS]
    return [space.searched_part(row) for row in ranked]


class Player(Protocol):
    """A search: proposes configurations and is told of their epochs."""

    def ask(self, trial_id: str) -> Point | None: ...

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None: ...


class Curves(Protocol):
    """What stands for training: a `Landscape`, or recorded curves themselves."""

    epochs: int

    def curve(self, point: Point) -> tuple[list[float], float]: ...


class Ours:
    """The searcher that studies run, with its journal and its trial folders."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        self.searcher = searcher
        self._folders: dict[str, Path] = {}

    def ask(self, trial_id: str) -> Point | None:
        suggested = self.searcher.suggest(trial_id)
        if not isinstance(suggested, dict):
            return None
        run = RunRecord.from_dict(suggested[RUN])
        self._folders[trial_id] = run.folder
        return run.config

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None:
        with open(self._folders[trial_id] / HISTORY, "a") as file:
            file.write(json.dumps(row) + "\n")
        if last:
            self.searcher.on_trial_complete(trial_id, row)
        else:
            self.searcher.on_trial_result(trial_id, row)


class RaysAdapter:
    """TPE through Ray's own OptunaSearch, as most people run it."""

    def __init__(self, config: StudyConfig, seed: int) -> None:
        from ray.tune.search.optuna import OptunaSearch

        space = Space(config.space)

        def define(trial: Any) -> None:
            space(trial)

        points = [space.searched_part(config.authors or {})]
        self.searcher = OptunaSearch(
            space=define, metric=METRIC, mode="max", seed=seed, points_to_evaluate=points
        )

    def ask(self, trial_id: str) -> Point | None:
        return self.searcher.suggest(trial_id)

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None:
        result = {**row, "training_iteration": row["epoch"]}
        if last:
            self.searcher.on_trial_complete(trial_id, result)
        else:
            self.searcher.on_trial_result(trial_id, result)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to search: which sampler, which scheduler, through whose adapter.

    `usual`: geometric rungs at 1, 3, ... epochs, by the last epoch's score, one in three kept.
    """

    sampler: str
    scheduler: str
    usual: bool = False
    rays_adapter: bool = False
    warm: bool = False

    def config(self, base: StudyConfig, *, seed: int, trials: int) -> StudyConfig:
        """The study that it runs."""
        changes: dict[str, Any] = {}
        if self.usual:
            rungs = [3**k for k in range(9) if 3**k < base.distill.epochs]
            changes = {"rungs": rungs, "reduction_factor": 3, "rung_score": "last"}
        return base.replace(
            sampler=self.sampler, scheduler=self.scheduler, seed=seed, trials=trials,
            first_points=base.first_points if self.warm else [], **changes,
        )  # fmt: skip


CONTESTANTS = {
    "random, full length": Contestant(sampler="random", scheduler="none"),
    "random, ASHA": Contestant(sampler="random", scheduler="asha"),
    "TPE through Ray's adapter, ASHA": Contestant(
        sampler="tpe", scheduler="asha", usual=True, rays_adapter=True
    ),
    "TPE, ASHA at 1 and 3": Contestant(sampler="tpe", scheduler="asha", usual=True),
    "GP, full length": Contestant(sampler="gp", scheduler="none"),
    "TPE, Hyperband (BOHB-like)": Contestant(sampler="tpe", scheduler="hyperband"),
    "TPE, ASHA (default)": Contestant(sampler="tpe", scheduler="asha"),
    "TPE, ASHA, from other pairs": Contestant(sampler="tpe", scheduler="asha", warm=True),
}


@dataclass(frozen=True)
class _Trial:
    """All that a scheduler asks of a trial."""

    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch of a simulated trial: its score, and what the configuration is worth at its end."""

    trial: int
    epoch: int
    seen: float
    point: Point
    true: float


def race(
    landscape: Landscape, contestant: Contestant, base: StudyConfig, *, seed: int, budget: int
) -> list[float]:
    """Regret after 1, 2, ... `budget` epochs of one search (infinite before the first)."""
    config = contestant.config(base, seed=seed, trials=budget)
    scheduler = make_scheduler(config, chance=CHANCE)
    np.random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        player: Player = (
            RaysAdapter(config, seed)
            if contestant.rays_adapter
            else Ours(OptunaSearcher(Path(folder), config, config.distill))
        )
        epochs = play(landscape, player, scheduler, np.random.default_rng(seed))
        return _regrets(itertools.islice(epochs, budget), landscape.best, budget)


def play(
    landscape: Curves, player: Player, scheduler: Any, rng: np.random.Generator
) -> Iterator[Epoch]:
    """Epochs of a search by the clock, until its player suggests nothing more."""
    clock: list[tuple[float, int, int]] = []  # when, trial, epoch that it will have done
    begun: list[tuple[Point, list[float], float]] = []

    def begin(now: float) -> None:
        point = player.ask(f"t{len(begun)}")
        if point is None:
            return
        begun.append((point, *landscape.curve(point)))
        heapq.heappush(clock, (now + rng.uniform(0.9, 1.1), len(begun) - 1, 1))

    for _ in range(WORKERS):
        begin(0.0)
    while clock:
        now, number, epoch = heapq.heappop(clock)
        point, curve, true = begun[number]
        row = {"epoch": epoch, "training_iteration": epoch, METRIC: curve[epoch - 1]}
        stops = epoch == landscape.epochs
        if not stops:
            trial = _Trial({RUN: {"number": number}})
            stops = scheduler.on_trial_result(None, trial, row) == "STOP"
        player.tell(f"t{number}", {**row, "seconds": 1.0}, last=stops)
        yield Epoch(trial=number, epoch=epoch, seen=curve[epoch - 1], point=point, true=true)
        if stops:
            begin(now)
        else:
            heapq.heappush(clock, (now + rng.uniform(0.9, 1.1), number, epoch + 1))


def _regrets(epochs: Iterable[Epoch], best: float, budget: int) -> list[float]:
    regrets: list[float] = []
    held = (0, -np.inf, np.inf)  # epochs, value seen, regret of the best so far
    for done in epochs:
        # What has trained longest is trusted most, then what has scored best.
        held = max(held, (done.epoch, done.seen, best - done.true), key=lambda item: item[:2])
        regrets.append(held[2])
    return [*regrets, *[regrets[-1]] * (budget - len(regrets))]


def summary(regrets: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean and 95 % interval (bootstrap over seeds) by contestant, at every epoch."""
    rng = np.random.default_rng(0)
    found = {}
    for name, values in regrets.items():
        draws = rng.integers(0, len(values), (2000, len(values)))
        means = values[draws].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        found[name] = {
            "mean": values.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()
        }  # fmt: skip
    return found


def epochs_to_reach(mean: list[float], regret: float) -> int | None:
    """The first epoch from which on the mean regret is at most `regret`."""
    above = [index for index, value in enumerate(mean) if value > regret]
    first = above[-1] + 1 if above else 0
    return first + 1 if first < len(mean) else None


def main() -> None:
    """Race all contestants."""
    parser = argparse.ArgumentParser(description="Race searches on recorded learning curves.")
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="of the searches; others than chose"
    )
    parser.add_argument("--budget", type=int, default=300, metavar="EPOCHS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="searches with this in the name")
    parser.add_argument(
        "--first-from", type=Path, nargs="+", default=[], metavar="TABLE",
        help="curves of other pairs, whose best points come first",
    )  # fmt: skip
    args = parser.parse_args()
    study = recorded_study()
    space = Space(study.space)
    found = [point for table in args.first_from for point in best_points(table, space)]
    study = study.replace(first_points=found)
    landscape = Landscape(args.table, space)
    with tempfile.TemporaryDirectory() as folder:
        base = study.replace(distill=_stand_in(Path(folder)))
        regrets = _race_all(landscape, base, args)
    _report(landscape, regrets, args)


def _stand_in(folder: Path) -> DistillConfig:
    """Shared settings that are legal anywhere: points are checked against them, not trained."""
    weights = folder / "teacher.safetensors"
    random_teacher("resnet8", "synthetic", weights)
    return resolve(
        DistillConfig(
            dataset="synthetic", teacher="resnet8", student="resnet8", epochs=EPOCHS,
            teacher_weights=str(weights),
        )
    )  # fmt: skip


def _race_all(
    landscape: Landscape, base: StudyConfig, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    warm = bool(base.first_points)
    names = [n for n, c in CONTESTANTS.items() if args.only in n and (warm or not c.warm)]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(name, seed) for name in names for seed in seeds]
    one = partial(_one, landscape=landscape, base=base, budget=args.budget)
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    with multiprocessing.get_context("spawn").Pool(local_cpus()) as pool:
        for (name, _), regret in zip(jobs, pool.imap(one, jobs), strict=True):
            found[name].append(regret)
            if len(found[name]) == args.seeds:
                mean = np.mean([run[-1] for run in found[name]])
                print(f"{name:35s} final regret {mean:.4f}", flush=True)
    return {name: np.array(runs) for name, runs in found.items()}


def _one(job: tuple[str, int], landscape: Landscape, base: StudyConfig, budget: int) -> list[float]:
    name, seed = job
    return race(landscape, CONTESTANTS[name], base, seed=seed, budget=budget)


def _report(
    landscape: Landscape, regrets: Mapping[str, np.ndarray], args: argparse.Namespace
) -> None:
    found = summary(regrets)
    reference = found.get("random, full length")
    for name, curve in found.items():
        if reference is None:
            continue
        target = reference["mean"][-1]
        print(f"{name:35s} reaches {target:.4f} after {epochs_to_reach(curve['mean'], target)}")
    if args.json:
        facts = {
            "explained": landscape.explained, "noise": landscape.noise, "best": landscape.best,
            "seeds": args.seeds, "first_seed": args.first_seed,
        }  # fmt: skip
        write_json(args.json, {**facts, "regret": found})


if __name__ == "__main__":
    main()
