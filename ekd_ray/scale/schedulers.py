"""Schedulers: which trials are stopped early.

A rule compares a trial, at certain epochs, with the trials that came to the same epoch before it.
Whether it stops is a function of their recorded histories and of the order in which they came:
`SuccessiveHalving.compare` or `Median.compare` gives its score, `falls_behind` the answer.

`StoppingScheduler` tells Tune. It writes each comparison into `arrivals.jsonl` before it answers:
that is the order, and a resumed study decides as an uninterrupted one. Trials are stopped, never
paused, because a paused trial holds its place.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import as_loss
from ekd_ray.data import dataset_info
from ekd_ray.engine.history import read_rows
from ekd_ray.engine.resolve import split_sizes
from ekd_ray.engine.schedule import settled_since
from ekd_ray.files import write_text
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.scale.worker import RUN

ARRIVALS = "arrivals.jsonl"
BRACKETS = 3
LEAST_OTHERS = 3  # with fewer, the median rule lets a trial go on
ACCURACY = "val_top1"
# Whether a trial was stopped at its last epoch, by its status; of one that runs nobody knows.
LAST_OUTCOMES = {"pruned": True, "complete": False, "failed": False, "running": None}
# Turns of the golden section spread any number of consecutive trials evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2

Rows = Mapping[int, Mapping[str, Any]]  # the rows of a history by epoch


@dataclass(frozen=True, kw_only=True)
class Chance:
    """The accuracy of guessing: 1 / `classes`, measured on `images` validation images."""

    classes: int
    images: int

    @classmethod
    def of_study(cls, base: DistillConfig, data_root: str | None) -> Chance:
        """Chance on the validation split of a study."""
        classes = dataset_info(base.dataset, data_root=data_root).num_classes
        return cls(classes=classes, images=split_sizes(base, data_root)[1])

    def explains(self, accuracy: float) -> bool:
        """Whether an accuracy in [0, 1] lies within three binomial standard errors of chance."""
        level = 1 / self.classes
        return abs(accuracy - level) <= 3 * math.sqrt(level * (1 - level) / self.images)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A trial at an epoch at which trials are compared.

    Attributes:
        own: what is held against the `score` of those that came before; larger is better.
        score: what the `own` of those that come after is held against.
    """

    own: float
    score: float


def falls_behind(
    own: float, earlier: Sequence[float], *, reduction_factor: int, least: int = 1
) -> bool:
    """Whether a trial is behind the best 1 / `reduction_factor` of those that came before it.

    Args:
        own: its score, larger is better; earlier: theirs, ascending. With fewer than `least` of
            them it is not. The bar is their quantile 1 - 1 / `reduction_factor`, interpolated.
    """
    if len(earlier) < least:
        return False
    index, rest = divmod((len(earlier) - 1) * (reduction_factor - 1), reduction_factor)
    bar = earlier[index]
    if rest:
        bar = (bar * (reduction_factor - rest) + earlier[index + 1] * rest) / reduction_factor
    return own < bar


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Successive halving, asynchronous and without pauses (Li et al., A System for Massively
    Parallel Hyperparameter Tuning, 2020), in one bracket or in those of Hyperband.

    At each rung a trial stops unless it is among the best 1 / `reduction_factor` of those that
    were there before. A trial that guesses (`chance` explains its `val_top1`, scored as the
    metric is, whatever the metric) is not compared: it goes on, and nobody is compared with it.
    At the last rung all are compared.

    Attributes:
        distill: whose schedule says since when epochs count, see `rung_score`.
        mean: whether they count by their mean; otherwise the last one counts.
        rungs: epochs, ascending, below full length.
        brackets: bracket k begins to stop at the k-th rung.
    """

    distill: DistillConfig
    metric: str
    mean: bool
    rungs: tuple[int, ...]
    reduction_factor: int
    brackets: int = 1
    chance: Chance | None = None
    least: int = 1

    def group(self, number: int) -> int:
        """The trial's bracket."""
        return bracket_of(number, len(self.rungs), self.brackets, self.reduction_factor)

    def compare(self, number: int, epoch: int, rows: Rows) -> Comparison | None:
        """The comparison of a trial after an epoch of its `rows`, None if there is none."""
        if epoch not in self.rungs[self.group(number) :] or self.metric not in rows[epoch]:
            return None
        if self.chance and epoch < self.rungs[-1]:
            accuracy = rung_score(rows, ACCURACY, epoch, self.distill, mean=self.mean)
            if self.chance.explains(accuracy):
                return None
        found = rung_score(rows, self.metric, epoch, self.distill, mean=self.mean)
        score = -as_loss(found, self.metric)
        return Comparison(own=score, score=score)


def rung_score(rows: Rows, metric: str, epoch: int, config: DistillConfig, *, mean: bool) -> float:
    """The score of a run after an epoch: a metric's mean since the learning rate fell, or its
    last value.

    A single epoch at a high rate says little: what a run will be worth shows better in the mean.
    """
    since = settled_since(config, epoch) if mean else epoch
    return statistics.fmean(row[metric] for e, row in rows.items() if since <= e <= epoch)


def bracket_of(number: int, rungs: int, brackets: int, reduction_factor: int) -> int:
    """Hyperband's bracket of a trial, 0 to `brackets` - 1: a function of its number.

    Bracket k, which halves s = `rungs` - k times, gets its published share of all trials,
    `reduction_factor`**s / (s + 1) over the sum of these (Li et al., Hyperband, 2018,
    Algorithm 1).
    """
    halvings = [rungs - k for k in range(brackets)]
    shares = list(accumulate(reduction_factor**s / (s + 1) for s in halvings))
    turn = number * _GOLDEN % 1 * shares[-1]
    return sum(turn >= share for share in shares[:-1])


@dataclass(frozen=True, kw_only=True)
class Median:
    """The median stopping rule (Golovin et al., Google Vizier, 2017, section 3.2.2).

    From `grace` epochs on a trial stops if its best value so far is worse than the median of
    the others' means, over the epochs since then, up to the same epoch. At `full` length
    nothing is compared.
    """

    metric: str
    grace: int
    full: int
    reduction_factor: int = 2
    least: int = LEAST_OTHERS

    def group(self, number: int) -> int:
        """All trials are compared with all."""
        return 0

    def compare(self, number: int, epoch: int, rows: Rows) -> Comparison | None:
        """The comparison of a trial after an epoch of its `rows`, None if there is none."""
        if not self.grace <= epoch < self.full or self.metric not in rows[epoch]:
            return None
        values = {
            e: -as_loss(row[self.metric], self.metric) for e, row in rows.items() if e <= epoch
        }
        mean = statistics.fmean(value for e, value in values.items() if e >= self.grace)
        return Comparison(own=max(values.values()), score=mean)


Rule = SuccessiveHalving | Median


class NoStopping(FIFOScheduler):
    """Every trial runs to its end, in the process that starts for it.

    A process that has ended its trial goes by Tune's default to the trial that waits longest,
    and the one that was being started for it is ended. Where trials are shorter than the start
    of a process, few processes then do all the work and the others never come up: 5 of 32 did
    in a search of trials of 3 s. Without a choice of the scheduler's, Tune gives the process to
    the trial that is drawn in its place. (Not for schedulers that pause trials.)
    """

    stopped: Collection[int] = ()  # numbers of the trials that were stopped

    def choose_trial_to_run(self, tune_controller: object) -> None:
        """Choose none, see the class."""


class StoppingScheduler(NoStopping):
    """Stops trials by a rule.

    Args:
        rule: which trials are compared, and how.
        records: trials that have begun before, ended or interrupted, ascending by number.
        log: file of the comparisons, in their order; those of `records` are read from it. What
            is not there (a study of an earlier version) is compared in the order of `records`.
    """

    def __init__(
        self, rule: Rule, records: Iterable[RunRecord] = (), log: Path | None = None
    ) -> None:
        super().__init__()
        self._rule, self._log = rule, log
        # Ascending, by group and epoch: a comparison takes O(log n) steps and the shift of a list.
        self._scores: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._rows: dict[int, dict[int, Mapping[str, Any]]] = {}  # of trials that run
        self._compared: set[tuple[int, int]] = set()  # (number, epoch)
        self.stopped: set[int] = set()
        self._recall(list(records))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune's snapshots are not resumed from

    def _recall(self, records: list[RunRecord]) -> None:
        """Take up the comparisons of trials that have begun before."""
        known = {record.number for record in records}
        lines = read_rows(self._log) if self._log else []
        # The number of a trial that is unknown will be another one's.
        kept = [line for line in lines if line["trial"] in known]
        if self._log:
            write_text(self._log, "".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            self._take_up(line)
        for record in records:
            if record.number is None or record.number in self.stopped:
                continue
            rows: dict[int, Mapping[str, Any]] = {row["epoch"]: row for row in record.history}
            if record.status == "running":
                self._rows[record.number] = rows
            for epoch in sorted(rows):
                # One that has gone on was not stopped, and how one has ended is known.
                outcome = LAST_OUTCOMES[record.status] if epoch == max(rows) else False
                self._compare(record.number, epoch, rows, outcome)

    def _compare(self, number: int, epoch: int, rows: Rows, stops: bool | None = None) -> None:
        """Compare a trial after an epoch, once; `stops` is what came of it, where that is known."""
        found = self._rule.compare(number, epoch, rows)
        if found is None or (number, epoch) in self._compared:
            return
        if stops is None:
            stops = falls_behind(
                found.own, self._scores[self._rule.group(number), epoch],
                reduction_factor=self._rule.reduction_factor, least=self._rule.least,
            )  # fmt: skip
        line = {"trial": number, "epoch": epoch, "score": found.score, "stopped": stops}
        if self._log:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._take_up(line)

    def _take_up(self, line: Mapping[str, Any]) -> None:
        number, epoch = line["trial"], line["epoch"]
        insort(self._scores[self._rule.group(number), epoch], line["score"])
        self._compared.add((number, epoch))
        if line["stopped"]:
            self.stopped.add(number)

    def on_trial_result(
        self, tune_controller: object, trial: Any, result: Mapping[str, Any]
    ) -> str:
        """Compare a trial with those that were at its epoch before it."""
        number = trial.config[RUN]["number"]
        if "epoch" in result:
            rows = self._rows.setdefault(number, {})
            rows[result["epoch"]] = result
            self._compare(number, result["epoch"], rows)
        if number not in self.stopped:
            return self.CONTINUE
        self._rows.pop(number, None)
        return self.STOP

    def on_trial_complete(
        self, tune_controller: object, trial: Any, result: Mapping[str, Any]
    ) -> None:
        """Forget the rows of a trial that has ended."""
        self._rows.pop(trial.config[RUN]["number"], None)


def _halving(config: StudyConfig, chance: Chance | None, brackets: int) -> SuccessiveHalving:
    rungs = tuple(milestone_epochs(config)[:-1])
    return SuccessiveHalving(
        distill=config.distill,
        metric=config.metric,
        mean=config.rung_score == "mean",
        rungs=rungs,
        reduction_factor=config.reduction_factor,
        # As many as have a rung of their own.
        brackets=max(1, min(brackets, len(rungs))),
        chance=chance,
    )


def _median(config: StudyConfig, chance: Chance | None) -> Median:
    return Median(metric=config.metric, grace=config.grace, full=config.distill.epochs)


RULES: dict[str, Callable[[StudyConfig, Chance | None], Rule] | None] = {
    "asha": lambda config, chance: _halving(config, chance, 1),
    "hyperband": lambda config, chance: _halving(config, chance, BRACKETS),
    "median": _median,
    "none": None,
}


def make_scheduler(
    config: StudyConfig,
    *,
    chance: Chance | None = None,
    records: Iterable[RunRecord] = (),
    log: Path | None = None,
) -> NoStopping:
    """The scheduler that `config.scheduler` names.

    Args:
        chance: of guessing; None compares all trials at all rungs.
        records, log: see `StoppingScheduler`.
    """
    make_rule = RULES[config.scheduler]
    if make_rule is None:
        return NoStopping()
    return StoppingScheduler(make_rule(config, chance), records, log)
