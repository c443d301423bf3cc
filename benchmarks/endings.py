"""How studies end under several rules of early stopping, on recorded learning curves alone.

    python -m benchmarks.endings benchmarks/curves/NAME.parquet --trials 12 --draws 1000

A study draws so many of the recorded configurations, runs them in that order on four workers, an
epoch of each in about the same time, and stops them by a rule. Of its trials of full length the
best `--top-k` are finalists, and the one with the best mean over the recorded seeds that the
search did not see wins (where one seed is recorded, the best wins). Printed are medians over
draws, with quartiles and means: trials of full length, epochs trained, and the regret, in points:
what the winner's final score, its mean over all seeds, lacks of the best of the drawn ones.

`--correlations` prints instead how the score at each epoch ranks the configurations, against
their final score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from benchmarks.landscape import METRIC, Point
from benchmarks.simulate import CHANCE, Epoch, play
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.full_runs import promise
from ekd_ray.scale.schedulers import make_scheduler, rung_score

# What is changed of a study, whether chance is looked at, and whether stopped trials run in full.
RULES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nothing stopped": ({"scheduler": "none"}, False, False),
    **{
        f"first rung {n}, {name}": ({"grace_epochs": n}, by_chance, in_full)
        for n in (1, 2, 3, 4, 6)
        for name, by_chance, in_full in (
            ("all compared", False, False),
            ("chance rule", True, False),
            ("full runs", False, True),
            ("both", True, True),
        )
    },
}
FIGURES = ("full length", "epochs", "regret")


@dataclass(frozen=True)
class Recorded:
    """Recorded curves [seeds][epochs] by the number of their configuration, of one length."""

    distill: DistillConfig
    curves: dict[int, np.ndarray]

    @classmethod
    def read(cls, table: Path) -> Recorded:
        """Those of a table that were trained to the end under all of its seeds."""
        found: dict[int, dict[int, list[float]]] = {}
        for row in pq.read_table(table).to_pylist():
            by_seed = found.setdefault(row["number"], {})
            by_seed.setdefault(row.get("seed") or 0, []).append(row[METRIC])
        base = json.loads(pq.read_schema(table).metadata[b"ekd_ray"])["base"]
        names = ("epochs", "schedule", "lr", "lr_milestones")
        distill = DistillConfig(**{name: base[name] for name in names})
        most = max(map(len, found.values()))
        shapes = {(most, distill.epochs)}
        whole = {n: [own[s] for s in sorted(own)] for n, own in found.items() if len(own) == most}
        return cls(
            distill,
            {
                number: np.array(own)
                for number, own in whole.items()
                if {(len(own), len(curve)) for curve in own} == shapes
            },
        )

    @property
    def epochs(self) -> int:
        return self.distill.epochs


@dataclass
class _Draw:
    """A player of `simulate.play` and its landscape: given configurations under one seed."""

    recorded: Recorded
    numbers: list[int]
    seed: int

    def __post_init__(self) -> None:
        self.epochs, self._asked = self.recorded.epochs, 0

    def ask(self, trial_id: str) -> Point | None:
        self._asked += 1
        if self._asked > len(self.numbers):
            return None
        return {"number": self.numbers[self._asked - 1]}

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None:
        pass

    def curve(self, point: Point, seed: int = 0) -> tuple[list[float], float]:
        curves = self.recorded.curves[point["number"]]
        return curves[self.seed].tolist(), float(curves[:, -1].mean())


def end_study(recorded: Recorded, config: StudyConfig, rule: str, seed: int) -> list[float]:
    """The `FIGURES` of one study under a rule; its seed decides which configurations it draws."""
    changes, by_chance, in_full = RULES[rule]
    config, rng = config.replace(**changes), np.random.default_rng(seed)
    numbers = rng.permutation(list(recorded.curves))[: config.trials].tolist()
    seeds = len(recorded.curves[numbers[0]])
    draw = _Draw(recorded, numbers, seed % seeds)
    scheduler = make_scheduler(config, chance=CHANCE if by_chance else None)
    epochs = list(play(draw, draw, scheduler, rng))
    ends = {numbers[done.trial] for done in epochs if done.epoch == recorded.epochs}
    spent = len(epochs)
    if in_full:
        for trial in sorted(
            _stopped(epochs, ends, numbers), key=lambda t: promise(t, config, CHANCE)
        ):
            if len(ends) < config.confirm_top_k:
                ends.add(numbers[int(trial.name)])
                spent += recorded.epochs
    found = len(ends)
    score = {number: recorded.curves[number][:, -1] for number in numbers}
    finalists = sorted(ends, key=lambda n: -score[n][draw.seed])[: config.confirm_top_k]
    fresh = [seed for seed in range(seeds) if seed != draw.seed] or [0]
    winner = max(finalists, key=lambda n: score[n][fresh].mean())
    best = max(values.mean() for values in score.values())
    return [found, spent, 100 * (best - score[winner].mean())]


def _stopped(epochs: list[Epoch], ends: set[int], numbers: list[int]) -> Iterator[RunRecord]:
    for trial, number in enumerate(numbers):
        rows = [{"epoch": e.epoch, METRIC: e.seen} for e in epochs if e.trial == trial]
        if number not in ends:
            yield RunRecord(
                folder=Path(), stage=RunStage.SEARCH, name=str(trial), number=trial, history=rows
            )


def correlations(recorded: Recorded) -> dict[str, list[float]]:
    """Rank correlation (Spearman) of the score after each epoch with that after the last."""
    scores = {
        number: [
            rung_score(
                {e: {METRIC: value} for e, value in enumerate(curves[0], start=1)},
                METRIC, epoch, recorded.distill, mean=True,
            )
            for epoch in range(1, recorded.epochs)
        ]
        for number, curves in recorded.curves.items()
    }  # fmt: skip
    table = np.array(list(scores.values()))
    ends = np.array([curves[0, -1] for curves in recorded.curves.values()])
    found = {}
    for name, share in (("all", 0.0), ("better half", 1 / 2), ("upper third", 2 / 3)):
        kept = ends >= np.quantile(ends, share)
        found[f"{name} (n = {kept.sum()})"] = [
            float(spearmanr(column[kept], ends[kept])[0]) for column in table.T
        ]
    guessing = [np.mean([CHANCE.explains(score) for score in column]) for column in table.T]
    return {**found, "at chance (share)": [float(share) for share in guessing]}


def main() -> None:
    """Let studies end under all rules, or rank."""
    parser = argparse.ArgumentParser(description="How studies end on recorded curves.")
    parser.add_argument("table", type=Path)
    parser.add_argument("--trials", type=int, nargs="+", default=[12, 32], metavar="N")
    parser.add_argument("--top-k", type=int, default=3, metavar="K")
    parser.add_argument("--draws", type=int, default=1000, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="rules with this in the name")
    parser.add_argument("--correlations", action="store_true")
    args = parser.parse_args()
    recorded = Recorded.read(args.table)
    if args.correlations:
        for name, values in correlations(recorded).items():
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
        return
    print(f"{len(recorded.curves)} configurations, {recorded.distill.schedule}")
    for trials in args.trials:
        config = StudyConfig(distill=recorded.distill, trials=trials, confirm_top_k=args.top_k)
        for rule in (rule for rule in RULES if args.only in rule):
            ends = [end_study(recorded, config, rule, seed) for seed in range(args.draws)]
            cells = " | ".join(map(_spread, np.array(ends).T))
            print(f"| {trials} | {rule} | {cells} |", flush=True)


def _spread(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{median:.2f} [{low:.2f}, {high:.2f}], mean {values.mean():.2f}"


if __name__ == "__main__":
    main()
