"""The view of a person: plain lines, the live table, the leaderboard."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from ekd_ray.cli.console import Console
from ekd_ray.cli.terminal import Terminal, leaderboard_table, winner_settings
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.words import short_spread
from ekd_ray.scale.schedulers import Chance

CONFIG = StudyConfig(space={"kd_weight": {"low": 1, "high": 9}})


def make(*, tty: bool = False, **options: Any) -> tuple[Terminal, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=tty, width=100)
    return Terminal(shown=("kd_weight",), rungs=(1, 3, 9), console=console, **options), text


def play(terminal: Terminal) -> None:
    """Three runs: to the end, stopped after epoch 3, and one whose process never came up."""
    terminal.stage("search", 3, 9)
    for number, epochs in ((0, 9), (1, 3)):
        terminal.started(f"trial {number}", number, {"kd_weight": 2.5})
        for epoch in range(1, epochs + 1):
            row = {"epoch": epoch, "train_loss": 1.0, "val_top1": 0.5 - number / 10}
            terminal.epoch(number, row)
        terminal.ended(number, failure=None)
    terminal.ended(2, failure="train_loss became nan")
    terminal.close()


def test_a_line_has_the_studys_own_metric() -> None:
    terminal, text = make(metric="val_nll", mode="min")
    terminal.stage("search", 1, 1)
    terminal.started("trial 0", 0, {})
    terminal.epoch(0, {"epoch": 1, "train_loss": 1.0, "val_top1": 0.5, "val_nll": 0.75})
    terminal.ended(0, failure=None)
    line = text.getvalue().splitlines()[-1]
    assert "train_loss 1.0000  val_nll 0.75" in line and "val_top1" not in line


def test_without_a_terminal_each_run_is_one_line() -> None:
    terminal, text = make()
    play(terminal)
    title, first, second, third, why = text.getvalue().splitlines()
    assert title == "search: 3 runs of up to 9 epochs"
    assert first.startswith("[1/3] trial 0 complete at epoch 9/9  train_loss 1.0000  val_top1 50")
    assert "kd_weight=2.5  best val_top1 50.00% (trial 0)" in first
    assert second.startswith("[2/3] trial 1 stopped early at epoch 3/9")
    assert third.startswith("[3/3] trial 2 failed at epoch 0/9")
    assert why == "trial 2 failed: train_loss became nan"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_live_view_fits_its_terminal(width: int) -> None:
    """Nothing is cut off or spills over: figures whole, long lines go on in the next."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width)
    terminal = Terminal(shown=("kd_weight",), rungs=(1, 3, 9, 27, 81, 200), console=console)
    terminal.stage("search", 30, 200)
    for number in range(20):
        terminal.started(f"trial {number}", number, {"kd_weight": 1.2345})
        terminal.epoch(number, {"epoch": 3 + number, "train_loss": 1.0, "val_top1": 0.01 * number})
        if number % 2:
            terminal.ended(number, failure=None)
    text.seek(0)
    text.truncate()
    console.print(terminal._table())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines()
    terminal.close()
    assert max(map(len, lines)) <= width
    assert "…" not in text.getvalue()
    shown = " ".join(" ".join(lines).split())
    occupancy = "rungs: epoch 1: 20, epoch 3: 20 (3 running), epoch 9: 14 (7 running), epoch 27: 0"
    assert occupancy in shown
    assert "10/30 ended, 10 running, 0 s best val_top1 19.00% (trial 19)" in shown
    running = [f"trial {number} " for number in range(0, 20, 2)]
    assert all(name in shown for name in [*running, "trial 19 "])
    assert "trial 7 " not in shown, "the last to end are shown, up to 16 runs in all"
    assert "kd_weight=1.234" in shown or "kd_weight=1.235" in shown


def test_the_live_view_is_no_higher_than_the_terminal() -> None:
    """rich leaves out what is below, and there stands how far the search is."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    shown = tuple(f"a_long_setting_{n}" for n in range(8))
    terminal = Terminal(shown=shown, rungs=(1, 3, 9), console=console)
    terminal.stage("search", 30, 9)
    for number in range(30):
        terminal.started(f"trial {number}", number, dict.fromkeys(shown, 0.12345))
        terminal.epoch(number, {"epoch": 9, "train_loss": 1.0, "val_top1": 0.5})
    lines = console.render_lines(terminal._table())
    terminal.close()
    assert len(lines) <= 20
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert "0/30 ended" in text and "best: a_long_setting_0=0.1235" in text


def test_the_teachers_logits_have_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    for tty in (False, True):
        terminal, text = make(tty=tty)
        for done in range(3):
            terminal.filled(done, 2)
        terminal.stage("search", 1, 9)
        terminal.close()
        if tty:
            assert "━" in text.getvalue() and "2/2 parts" in text.getvalue()
        else:
            line, _ = text.getvalue().splitlines()
            assert line.startswith("teacher logits: 100%")


def test_a_step_without_epochs_is_one_line_and_the_last_epoch_leads_to_the_test_split() -> None:
    terminal, text = make()
    terminal.stage("export", 1, 0)
    terminal.close()
    assert text.getvalue() == "export ...\n"
    terminal, text = make(tty=True)
    terminal.stage("confirm: final runs", 1, 2)
    terminal.started("trial 3 seed 1", 0, {})
    for epoch, state in ((1, "running"), (2, "test split")):
        terminal.epoch(0, {"epoch": epoch, "train_loss": 1.0})
        assert terminal._state(terminal.runs[0]) == state
    terminal.ended(0, failure=None)
    assert terminal._state(terminal.runs[0]) == "complete"
    terminal.close()


def test_the_expected_time_left_learns_from_runs_that_were_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("ekd_ray.cli.terminal.time.monotonic", lambda: now[0])
    terminal, _ = make()
    terminal.stage("search", 5, 9)
    for number, epochs in enumerate((1, 3, 2)):
        assert terminal.seconds_expected() is None
        terminal.started(f"trial {number}", number, {})
        for epoch in range(1, epochs + 1):
            now[0] += 10.0
            terminal.epoch(number, {"epoch": epoch, "train_loss": 1.0})
        terminal.ended(number, failure=None)
    # 10 s an epoch; two more runs of 2 epochs on average, of 9 at most.
    assert terminal.seconds_expected() == pytest.approx(40.0)
    assert terminal.seconds_left() == pytest.approx(180.0)
    assert terminal._time_left() == "  about 40 s left, at most 3 min 0 s"


@pytest.mark.parametrize(("row", "mark"), [
    ({"train_loss": 1.0, "val_top1": 0.6}, ""),
    ({"train_loss": 1.0, "val_top1": 0.12}, "may be chance"),
    ({"train_loss": 170.0, "val_top1": 0.6}, "loss diverged"),
    ({"train_loss": float("nan"), "val_top1": 0.1}, "loss diverged"),
    ({"train_loss": 10.0}, ""),  # trained on all images: no validation
])  # fmt: skip
@pytest.mark.parametrize("tty", [False, True])
def test_a_run_that_learns_nothing_is_marked(row: dict[str, Any], mark: str, tty: bool) -> None:
    terminal, text = make(tty=tty, chance=Chance(classes=10, images=1000))
    terminal.stage("search", 2, 9)
    terminal.started("trial 0", 0, {})
    terminal.epoch(0, {"epoch": 1, **row})
    if not tty:
        terminal.ended(0, failure=None)
    terminal.close()
    shown = text.getvalue()
    assert ("may be chance" in shown, "loss diverged" in shown) == (
        mark == "may be chance", mark == "loss diverged"
    )  # fmt: skip


def test_what_runs_and_for_how_long_is_seen_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ekd_ray.cli.terminal.time.monotonic", lambda: now[0])
    terminal, text = make(tty=True)
    terminal.stage("starting Ray", 1, 0)
    now[0] += 7.0
    terminal.close()
    assert "starting Ray" in text.getvalue() and "7 s" in text.getvalue()
    terminal.stage("search", 3, 9)
    before = text.tell()
    now[0] += 65.0
    terminal.console.print(terminal._table())
    assert "starting workers, 1 min 5 s" in text.getvalue()[before:]
    view = terminal._table()  # the clock goes on in a view that nobody draws anew
    terminal.started("trial 0", 0, {})
    now[0] += 1.0
    before = text.tell()
    terminal.console.print(view)
    terminal.console.print(terminal._table())
    terminal.close()
    shown = text.getvalue()[before:]
    assert "starting workers, 1 min 6 s" in shown and "1 running, 1 min 6 s" in shown


def test_quiet_says_nothing() -> None:
    terminal, text = make(quiet=True)
    play(terminal)
    assert text.getvalue() == ""


@pytest.mark.parametrize(
    ("metric", "mode", "best"), [("val_top1", "max", 0), ("val_nll", "min", 1)]
)
def test_the_best_follows_the_metric(metric: str, mode: str, best: int) -> None:
    terminal, _ = make(metric=metric, mode=mode)
    terminal.stage("search", 2, 9)
    for number, value in enumerate((0.9, 0.3)):
        terminal.started(f"trial {number}", number, {})
        terminal.epoch(number, {"epoch": 1, "train_loss": 1.0, metric: value})
    found = terminal.best()
    assert found is not None
    assert found.name == f"trial {best}"


def test_what_still_trains_is_not_the_best_once_a_run_has_ended() -> None:
    """Its figure may fall again until its last epoch."""
    terminal, _ = make()
    terminal.stage("search", 2, 9)
    for number, value in enumerate((0.3, 0.9)):
        terminal.started(f"trial {number}", number, {})
        terminal.epoch(number, {"epoch": 9 - number, "train_loss": 1.0, "val_top1": value})
    terminal.ended(0, failure=None)
    best = terminal.best()
    assert best is not None and best.name == "trial 0"


def rows() -> list[Row]:
    metrics = ({"test_nll": 1.0, "test_ece": 0.1},) * 2
    config = DistillConfig(kd_weight=2.5)
    return [
        Row(name="trial 12", config=config, val=(0.5, 0.52), test=(0.6, 0.62),
            test_metrics=metrics, winner=True),
        Row(name="authors' values", config=config, test=(0.5, 0.5), test_metrics=metrics),
        Row(name="kd", config=config, failed="train_loss became nan"),
        Row(name="trial 3", config=config, val=(0.4, 0.4)),
    ]  # fmt: skip


def test_the_leaderboard_fits_eighty_columns() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(leaderboard_table(rows(), CONFIG))
    shown = text.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    winner = next(line for line in shown.splitlines() if "winner)" in line)
    assert winner.split() == [
        "trial", "12", "(winner)", "51.00", "±", "1.41", "61.00", "±", "1.41", "1.000", "0.100",
    ]  # fmt: skip
    assert "failed" in next(line for line in shown.splitlines() if line.strip().startswith("KD"))
    assert winner_settings(rows(), CONFIG) == "winner: kd_weight=2.5"


def test_a_run_shows_what_its_method_reads():
    """With the method itself searched, each run has settings of its own."""
    terminal = Terminal(shown=("method", "kd_weight", "dkd_beta", "lr"))
    settings = {"kd_weight": 2.0, "dkd_beta": 8.0, "lr": 0.05, "temperature": None}
    for number, method in enumerate(("kd", "dkd", "none")):
        terminal.started(method, number, {**settings, "method": method})
    shown = [terminal._settings(terminal.runs[number]) for number in range(3)]
    assert shown == [
        "method=kd kd_weight=2 lr=0.05",
        "method=dkd kd_weight=2 dkd_beta=8 lr=0.05",
        "method=none lr=0.05",
    ]


def test_a_run_that_goes_on_after_a_pause_keeps_its_figures() -> None:
    terminal, _ = make()
    terminal.stage("search", 1, 9)
    terminal.started("trial 0", 0, {"kd_weight": 2.5})
    terminal.epoch(0, {"epoch": 3, "train_loss": 1.0, "val_top1": 0.5})
    terminal.started("trial 0", 0, {"kd_weight": 3.0})
    best = terminal.best()
    assert best is not None and best.row["epoch"] == 3
    assert best.settings == {"kd_weight": 3.0}


def test_one_seed_has_no_deviation() -> None:
    assert short_spread((0.5,), "val_top1") == "50.00"
    assert short_spread((0.5, 0.7), "val_top1") == "60.00 ± 14.14"
    assert short_spread((0.25,), "val_nll") == "0.250"
    assert short_spread((0.25, 0.25), "val_nll") == "0.250 ± 0.000"
