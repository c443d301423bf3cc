"""A search on real pictures: the default, which knows another pair, random search, Ray's adapter.

python -m benchmarks.real_search --warm-start RUN --keep DIR --json FILE

Each searches the recipe of resnet56a -> resnet8 for equal epochs, under every seed: four workers
by the clock of `benchmarks.simulate.play`, which asks a trial for its next epoch when that is due.
The configuration that a search names in the end is trained under fresh seeds, and after each of
these runs the test split is read once. Every epoch is kept in `--keep`: what was cut off goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import TEACHER_FILE, find_teacher, run
from benchmarks.landscape import METRIC, Point
from benchmarks.measure import machine
from benchmarks.simulate import CONTESTANTS, Contestant, Game, Ledger, play, usual_rungs
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.history import HISTORY, read_rows
from ekd_ray.engine.resolve import resolve
from ekd_ray.files import read_json, write_json
from ekd_ray.results.paired import LEVEL, mean_interval, paired_difference
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.schedulers import Chance, make_scheduler
from ekd_ray.scale.space import Space, point_config
from ekd_ray.studies.fitting import with_epochs
from ekd_ray.studies.recipes import SEARCH_SPACES, load_recipe, merge
from ekd_ray.studies.warm_start import warm_started

CLASSES = 10
AT_CHANCE = 1 / CLASSES  # the score of a run that diverged, from there on
FRESH = 1000  # the first seed of the runs that judge
IN_USE = 75  # exit code of a training that another search is at
WARM, OTHERS = "default+transfer", ("random", "ray-adapter")
FIGURES = ("val_top1", "test_top1", "test_nll", "test_ece")


class Training:
    """A run of the search, trained an epoch further when that is asked for.

    Args:
        folder: of the run; epochs that it has are not trained again. Two searches that ask for one
            run at the same time share it: one trains, the other reads.
    """

    def __init__(self, config: DistillConfig, folder: Path, data_root: str | None) -> None:
        self._epochs = config.epochs
        self._begin = partial(_train, config.to_dict(), folder, data_root)
        self._history = folder / HISTORY
        self._scores: dict[int, float] = {}
        self._process: Any = None
        self._pipe: Connection | None = None

    def __getitem__(self, index: int) -> float:
        """The score after epoch `index` + 1."""
        while (epoch := index + 1) not in self._scores:
            if self._pipe is None:
                if self._history.exists():
                    rows = read_rows(self._history)
                    self._scores |= {row["epoch"]: row[METRIC] for row in rows}
                    if epoch in self._scores:
                        break
                context = multiprocessing.get_context("spawn")
                self._pipe, theirs = context.Pipe()
                self._process = context.Process(target=self._begin, args=(theirs,))
                self._process.start()
                theirs.close()
            else:
                self._pipe.send(True)
            try:
                trained, score = self._pipe.recv()
            except EOFError:
                self._process.join()
                self.close()
                if self._process.exitcode != IN_USE:
                    raise
                time.sleep(1)
                continue
            if score is None:
                self._scores |= dict.fromkeys(range(epoch, self._epochs + 1), AT_CHANCE)
            else:
                self._scores[trained] = score
        return self._scores[epoch]

    def close(self) -> None:
        """End the training, whether it has come to its end or not."""
        if self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._pipe = None


def _train(settings: dict[str, Any], folder: Path, data_root: str | None, pipe: Connection) -> None:
    def tell(row: dict[str, Any]) -> None:
        pipe.send((row["epoch"], row[METRIC]))
        pipe.recv()  # until the next epoch is due

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(IN_USE)
        try:
            distill(
                DistillConfig.from_dict(settings), data_root=data_root, out=folder, on_epoch=tell,
                threads=1, checkpoint_seconds=0,
            )  # fmt: skip
        except Diverged:
            pipe.send((0, None))
        except EOFError:  # the search has ended the trial
            pass


class RealCurves:
    """Real training as the `Curves` that searches are played on.

    Args:
        folder: where runs are kept, by the fingerprint of their configuration.
    """

    def __init__(self, base: DistillConfig, space: Space, folder: Path, data_root: str | None):
        self.epochs = base.epochs
        self.begun: list[Training] = []
        self._base, self._space, self._folder, self._data_root = base, space, folder, data_root

    def curve(self, point: Point, seed: int = 0) -> tuple[Any, float]:
        """(the scores after each epoch, which are trained when they are asked for, nothing)."""
        config = point_config(self._base, self._space.searched_part(point)).replace(seed=seed)
        training = Training(config, self._folder / config.fingerprint(), self._data_root)
        self.begun.append(training)
        return training, float("nan")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The end of a search: its trials, those of full length, and the one that it would name."""

    trials: int
    complete: int
    point: Mapping[str, Any]
    score: float


def contestants(epochs: int) -> dict[str, Contestant]:
    """Those that search; Ray's adapter has the usual rungs of so many epochs."""
    found = {name: CONTESTANTS[name] for name in (WARM, *OTHERS)}
    ray = found["ray-adapter"]
    settings = {**ray.settings, "rungs": usual_rungs(epochs)}
    return found | {"ray-adapter": replace(ray, settings=settings)}


def make_study(args: argparse.Namespace) -> StudyConfig:
    """The study that all search: the recipe of the pair under these pictures and epochs."""
    recipe = load_recipe(SEARCH_SPACES / "cifar10" / "resnet56a-resnet8.yaml")
    shared = {
        "train_subset": args.train_subset, "validation_fraction": args.validation_fraction,
        "teacher_weights": args.teacher_weights, "teacher_normalization": "imagenet",
        "teacher_cache": "on",
    }  # fmt: skip
    study = StudyConfig.from_dict(merge(with_epochs(recipe, args.epochs), {"distill": shared}))
    return study.replace(distill=resolve(study.distill))


def search(args: argparse.Namespace, name: str, seed: int) -> Found:
    """Search once, for `args.budget` epochs."""
    contestant = contestants(args.epochs)[name]
    study = make_study(args)
    config = study.replace(seed=seed, trials=args.budget, **contestant.settings)
    if contestant.transfer:
        config = warm_started(config, args.warm_start)
    np.random.seed(seed)
    images = round(args.train_subset * args.validation_fraction)
    curves = RealCurves(study.distill, Space(config.space), args.keep / "runs", args.data_root)
    with tempfile.TemporaryDirectory() as folder:
        player = contestant.player(Game(config=config, folder=Path(folder)))
        epochs = play(
            curves, player, make_scheduler(config, chance=Chance(classes=CLASSES, images=images)),
            np.random.default_rng(seed), seed=seed,
        )  # fmt: skip
        ledger = Ledger(lambda trials: contestant.rank(trials, config, ()))
        try:
            for count, done in enumerate(itertools.islice(epochs, args.budget), start=1):
                ledger.add(done, full=curves.epochs)
                if done.last:
                    curves.begun[done.trial].close()
                if count % 12 == 0:
                    _note(f"{name}, seed {seed}: {count}/{args.budget} epochs")
        finally:
            for training in curves.begun:
                training.close()
    named = ledger.trials[ledger.named]
    return Found(
        trials=len(ledger.trials),
        complete=sum(trial.status == "complete" for trial in ledger.trials.values()),
        point=Space(config.space).searched_part(named.params),
        score=_last_score(named),
    )


def _last_score(trial: RunRecord) -> float:
    return float(trial.history[-1][METRIC])


def judge(args: argparse.Namespace, point: Point, seed: int) -> dict[str, float]:
    """Figures of a named configuration under a fresh seed, kept by its fingerprint."""
    study = make_study(args)
    base = study.distill.replace(ood_dataset="digits", seed=seed)
    config = point_config(base, point)
    file = args.keep / "judged" / f"{config.fingerprint()}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True, parents=True)
        write_json(file, run(config.to_dict(), args.data_root))
    return {name: read_json(file)[name] for name in FIGURES}


def measure(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """The finds of each contestant and seed, and their figures under fresh seeds."""
    names = [*contestants(args.epochs)]
    jobs = [(name, seed) for seed in range(args.seeds) for name in names]
    rows: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(local_cpus(), mp_context=context) as pool:
        searches = {job: pool.submit(search, args, *job) for job in jobs}
        found = {job: searches[job].result() for job in jobs}
        runs = {
            job: [
                pool.submit(judge, args, found[job].point, FRESH + args.fresh * job[1] + index)
                for index in range(args.fresh)
            ]
            for job in jobs
        }
        for name, seed in jobs:
            judged = [future.result() for future in runs[name, seed]]
            rows[name][seed] = {
                **vars(found[name, seed]),
                **{key: [figures[key] for figures in judged] for key in FIGURES},
            }
    return rows


def summarize(rows: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """A mean for each seed of the search, their mean and interval, and the default minus it, paired
    by seed, of each contestant and figure."""
    means = {
        name: {
            figure: [statistics.fmean(own[figure]) for own in found.values()] for figure in FIGURES
        }
        for name, found in rows.items()
    }
    return {
        name: {
            figure: {
                "values": values, "mean": statistics.fmean(values),
                "interval": mean_interval(values),
                "behind_default": vars(paired_difference(means[WARM][figure], values)),
            }
            for figure, values in figures.items()
        }
        for name, figures in means.items()
    }  # fmt: skip


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--warm-start", action="append", required=True, metavar="RUN", help="of another pair"
    )
    parser.add_argument("--data-root", default=os.environ.get("EKD_DATA_ROOT"), metavar="DIR")
    parser.add_argument("--teacher-weights", metavar="FILE", help=f"(DIR/{TEACHER_FILE})")
    parser.add_argument("--train-subset", type=int, default=8000, metavar="N")
    parser.add_argument("--validation-fraction", type=float, default=0.25, metavar="X")
    parser.add_argument("--epochs", type=int, default=12, metavar="N")
    parser.add_argument("--budget", type=int, default=120, metavar="EPOCHS", help="of a search")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="searches of each")
    parser.add_argument("--fresh", type=int, default=3, metavar="N", help="runs of what it names")
    parser.add_argument("--keep", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    find_teacher(parser, args)
    return args


def main() -> None:
    """Search, judge, print and write the figures."""
    args = parse()
    rows = measure(args)
    found = summarize(rows)
    for name, figures in found.items():
        entry = figures["test_top1"]
        low, high = entry["interval"]
        print(f"{name:18s} test top-1 {entry['mean']:.4f} [{low:.4f}, {high:.4f}]")
    if args.json:
        write_json(args.json, {
            "machine": machine(1), "level": LEVEL, "seeds": list(range(args.seeds)),
            "command": "python -m benchmarks.real_search --warm-start "
            + " --warm-start ".join(Path(run).name for run in args.warm_start),
            "setup": {name: getattr(args, name) for name in (
                "train_subset", "validation_fraction", "epochs", "budget", "fresh")},
            "rows": found, "searches": rows,
        })  # fmt: skip


if __name__ == "__main__":
    main()
