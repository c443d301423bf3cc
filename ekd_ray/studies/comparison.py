"""Studies side by side: two in detail, or many as the papers print them (methods, pairs)."""

from __future__ import annotations

import itertools
import json
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich import box
from rich.table import Table
from scipy import stats

from ekd_ray.config.phrases import short_name
from ekd_ray.errors import UserError, spell_controls
from ekd_ray.files import check_name, write_json, write_text
from ekd_ray.remote.location import is_uri
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.paired import LEAST_SEEDS, LEVEL
from ekd_ray.results.records import CONFIG, STUDY_FILE
from ekd_ray.results.row_names import label
from ekd_ray.results.study_reader import StudyReader

COMPARISON = "comparison"
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "name", "figure")]
    + [(name, pa.float64()) for name in ("this", "other", "difference", "low", "high")]
    + [(name, pa.int64()) for name in ("this_n", "other_n")]
    + [(name, pa.string()) for name in ("this_value", "other_value")]
)
TEST_FIGURES = ("test_top1", "test_nll", "test_ece")
# Rows that every study of a pair has in common, in the order of the table.
_SHARED = {name: label(name) for name in ("none", "kd")}
Place = tuple[str, str]  # pair and method: a column of a table, and the row of what was searched


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Test top-1 (fractions) of one row and pair: mean and sd over n seeds, or a failure."""

    pair: str
    row: str
    mean: float | None = None
    sd: float | None = None
    n: int = 0
    failed: str | None = None

    def text(self) -> str:
        """`76.31 ± 0.12` in percent, of one seed `76.31`, `failed`, or nothing."""
        if self.mean is None or self.sd is None:
            return "failed" if self.failed else ""
        text = f"{100 * self.mean:.2f}"
        return f"{text} ± {100 * self.sd:.2f}" if self.n > 1 else text


def find_studies(runs: Sequence[str]) -> dict[str, StudyReader]:
    """The studies at these paths or URIs, by path.

    A folder that holds no study, but some in folders or in `<pair>/<method>/`, stands for these.
    Single runs, which lie beside studies in `runs/*`, are left out with a warning.

    Raises:
        UserError: neither a study nor a single run at one of the paths.
    """
    studies = {}
    for run in runs:
        folder = None if is_uri(run) else check_name(run)
        below: list[str] = []
        if folder and not (folder / STUDY_FILE).exists():
            if (folder / CONFIG).is_file():
                warnings.warn(f"{run} is left out: it is a single run, not a study.", stacklevel=2)
                continue
            found = (folder.glob(f"{depth}/{STUDY_FILE}") for depth in ("[!.]*", "[!.]*/[!.]*"))
            below = [str(file.parent) for file in sorted(itertools.chain(*found), key=str)]
        for path in below or [str(folder or run)]:
            studies[path] = StudyReader.load(path)
    return studies


def place_studies(studies: Mapping[str, StudyReader]) -> dict[Place, StudyReader]:
    """The studies, given by path, by their places in a table.

    Where data sets differ, a pair is named with its own; where two studies are of one pair and
    method, the method is named with the study's path.
    """
    shared = {path: study.config.distill for path, study in studies.items()}
    several_data = len({run.dataset for run in shared.values()}) > 1
    pairs = {
        path: f"{run.teacher or 'none'}-{run.student}"
        + (f" ({short_name(run.dataset)})" if several_data else "")
        for path, run in shared.items()
    }
    count = Counter((pairs[path], run.method) for path, run in shared.items())
    found = {}
    for path, study in studies.items():
        method = shared[path].method
        if count[pairs[path], method] > 1:
            method = f"{method} in {path}"
        found[pairs[path], method] = study
    return found


def collect_cells(studies: Mapping[Place, StudyReader | str]) -> list[Cell]:
    """The cells of finished studies, or of one that failed: then why it has no result."""
    cells: dict[tuple[str, str], Cell] = {}
    shared: dict[tuple[str, str], Row] = {}
    for (pair, method), study in studies.items():
        searched = f"{method}, searched"
        if isinstance(study, str):
            cells[pair, searched] = Cell(pair=pair, row=searched, failed=study)
            continue
        for entry in study.leaderboard():
            if not (entry.test or entry.failed):
                continue
            rows = [searched] * entry.winner
            if entry.name in _SHARED:
                # Baselines of a pair are the same runs in each of its studies, unless the
                # method brings a schedule of its own, or the user settings: then that with
                # most seeds is shown.
                row = _SHARED[entry.name]
                known = shared.setdefault((pair, row), entry)
                if known.config.fingerprint() != entry.config.fingerprint():
                    row = f"{row} (settings of {method})"
                    rows.append(row)
                elif known is entry or len(known.test) < len(entry.test):
                    shared[pair, row] = entry
                    rows.append(row)
            elif entry.entered_as != "finalist":
                rows.append(f"{method}, {label(entry.name)}")
            found = mean_sd(entry.test) if entry.test else (None, None, 0)
            for row in rows:
                cells[pair, row] = Cell(
                    pair=pair, row=row, mean=found[0], sd=found[1], n=found[2], failed=entry.failed
                )
    return list(cells.values())


def _grid(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text."""
    pairs = list(dict.fromkeys(cell.pair for cell in cells))
    rows = list(dict.fromkeys(cell.row for cell in cells))
    kinds = [*_SHARED.values()]
    # `KD (settings of mlkd)` is below `KD`.
    shared = [row for kind in kinds for row in rows if row.partition(" (")[0] == kind]
    rest = sorted((row for row in rows if row not in shared), key=lambda row: row.partition(", "))
    by_place = {(cell.row, cell.pair): cell.text() for cell in cells}
    seeds = {cell.n for cell in cells if cell.n}
    head = f"test top-1 %, mean ± sd, n = {', '.join(map(str, sorted(seeds))) or 0}"
    return [head, *pairs], [
        [row, *(by_place.get((row, pair), "") for pair in pairs)] for row in [*shared, *rest]
    ]


def comparison_table(cells: list[Cell]) -> Table:
    """The table for the terminal."""
    header, rows = _grid(cells)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(header[0], no_wrap=True)
    for pair in header[1:]:
        table.add_column(pair, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def write_comparison(out: Path, cells: list[Cell]) -> None:
    """Write `comparison.json` (the cells) and `comparison.md` (the table) into `out`."""
    header, rows = _grid(cells)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    write_text(out / f"{COMPARISON}.md", spell_controls(text) + "\n")
    write_json(out / f"{COMPARISON}.json", [asdict(cell) for cell in cells])


def compare_studies(this: StudyReader, other: StudyReader) -> pa.Table:
    """One table of three kinds of rows.

    `result`: a leaderboard row of both (winner, champion or baseline) and a `figure`: the
    means over the seeds, their `difference` (this minus other) and its 95 % interval by Welch's
    t (null with fewer than three seeds on a side). `cost`: trials, epochs and hours of the
    searches. `setting`: a setting that differs, in `this_value` and `other_value` as JSON.

    Raises:
        UserError: the studies are of different data sets, whose figures say nothing about each
            other.
    """
    ours, theirs = this.config.distill.dataset, other.config.distill.dataset
    if ours != theirs:
        raise UserError(
            f"{this.path} is of {ours} and {other.path} of {theirs}: compare studies of the "
            "same data set."
        )
    rows = [*_results(this, other), *_costs(this, other), *_settings(this, other)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)  # null where a row has no such column


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of mean(first) - mean(second), of independent samples; None with few."""
    if min(len(first), len(second)) < LEAST_SEEDS:
        return None, None
    if statistics.pstdev(first) == statistics.pstdev(second) == 0:
        return None, None
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(LEVEL)
    return float(found.low), float(found.high)


def _named(study: StudyReader) -> dict[str, Row]:
    """Rows of the leaderboard by what they are: the trial's number says nothing elsewhere."""
    board = study.leaderboard()
    named = {row.name: row for row in board if row.entered_as in ("champion", "baseline")}
    return {"winner": board[0], **named} if board and board[0].winner else named


def _results(this: StudyReader, other: StudyReader) -> list[dict[str, Any]]:
    ours, theirs = _named(this), _named(other)
    found = []
    for name in (name for name in ours if name in theirs):
        for figure in (*dict.fromkeys((*this.config.watched, "val_top1")), *TEST_FIGURES):
            first, second = (list(rows[name].figures(figure)) for rows in (ours, theirs))
            if first and second:
                row = _figure_row("result", name, figure, *map(statistics.fmean, (first, second)))
                low, high = welch(first, second)
                counts = {"this_n": len(first), "other_n": len(second)}
                found.append({**row, "low": low, "high": high, **counts})
    return found


def _figure_row(kind: str, name: str, figure: str, this: float, other: float) -> dict[str, Any]:
    values = {"this": this, "other": other, "difference": this - other}
    return {"kind": kind, "name": name, "figure": figure, **values}


def _costs(this: StudyReader, other: StudyReader) -> list[dict[str, Any]]:
    ours, theirs = this.records(), other.records()
    figures = {
        "trials": len,
        "epochs": lambda records: sum(len(record.history) for record in records),
        "hours": lambda records: sum(record.seconds for record in records) / 3600,
    }
    return [
        _figure_row("cost", "search", name, float(figure(ours)), float(figure(theirs)))
        for name, figure in figures.items()
    ]


def _settings(this: StudyReader, other: StudyReader) -> list[dict[str, Any]]:
    ours, theirs = (_flat(_resolved(study)) for study in (this, other))
    return [
        {
            "kind": "setting", "name": name,
            "this_value": json.dumps(ours.get(name)), "other_value": json.dumps(theirs.get(name)),
        }
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]  # fmt: skip


def _resolved(study: StudyReader) -> dict[str, Any]:
    """A study's settings: what it left open as its runs had it, and no training of a teacher
    where one was given."""
    values = study.config.to_dict()
    run = next((record.config for record in study.records() if record.config), {})
    left = {name for name, value in values["distill"].items() if value is None}
    left -= {"teacher_weights", *(study.config.space or {})}
    values["distill"] |= {name: run.get(name) for name in left}
    if values["distill"]["teacher_weights"] is not None:
        values["teacher_training"] = None
    return values


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of the runs and ranges of the space by dotted names."""
    groups = {name: values.pop(name) or {} for name in ("distill", "space", "authors")}
    inner = {f"{group}.{n}": v for group, named in groups.items() for n, v in named.items()}
    return {**values, **inner}
