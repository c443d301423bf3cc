"""Confirmed configurations side by side, and which of them has won."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import COSTS, DIRECTIONS, as_loss, largest_is_best, total_violation
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import spell_controls
from ekd_ray.results.paired import SETTLED_LEVEL, Paired, paired_difference
from ekd_ray.results.records import RunRecord, table_of_rows
from ekd_ray.results.row_names import label, name_missed

if TYPE_CHECKING:
    import pyarrow as pa

TESTED = ("test_top1", "test_nll", "test_ece")
STUDENT_ALONE = "none"
# The rows that cost no search: who wins against none of them has gained nothing by it.
WITHOUT_SEARCH = (STUDENT_ALONE, "kd", "authors' values")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the leaderboard: a configuration and its confirmed figures.

    `number` is that of the trial that has this configuration, if one has. `entered_as` is champion,
    finalist or baseline; `equals` names other champions with the same configuration. `val` and
    `test` hold the metric's values over seeds, `val_metrics` and `test_metrics` all figures of each
    seed; empty where that stage did not run it. `costs` is the student's, where the study asked for
    it; `failed` the reason.
    """

    name: str
    config: DistillConfig = field(repr=False)
    number: int | None = None
    entered_as: str = "finalist"
    equals: tuple[str, ...] = ()
    val: tuple[float, ...] = ()
    val_metrics: tuple[dict[str, float], ...] = ()
    test: tuple[float, ...] = ()
    test_metrics: tuple[dict[str, float], ...] = ()
    costs: dict[str, float] = field(default_factory=dict)
    winner: bool = False
    failed: str | None = None

    @property
    def role(self) -> str:
        """winner, champion, finalist or baseline."""
        return "winner" if self.winner else self.entered_as

    def figures(self, name: str) -> tuple[float, ...]:
        """The values of a metric over the seeds, on the split that its name says, or of a cost."""
        if name in self.costs:
            return (self.costs[name],)
        metrics = self.test_metrics if name.startswith("test_") else self.val_metrics
        return tuple(found[name] for found in metrics if name in found)

    def tested(self, metric: str) -> tuple[float, ...]:
        """The values of a metric of the test split over the seeds."""
        return self.test if metric == "test_top1" else self.figures(metric)

    def means(self) -> dict[str, float | None]:
        """The mean of every metric and cost over the seeds; None where there is none."""
        found = {name: self.figures(name) for name in DIRECTIONS}
        return {name: statistics.fmean(v) if v else None for name, v in found.items()}


class Leaderboard(list[Row]):
    """The rows of a study, the winner first."""

    def __init__(self, rows: Iterable[Row], config: StudyConfig) -> None:
        super().__init__(rows)
        self.config = config
        self.damaged: list[str] = []  # a sentence on each file that was left out

    def to_table(self) -> pa.Table:
        """One row per configuration, the winner first.

        Returns:
            Columns `name` (of the row: `trial 7`, `defaults`, `none`, ...), `role` (winner,
            champion, finalist or baseline), `winner`, `failed` (the reason or null), for each
            watched metric and for `test_top1`, `test_nll`, `test_ece` the columns
            `<metric>_mean`, `<metric>_sd` and `<metric>_n` (null, null and 0 where it was not
            measured), and the searched settings as `param_<name>`.
        """
        return table_of_rows([self._plain_row(row) for row in self])

    @property
    def lead(self) -> Lead | None:
        """The winner's lead over the next best on the validation split: see `find_lead`."""
        return find_lead(self, self.config)

    @property
    def test_metric(self) -> str:
        """The study's metric as the test split has it: see `find_test_metric`."""
        return find_test_metric(self, self.config)

    @property
    def gain(self) -> Gain | None:
        """The winner's gain over what needs no search: see `find_gain`."""
        return find_gain(self, self.config)

    def missed(self) -> list[str]:
        """The rows that the winner has no gain over: it is behind them, not told apart, or they
        failed; empty before there is a winner on the test split."""
        if not any(row.winner and row.test for row in self):
            return []
        missed = self.gain.missed() if self.gain else []
        failed = [row.name for row in self if row.name in WITHOUT_SEARCH and row.failed]
        return [name for name in WITHOUT_SEARCH if name in (*missed, *failed)]

    def to_pandas(self) -> Any:
        """`to_table` as a `pandas.DataFrame`."""
        return self.to_table().to_pandas()  # pyarrow imports pandas, which nothing else here needs

    def __repr__(self) -> str:
        if not self:
            return "\n".join(["Leaderboard: no configuration is confirmed yet", *self.damaged])
        lines = [("name", "role", self.config.metric, self.test_metric)]
        for row in self:
            tested = row.tested(self.test_metric)
            figures = ("failed", "") if row.failed else (_spread(row.val), _spread(tested))
            lines.append((label(row.name), row.role, *figures))
        head = [*filter(None, [name_missed(self.missed())])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return spell_controls("\n".join([*head, *texts, *self.damaged]))

    def _plain_row(self, row: Row) -> dict[str, Any]:
        plain = {"name": row.name, "role": row.role, "winner": row.winner, "failed": row.failed}
        for name in dict.fromkeys((*self.config.watched, self.test_metric, *TESTED)):
            values = row.val if name == self.config.metric else row.figures(name)
            mean, deviation, count = mean_sd(values) if values else (None, None, 0)
            plain |= {f"{name}_mean": mean, f"{name}_sd": deviation, f"{name}_n": count}
        for name in self.config.shown_settings:
            value = getattr(row.config, name)
            simple = value is None or isinstance(value, bool | int | float | str)
            plain[f"param_{name}"] = value if simple else str(value)
        return plain


def _spread(values: Sequence[float]) -> str:
    """`0.3966 ± 0.0081 (n = 3)`."""
    if not values:
        return ""
    mean, deviation, count = mean_sd(values)
    return f"{mean:.4f} ± {deviation:.4f} (n = {count})" if count > 1 else f"{mean:.4f} (n = 1)"


def mean_sd(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one value) and n."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation, len(values)


def leaderboard_rows(runs: Sequence[RunRecord], config: StudyConfig) -> list[Row]:
    """The rows of runs of the confirm stage, in the order of each name's first run."""
    rows: dict[str, Row] = {}
    # What failed under one seed has no mean over the seeds, and cannot win.
    failed = {run.name for run in runs if run.stage is RunStage.SELECT and run.reason}
    for run in runs:
        row = rows.get(run.name) or Row(
            name=run.name,
            number=run.number,
            # FORMAT_VERSION 2 was at first without roles.
            entered_as=run.role or ("finalist" if run.stage is RunStage.SELECT else "baseline"),
            equals=tuple(run.equals),
            config=DistillConfig.from_dict(run.config),
        )
        metrics = run.metrics
        costs = {name: metrics[name] for name in COSTS if name in metrics}
        if run.reason:
            row = replace(row, failed=run.reason)
        elif run.stage is RunStage.FINAL:
            tested = (*row.test_metrics, select_metrics(metrics, "test_"))
            row = replace(
                row, test=(*row.test, metrics["test_top1"]), test_metrics=tested, costs=costs
            )
        elif run.name not in failed:
            seen = (*row.val_metrics, select_metrics(metrics, "val_"))
            row = replace(
                row, val=(*row.val, metrics[config.metric]), val_metrics=seen, costs=costs
            )
        rows[run.name] = row
    return list(rows.values())


def select_metrics(metrics: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    """The metrics whose names begin with one of the prefixes."""
    return {name: value for name, value in metrics.items() if name.startswith(prefixes)}


def rank_contenders(rows: Sequence[Row], config: StudyConfig) -> list[Row]:
    """The champions and finalists that were given all seeds, the best mean of the metric first.

    Those that were given fewer were out of the race. One that keeps the constraints goes before
    any that does not, the nearest before the others. Of equals the first of `rows`.
    """
    seeds = max((len(row.val) for row in rows), default=0)

    def rank(row: Row) -> tuple[float, float]:
        score = as_loss(statistics.fmean(row.val), config.metric)
        return total_violation(config.bounds, row.means()), score

    return sorted((row for row in rows if seeds and len(row.val) == seeds), key=rank)


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The best contender's metric minus that of the second, `over`, on the validation split;
    `settled` if the interval at `SETTLED_LEVEL` is beside zero."""

    over: str
    difference: Paired
    settled: bool


def find_lead(rows: Sequence[Row], config: StudyConfig) -> Lead | None:
    """How sure the winner's place is, paired over the seeds; None if no other could have it.

    A second that keeps the constraints less than the first is no rival, whatever its metric.
    """
    ranked = rank_contenders(rows, config)
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    broken = [total_violation(config.bounds, row.means()) for row in (first, second)]
    if broken[0] < broken[1]:
        return None
    found = paired_difference(first.val, second.val, level=SETTLED_LEVEL)
    return Lead(over=second.name, difference=found, settled=bool(found.sign))


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much the winner is better than each row of `WITHOUT_SEARCH` that there is.

    `over` has by row the paired difference over the fresh seeds in `metric`, which is read on the
    test split; above zero the winner is better, whichever way the metric is.
    """

    metric: str
    over: dict[str, Paired]

    @property
    def settled(self) -> bool:
        """Whether the whole 95 % interval over the student alone is above zero."""
        return STUDENT_ALONE in self.over and self.over[STUDENT_ALONE].sign == 1

    def missed(self) -> list[str]:
        """The rows that the winner is behind, or is not told apart from."""
        return [name for name, found in self.over.items() if found.sign != 1]


def gain_values(board: Leaderboard) -> dict[str, Any] | None:
    """The winner's gain as plain values: `metric`, `settled`, `missed` and, by row, `over`."""
    gain = board.gain
    return {**asdict(gain), "settled": gain.settled, "missed": gain.missed()} if gain else None


def find_test_metric(rows: Iterable[Row], config: StudyConfig) -> str:
    """The study's metric as the test split has it; accuracy where that is not recorded of the
    winner."""
    metric = config.metric.replace("val_", "test_", 1)
    winner = next((row for row in rows if row.winner and row.test), None)
    return metric if winner and winner.figures(metric) else "test_top1"


def find_gain(rows: Sequence[Row], config: StudyConfig) -> Gain | None:
    """The winner's gain over the student alone, KD and the authors' values; None without a winner
    on the test split or without such rows.

    It is counted in the study's metric, as the test split has it, and in accuracy where that is
    not recorded.
    """
    found = {row.name: row for row in rows if row.test and not row.failed}
    winner = next((row for row in found.values() if row.winner), None)
    if winner is None:
        return None
    metric = find_test_metric(rows, config)
    better = 1 if largest_is_best(metric) else -1
    own, over = winner.figures(metric), {}
    for name in WITHOUT_SEARCH:
        others = found[name].figures(metric) if name in found else ()
        if name != winner.name and len(others) == len(own) > 0:
            over[name] = paired_difference(*([better * v for v in side] for side in (own, others)))
    return Gain(metric=metric, over=over) if over else None


def make_leaderboard(runs: Sequence[RunRecord], config: StudyConfig) -> Leaderboard:
    """The winner first and marked, then what has test figures by these, then the finalists; of
    both kinds what failed comes last."""
    rows = leaderboard_rows(runs, config)
    best = next(iter(rank_contenders(rows, config)), None)

    def rank(row: Row) -> tuple[bool, bool, bool, float]:
        mean = statistics.fmean(row.test or row.val or [0])
        score = -mean if row.test else as_loss(mean, config.metric)
        return not row.winner, not row.test, bool(row.failed), score

    marked = [replace(row, winner=row is best) for row in rows]
    return Leaderboard(sorted(marked, key=rank), config)
