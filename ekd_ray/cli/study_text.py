"""A study in words and tables: finished by `tune`, or looked at by `show`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement
from rich.table import Table

from ekd_ray.cli.console import Console
from ekd_ray.cli.terminal import (
    difference_lines,
    front_table,
    leaderboard_table,
    plain_table,
    winner_settings,
)
from ekd_ray.config.phrases import command_text, joined, several
from ekd_ray.config.study_config import TESTED_AT
from ekd_ray.results.importance import has_enough, judged_trials, read_importance
from ekd_ray.results.leaderboard import Row, gain_values, mean_sd
from ekd_ray.results.paired import LEAST_SEEDS
from ekd_ray.results.records import BEST, REPORT
from ekd_ray.results.report.content import (
    Content,
    describe_model,
    describe_parameters,
    gather,
    list_other_names,
    write_headline,
)
from ekd_ray.results.row_names import label
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import (
    describe_choice,
    describe_damage,
    describe_missed_gain,
    describe_teacher,
    duration,
    figure_text,
    metric_name,
    resume_command,
    signed_text,
    value_text,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from ekd_ray.results.bundle import Bundle
    from ekd_ray.results.progress import Progress
    from ekd_ray.results.records import RunRecord

MOST_FAILURES = 10
MOST_WIDE = 1000  # signs in a line of a table
STATUSES = {"complete": "of full length", "pruned": "stopped early", "failed": "failed",
            "running": "running"}  # fmt: skip


def print_progress(study: StudyReader, other: pa.Table | None, other_name: str) -> None:
    """Print a study, running or finished, and what differs from another one."""
    content = gather(study, read_importance(study.records(), study.config, study.path))
    parts: list[str | Table] = [
        *_warnings(study),
        *write_headline(content),
        _status(content),
        *_teacher(study),
    ]
    if content.config.objectives:
        parts.append(front_table(study.pareto(), content.config))
    if content.board:
        parts += [
            leaderboard_table(content.board, content.config),
            *_other_names(content.board),
            winner_settings(content.board, content.config),
            *difference_lines(study),
        ]
    elif content.ranked:
        parts.append(_search_table(content))
    parts += _importance(content)
    parts += [*_time(content), *_savings(content)]
    parts += _failures(study, content.board, content.ended)
    parts += describe_damage(content.damaged)
    if other is not None:
        parts += _comparison(other, other_name)
    if content.progress.stage == "finished":
        parts += _places(study, study.path / BEST)
    _print(parts)


def print_study(study: StudyReader, bundle: Bundle) -> None:
    """Print a finished study: leaderboard, winner, differences, and where its files are."""
    board, config = study.leaderboard(), study.config
    again = command_text("show", study.path, "--trust-plugins")
    parts: list[str | Table] = [
        *filter(None, [describe_missed_gain(board, size=False)]),  # the differences stand below
        *_warnings(study),
        *([front_table(study.pareto(), config)] if config.objectives else []),
        leaderboard_table(board, config),
        *_other_names(board),
        winner_settings(board, config),
        *_failures(study, board, study.records()),
        *difference_lines(study),
        *_selection_gap(study, board[0]),
        *_teacher(study),
        *describe_damage(study.damaged()),
        describe_choice(study.header.get(TESTED_AT, ())),
        *_places(study, bundle.path),
        *([f"again: {again}"] if config.distill.plugins else []),
    ]
    _print(parts)


def _places(study: StudyReader, bundle: Path) -> list[str]:
    """Where a study's results lie."""
    places = {"bundle": bundle, "report": study.path / REPORT}
    return [
        *(f"{name}: {path}" for name, path in places.items() if path.exists()),
        f"curves: tensorboard --logdir {shlex.quote(str(study.path))}",
    ]


def _print(parts: list[str | Table]) -> None:
    console = Console()
    # Figures whole: a line that the terminal breaks is better than one cut short.
    wide = console.options.update(max_width=MOST_WIDE)
    tables = [Measurement.get(console, wide, part) for part in parts if isinstance(part, Table)]
    # rich counts no padding at the edges, but needs it.
    console = Console(width=max([console.width, *(table.minimum + 2 for table in tables)]))
    for part in parts:
        console.print(part)


def _other_names(board: list[Row]) -> list[str]:
    return [
        f"{label(row.name)}: the same configuration as {joined(names)}"
        for row in board
        if (names := list_other_names(row))
    ]


def _selection_gap(study: StudyReader, winner: Row) -> list[str]:
    """The winner's curse in one line: its search score against its score under fresh seeds."""
    metric = study.config.metric
    scores = [r.value(metric) for r in study.ranked() if r.number == winner.number]
    if not (winner.val and scores):  # a champion that no trial tried to its end has none
        return []
    (score,), (fresh, _, count) = scores, mean_sd(winner.val)
    over = several(count, "fresh seed")
    values = (figure_text(metric, value) for value in (score, fresh))
    return ["winner's {}: {} in the search, {} over {}".format(metric, *values, over)]


def progress_values(study: StudyReader, other: pa.Table | None) -> dict[str, Any]:
    """Everything that `print_progress` shows, as plain values."""
    content = gather(study, read_importance(study.records(), study.config, study.path))
    return {
        "study": str(study.path),
        "progress": asdict(content.progress),
        "teacher": asdict(content.teacher) if content.teacher else None,
        "leaderboard": study.leaderboard().to_table().to_pylist(),
        "lead": asdict(lead) if (lead := content.board.lead) else None,
        "gain": gain_values(content.board),
        "validation_differences": {
            name: asdict(found) for name, found in content.validation_differences.items()
        },
        "differences": {name: asdict(found) for name, found in content.differences.items()},
        "best": _best(content),
        "pareto_front": study.pareto().to_table().to_pylist() if content.config.objectives else [],
        "model": content.findings and asdict(content.findings),
        "time": content.time,
        "saved": asdict(content.saved),
        "failures": [
            {"trial": r.number, "reason": r.reason, "params": r.params}
            for r in content.ended
            if r.status == "failed"
        ],
        "damaged": content.damaged,
        "comparison": other.to_pylist() if other is not None else None,
    }


def _best(content: Content) -> dict[str, Any] | None:
    if not content.board and not content.ranked:
        return None
    best = content.study.best()
    shown = {name: getattr(best.config, name) for name in content.config.shown_settings}
    return {"name": best.name, "confirmed": best.winner, "params": shown}


def describe_stage(now: Progress, *, named: bool = True) -> str:
    """The stage that a study has come to, unless it is `named` beside this already, whether the
    study runs, and its trials by how they ended."""
    states = STATUSES if now.driven is not False else {**STATUSES, "running": "not ended"}
    counts = [f"{now.trials[name]} {text}" for name, text in states.items() if now.trials.get(name)]
    driven = {None: "", True: "running", False: "interrupted"}[now.driven]
    parts = [
        f"stage: {now.stage}" if named else "",
        driven if now.stage != "finished" else "",
        f"trials: {', '.join(counts)}" if counts else "",
    ]
    return "; ".join(filter(None, parts))


def _status(content: Content) -> str:
    now = content.progress
    # Before there is a tested winner the headline names the stage.
    text = describe_stage(now, named=bool(content.winner and content.winner.test))
    in_full = sum(run.full_run_of is not None for run in content.ended)
    if in_full:
        text += f"; {several(in_full, 'full run')} of stopped trials among them"
    if now.stage != "finished" and now.quiet_seconds is not None:
        text += f"; last epoch recorded {duration(now.quiet_seconds / 3600)} ago"
    if now.stage != "finished" and now.driven is False:
        text += f"\ncontinue with: {resume_command(content.config, content.study.place)}"
    return text


def _search_table(content: Content) -> Table:
    """The best trials so far, where nothing is confirmed yet."""
    metric, space = content.config.metric, content.config.space or {}
    table = plain_table(
        "trial", metric_name(metric), *space, title="best complete trials of the search"
    )
    for record in content.ranked[:MOST_FAILURES]:
        values = (value_text(record.params.get(name)) for name in space)
        name = record.name.removeprefix("trial ")
        table.add_row(name, figure_text(metric, record.value(metric)), *values)
    return table


def _importance(content: Content) -> list[str | Table]:
    """The findings of the study's model that the last report kept: they take seconds."""
    found = content.findings
    if not content.ended:
        return []
    if found is None:
        if not has_enough(judged_trials(content.ended, content.config.metric)):
            return [describe_parameters(content)]
        command = command_text("report", content.study.path)
        return [f"Which parameter mattered: {command} computes it."]
    title = f"importance for {found.metric}"
    table = plain_table("parameter", "alone", "with others", title=title)
    for effect in found.effects:
        table.add_row(effect.parameter, f"{effect.main:.0%}", f"{effect.total:.0%}")
    return [table, describe_parameters(content), describe_model(content)]


def _warnings(study: StudyReader) -> list[str]:
    return [f"warning: {text}" for text in study.warnings()]


def _teacher(study: StudyReader) -> list[str]:
    found = study.teacher()
    return [describe_teacher(found)] if found else []


def _time(content: Content) -> list[Table]:
    table = plain_table("stage", "runs", "epochs", "time", title="time, all runs together")
    for row in content.time:
        counts = ("" if row[name] is None else str(row[name]) for name in ("runs", "epochs"))
        time = duration(row["hours"]) if row["hours"] else "too short to measure"
        table.add_row(row["stage"], *counts, time)
    return [table] * bool(content.time)


def _savings(content: Content) -> list[str]:
    saved, lines = content.saved, []
    if saved.stopped_epochs:
        lines.append(
            f"early stops saved {several(saved.stopped_epochs, 'epoch')}, "
            f"{duration(saved.stopped_hours)}"
        )
    if saved.views and saved.views > (saved.asked or 0):  # else the runs that asked are to come
        text = (
            f"of {saved.views:,} answers of the teacher {saved.asked:,} were computed, the rest "
            "came from the cache"
        )
        hours = saved.cache_hours
        lines.append(text + (f": {duration(hours)} saved" if hours is not None else ""))
    return lines


def _failures(study: StudyReader, board: list[Row], trials: list[RunRecord]) -> list[str]:
    failed = [record for record in trials if record.status == "failed"]
    lines = [f"trial {r.number} failed: {r.reason}" for r in failed[:MOST_FAILURES]]
    lines += _failed_rows(board)
    if len(failed) > MOST_FAILURES:
        lines.append(f"... and {len(failed) - MOST_FAILURES} more failed trials")
    if lines:
        lines.append(f"what they wrote: {command_text('logs', study.path)}")
    return lines


def _failed_rows(board: list[Row]) -> list[str]:
    return [f"{label(row.name)} failed: {row.failed}" for row in board if row.failed]


def _comparison(found: pa.Table, other: str) -> list[Table]:
    """Figures and costs of both studies, and below them the settings that differ."""
    rows = found.to_pylist()
    columns = ("what", "this", "other", "difference", "95 % interval")
    figures = plain_table(*columns, title=f"this study and {other}")
    for row in (row for row in rows if row["kind"] != "setting"):
        figures.add_row(f"{label(row['name'])}: {row['figure']}", *_difference_cells(row))
    settings = plain_table("setting", title="settings that differ")
    for name in ("this", "other"):
        settings.add_column(name, overflow="fold")
    for row in (row for row in rows if row["kind"] == "setting"):
        settings.add_row(row["name"], *_setting_texts(row["this_value"], row["other_value"]))
    return [figures, settings] if settings.row_count else [figures]


def _difference_cells(row: Mapping[str, Any]) -> list[str]:
    """Both values of a figure or cost, their difference and its interval."""
    name, values = row["figure"], [row["this"], row["other"]]
    if row["kind"] == "cost":
        if name == "hours":
            sign = "+" if row["difference"] > 0 else "-"
            return [*map(duration, values), sign + duration(abs(row["difference"])), ""]
        return [*(f"{value:.0f}" for value in values), f"{row['difference']:+.0f}", ""]
    interval = "-"
    if row["low"] is not None:
        interval = " to ".join(signed_text(name, row[end]) for end in ("low", "high"))
    elif min(row["this_n"], row["other_n"]) < LEAST_SEEDS:
        interval = f"needs {LEAST_SEEDS} seeds"
    shown = [figure_text(name, value) for value in values]
    return [*shown, signed_text(name, row["difference"]), interval]


def _setting_texts(this: str, other: str) -> list[str]:
    """JSON values as a table has them; of points and known studies how many there are."""
    values = [json.loads(text) for text in (this, other)]
    members = [[*v.values()] if isinstance(v, dict) else v for v in values]
    if not any(isinstance(m, list) and m and isinstance(m[0], dict | list) for m in members):
        return [this, other]
    own, others = (m or [] for m in members)
    return [
        f"{len(a)}" + (f", {differ} of them not in the other" if differ else "")
        for a, b in ((own, others), (others, own))
        for differ in [sum(entry not in b for entry in a)]
    ]
