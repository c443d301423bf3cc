"""The view of a person: a live table on a terminal, plain lines elsewhere, the leaderboard."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ekd_ray.cli.console import Console
from ekd_ray.config import StudyConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.phrases import several
from ekd_ray.config.targets import total_violation
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import spell_controls
from ekd_ray.losses.methods import METHODS
from ekd_ray.results.leaderboard import Row, find_test_metric, mean_sd
from ekd_ray.results.progress import CONFIRM_STAGES
from ekd_ray.results.records import RunRecord
from ekd_ray.results.row_names import label
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import (
    countdown,
    describe_better_on_test,
    describe_lead,
    difference_text,
    exact_figure,
    is_share,
    short_spread,
    value_text,
)

if TYPE_CHECKING:
    from ekd_ray.scale.schedulers import Chance  # loads Ray

LIVE_ROWS = 16
OTHER_LINES = 8  # of the live view, beside its runs
OTHER_COLUMNS = 62  # beside their settings
# A loss so many times that of guessing, ln C, will hardly come down again.
MOST_LOSS = 10
# Stages whose runs read the test split when their epochs are done.
_TESTED = (CONFIRM_STAGES[RunStage.FINAL], "reproduction")
REDRAW_SECONDS = 0.25
SAY_SECONDS = 30.0  # between the lines of a step that ends soon, off a terminal
# Below this width settings would be broken into single letters.
WIDE = 72


@dataclass
class _Progress:
    """One run as the terminal knows it."""

    name: str
    settings: dict[str, Any]
    order: int  # in which runs began
    row: dict[str, Any] = field(default_factory=dict)
    state: str = "running"


class Terminal:
    """An `Observer` that draws a live table on a TTY, writes a line per event elsewhere.

    Args:
        shown: settings to show beside each run.
        metric: the study's metric, for the best so far; rungs: epochs of early stopping.
        unit: what the filling of the teacher's cache is counted in.
        chance: the accuracy of guessing, to mark the runs that do no better.
    """

    def __init__(
        self, *, metric: str = "val_top1", mode: str = "max", shown: Iterable[str] = (),
        rungs: Iterable[int] = (), quiet: bool = False, console: Console | None = None,
        unit: str = "parts", chance: Chance | None = None,
    ) -> None:  # fmt: skip
        self.console = console or Console(stderr=True)
        self.metric, self.mode, self.shown = metric, mode, tuple(shown)
        self.rungs = tuple(rungs)
        self.quiet, self.unit, self.chance = quiet, unit, chance
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._reset("", 0, 0)

    def _reset(self, title: str, total: int, epochs: int) -> None:
        self.title, self.total, self.epochs = title, total, epochs
        self.runs: dict[int, _Progress] = {}
        # What the view says of all runs, without a look at each: there may be thousands.
        self._running: dict[int, _Progress] = {}
        self._ended_at: Counter[int] = Counter()  # how many ended after so many epochs
        self._best_ended: _Progress | None = None
        self.started_at = time.monotonic()
        self._said_at = 0.0  # seconds after that
        self.epochs_done = 0

    def filled(self, done: int, total: int) -> None:
        """Parts of the teacher's logits that the next stage will read."""
        if self.title != "teacher logits":
            self.close()
            self._reset("teacher logits", total, 0)
        if self.quiet:
            return
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self.started_at
            if done == total or elapsed - self._said_at >= SAY_SECONDS:
                self._said_at = elapsed
                self._line(
                    f"teacher logits: {done / max(total, 1):.0%}  {countdown(elapsed)} elapsed"
                )
            return
        seconds = (time.monotonic() - self.started_at) / max(done, 1) * (total - done)
        left = f"  about {countdown(seconds)} left" if done < total and done else ""
        text = f"{done}/{total} {self.unit}{left}"
        share, width = done / max(total, 1), self.console.width
        self._show(progress_line("teacher logits", share, text, width=width))
        if done == total:
            self._stop()
            self._reset("", 0, 0)

    def stage(self, title: str, total: int, epochs: int) -> None:
        """A stage of `total` runs of at most `epochs` epochs begins; without epochs, a step
        that ends when it ends (the test split, the export)."""
        self.close()
        self._reset(title, total, epochs)
        if self.quiet:
            return
        if not epochs:
            self._line(f"{title} ...")
            if self.console.is_terminal:
                text = Ticking(f"{title}  ", self.started_at)
                spinner = Spinner("dots", text=text)
                self._live = Live(spinner, console=self.console, transient=True)
                self._live.start()
            return
        runs = f": {several(total, 'run')} of up to {several(epochs, 'epoch')}"
        self.console.print(Text.assemble(self.console.render_str(title, style="bold"), runs))
        if self.console.is_terminal:
            self._show(self._table())

    def note(self, text: str) -> None:
        """A line between two stages."""
        self.close()
        self._line(text)

    def started(self, name: str, number: int, settings: dict[str, Any]) -> None:
        """A run begins, or goes on after a pause."""
        self._begin(number, name, settings)
        self._draw()

    def _begin(self, number: int, name: str, settings: dict[str, Any]) -> _Progress:
        before = self.runs.get(number)
        row_name, *seed = name.split(" seed ")  # of confirm, `kd seed 1`
        name = " seed ".join([label(row_name), *seed])
        order, row = (before.order, before.row) if before else (len(self.runs), {})
        run = self.runs[number] = _Progress(name, settings, order, row)
        if before and number not in self._running:
            self._ended_at[before.row.get("epoch", 0)] -= 1
        self._running[number] = run
        return run

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        """A run has finished an epoch."""
        run = self.runs[number]
        run.row = row
        self.epochs_done += 1
        if not self._live and self.total == 1 and row["epoch"] < self.epochs:
            self._line(
                f"{run.name} epoch {row['epoch']}/{self.epochs}  {_figures(row, self.metric)}"
            )
        self._draw()

    def ended(self, number: int, *, failure: str | None) -> None:
        """A run has ended: all epochs done, stopped early, or failed for the reason `failure`."""
        # A run whose process never came up ends without having started.
        run = self.runs.get(number) or self._begin(number, f"trial {number}", {})
        complete = run.row.get("epoch") == self.epochs
        run.state = "complete" if complete else "stopped early"
        if failure or not run.row:
            run.state = "failed"
        if self._running.pop(number, None):
            self._ended_at[run.row.get("epoch", 0)] += 1
        self._best_ended = self._better(self._best_ended, run)
        done = len(self.runs) - len(self._running)
        if not self._live:
            epoch = run.row.get("epoch", 0)
            parts = [
                f"[{done}/{self.total}] {run.name} {self._state(run)} at epoch "
                f"{epoch}/{self.epochs}",
                _figures(run.row, self.metric),
                self._settings(run),
                self._summary().strip() if self.total > 1 else "",
                f"{countdown(time.monotonic() - self.started_at)} elapsed",
            ]
            self._line("  ".join(filter(None, parts)))
        if failure:
            self._line(f"{run.name} failed: {failure}")
        self._draw()

    def close(self) -> None:
        """Leave the live view as it stands."""
        self._drawn_at = 0.0
        if self.epochs:
            self._draw()
        self._stop()

    def _show(self, view: RenderableType) -> None:
        if self._live is None:
            self._live = Live(view, console=self.console, refresh_per_second=4)
            self._live.start()
        self._live.update(view)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _line(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text.rstrip())

    def _draw(self) -> None:
        # A table for every report of 64 trials would be most of the driver's work.
        if self._live and time.monotonic() - self._drawn_at >= REDRAW_SECONDS:
            self._live.update(self._table())
            self._drawn_at = time.monotonic()  # a slow machine too has time for the rest

    def _settings(self, run: _Progress) -> str:
        return _assignments(run.settings, self.shown)

    def best(self) -> _Progress | None:
        """The run of this stage with the best last metric; before any has ended, the latest."""
        return self._best_ended or functools.reduce(self._better, self._running.values(), None)

    def _better(self, best: _Progress | None, other: _Progress) -> _Progress | None:
        if self.metric not in other.row:
            return best
        if best is None:
            return other
        ahead = other.row[self.metric] - best.row[self.metric]
        return other if (ahead if self.mode == "max" else -ahead) > 0 else best

    def _summary(self) -> str:
        best = self.best()
        text = f"  best {_metric(self.metric, best.row)} ({best.name})" if best else ""
        return text + self._time_left()

    def _time_left(self) -> str:
        """At the pace so far: if runs end as early as those before, and if none does."""
        most, expected = self.seconds_left(), self.seconds_expected()
        if not most:
            return ""
        if expected is None or countdown(expected) == countdown(most):
            return f"  at most {countdown(most)} left"
        return f"  about {countdown(expected)} left, at most {countdown(most)}"

    def _possible(self, epochs: float) -> float:
        """Epochs still to come if every run that has not ended goes on to `epochs`."""
        running = self._running_epochs()
        waiting = max(0, self.total - len(self.runs))
        return waiting * epochs + sum(max(0.0, epochs - done) for done in running)

    def seconds_left(self, epochs: float | None = None) -> float | None:
        """Time for runs of `epochs` epochs at the pace so far; without it, of all possible ones."""
        if not self.epochs_done:
            return None
        pace = (time.monotonic() - self.started_at) / self.epochs_done
        return self._possible(self.epochs if epochs is None else epochs) * pace

    def seconds_expected(self) -> float | None:
        """Estimate with the mean length of the runs that have ended; None before three have."""
        ended = self._ended_at.total()
        epochs = sum(epoch * count for epoch, count in self._ended_at.items())
        return self.seconds_left(epochs / ended) if ended >= 3 else None

    def _running_epochs(self) -> list[int]:
        return [run.row.get("epoch", 0) for run in self._running.values()]

    def _state(self, run: _Progress) -> str:
        done = run.row.get("epoch") == self.epochs
        if run.state == "running" and done and self.title in _TESTED:
            return "test split"
        fault = self._fault(run)
        return f"{run.state}, {fault}" if fault and run.state != "failed" else run.state

    def _fault(self, run: _Progress) -> str:
        """The fault of a run that does not fail by itself; empty if it has none."""
        if self.chance is None:
            return ""
        if not run.row.get("train_loss", 0.0) <= MOST_LOSS * log(self.chance.classes):
            return "loss diverged"
        accuracy = run.row.get("val_top1")
        return "may be chance" if accuracy is not None and self.chance.explains(accuracy) else ""

    def _latest(self) -> list[_Progress]:
        """As many runs as the terminal is high, at most `LIVE_ROWS`, in order: those that run, and
        of the others the last."""
        most = min(LIVE_ROWS, max(1, self.console.height - OTHER_LINES))
        shown = {*[*self._running][-most:]}
        for number in reversed(self.runs):
            if len(shown) == most:
                break
            if number not in self._running:
                shown.add(number)
        return sorted((self.runs[number] for number in shown), key=lambda run: run.order)

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        runs = self._latest()
        # A run has one line: of several the terminal would not show the last, which say how far
        # it all is.
        longest = max((len(self._settings(run)) for run in runs), default=0)
        wide = self.console.width >= max(WIDE, OTHER_COLUMNS + longest)
        columns = ["run", "epoch", "rung", self.metric, "loss", "state", "settings"]
        if self.title != "search":
            columns.remove("rung")
        if not wide:  # the best run's settings follow below
            columns.remove("settings")
        for column in columns:
            table.add_column(column, no_wrap=column != "settings", overflow="fold")
        best = self.best()
        for run in runs:
            epoch = run.row.get("epoch", 0)
            cells = {
                "run": run.name,
                "epoch": f"{epoch}/{self.epochs}",
                "rung": f"{sum(rung <= epoch for rung in self.rungs)}/{len(self.rungs)}",
                self.metric: exact_figure(self.metric, run.row[self.metric])
                if self.metric in run.row
                else "",
                "loss": f"{run.row['train_loss']:.3f}" if run.row else "",
                "state": self._state(run),
                "settings": self._settings(run),
            }
            style = "bold green" if run is best else _STYLES.get(run.state)
            if self._fault(run):
                style = "yellow"
            table.add_row(*(cells[column] for column in columns), style=style)
        ended = len(self.runs) - len(self._running)
        share = 1 - self._possible(self.epochs) / max(1, self.total * self.epochs)
        running = f"{len(self._running)} running" if self.runs else "starting workers"
        text = Ticking(f"{ended}/{self.total} ended, {running}, ", self.started_at, self._summary())
        views: list[RenderableType] = [
            table,
            progress_line(self.title, share, text, width=self.console.width),
        ]
        if self.title == "search":
            occupancy = rung_occupancy(self.rungs, self._ended_at, self._running_epochs())
            views.append(folded(occupancy))
        if best and not wide and self._settings(best):
            views.append(folded(f"best: {self._settings(best)}"))
        return Group(*views)


_STYLES = {"stopped early": "dim", "failed": "red"}


@dataclass(frozen=True)
class Ticking:
    """A text with the time since `started_at` (`time.monotonic`), as of when it is drawn."""

    before: str
    started_at: float
    after: str = ""

    def __rich__(self) -> Text:
        elapsed = countdown(time.monotonic() - self.started_at)
        return Text(spell_controls(f"{self.before}{elapsed}{self.after}"))


def progress_line(title: str, share: float, text: RenderableType, *, width: int) -> Table:
    """Title, a bar filled to `share` in [0, 1], and what there is to say, in `width` columns."""
    bar = 24 if width >= WIDE else 10
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(width=bar)
    line.add_column(overflow="fold")
    line.add_row(title, ProgressBar(total=1.0, completed=share, width=bar), text)
    return line


def folded(text: str) -> Table:
    """Text that goes on in the next line where the terminal ends."""
    line = Table.grid()
    line.add_column(overflow="fold")
    line.add_row(text)
    return line


def rung_occupancy(rungs: Sequence[int], ended: Mapping[int, int], running: Sequence[int]) -> str:
    """How many runs have reached each rung, and how many of them are running.

    Args:
        rungs: epochs at which trials are compared, ascending; ended: how many runs ended after so
            many epochs; running: epochs done of each that runs.

    Returns:
        "rungs: epoch 1: 9 (2 running), epoch 3: 4, epoch 9: 1"; a running one is counted as
        such at the last rung that it has reached.
    """
    parts = []
    for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
        reached = sum(count for epochs, count in ended.items() if epochs >= rung)
        reached += sum(done >= rung for done in running)
        here = sum(rung <= done and (following is None or done < following) for done in running)
        parts.append(f"epoch {rung}: {reached}" + (f" ({here} running)" if here else ""))
    return f"rungs: {', '.join(parts)}" if parts else ""


def _metric(name: str, row: dict[str, Any]) -> str:
    return f"{name} {exact_figure(name, row[name])}"


def _figures(row: dict[str, Any], metric: str) -> str:
    names = [name for name in ("train_loss", "train_top1", metric) if name in row]
    return "  ".join(_metric(name, row) for name in names)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """An empty table; names in the first column are broken before figures are cut."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if index else "left",
            no_wrap=bool(index),
            min_width=len(column),
        )
    return table


def leaderboard_table(board: list[Row], config: StudyConfig) -> Table:
    """The closing table: the winner, champions and baselines, the other finalists.

    One column for each objective and bounded metric, then the test split's.
    """
    seeds = max((len(row.test) for row in board), default=0)
    title = f"leaderboard: mean ± sd over {several(seeds, 'seed')}"
    tested = find_test_metric(board, config)
    of_test = [*dict.fromkeys([tested, "test_top1"])]
    names = [f"{n} %" if is_share(n) else n for n in (*config.watched, *of_test)]
    rest = [name for name in ("test_nll", "test_ece") if name != tested]
    columns = ("configuration", *names, *rest)
    table = plain_table(*columns, title=title)
    longest = max((len(row.val) for row in board), default=0)
    for row in board:
        # What was clearly worse was given fewer seeds.
        fewer = f" (n={len(row.val)})" if 0 < len(row.val) < longest else ""
        table.add_row(
            f"{row.name} (winner)" if row.winner else label(row.name) + fewer,
            short_spread(row.val, config.metric),
            *(short_spread(row.figures(name), name) for name in config.watched[1:]),
            *(["failed"] if row.failed else [short_spread(row.tested(of_test[0]), of_test[0])]),
            *(short_spread(row.tested(name), name) for name in of_test[1:]),
            *(_mean(row.figures(name)) for name in rest),
            style="bold" if row.winner else None,
        )
    return table


def front_table(front: list[RunRecord], config: StudyConfig) -> Table:
    """The Pareto front of the search: its trials, one column per objective."""
    table = plain_table("trial", *config.watched, title="Pareto front of the search")
    table.add_column("settings")
    for record in front:
        figures = [exact_figure(name, record.last[name]) for name in config.watched]
        table.add_row(
            str(record.number), *figures, _assignments(record.config, config.shown_settings)
        )
    return table


def winner_settings(board: list[Row], config: StudyConfig) -> str:
    """The winner's settings, one line; a second one if it breaks a constraint."""
    text = f"winner: {_assignments(board[0].config.to_dict(), config.shown_settings)}"
    if total_violation(config.bounds, board[0].means()) > 0:
        text += (
            f"\nnone that ran keeps {', '.join(config.constraints)} in the mean over its seeds: "
            "the winner is the nearest"
        )
    return text


def difference_lines(study: StudyReader) -> list[str]:
    """The winner against champions and baselines, a line each; then how sure its place is, and
    what is better on the test split."""
    board, on_test = study.leaderboard(), study.differences()
    found = [
        *((name, f, board.config.metric) for name, f in study.validation_differences().items()),
        *((name, f, board.test_metric) for name, f in on_test.items()),
    ]
    lines = [difference_text(*difference) for difference in found]
    better = describe_better_on_test(board, size=not on_test)
    return [*lines, *filter(None, [describe_lead(board), better])]


def _assignments(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """Those of `names` that have a value and that the settings' method, if it is known, reads."""
    method = METHODS.get(settings.get("method", ""))
    return " ".join(
        f"{name}={value_text(settings[name])}"
        for name in names
        if settings.get(name) is not None
        and (method is None or name not in REGISTRY or name in method.setting_names)
    )


def _mean(values: Sequence[float]) -> str:
    return f"{mean_sd(values)[0]:.3f}" if values else ""
