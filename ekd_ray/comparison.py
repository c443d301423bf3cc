"""Several studies side by side: rows methods, columns pairs, as the papers print them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ekd_ray.files import write_json, write_text
from ekd_ray.results.leaderboard import mean_sd
from ekd_ray.results.study import Study

COMPARISON = "comparison"
# Rows that every study of a pair has in common, in the order of the table.
_SHARED = {"none": "student alone", "kd": "KD"}


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
        """`76.31 ± 0.12` in percent, `failed`, or nothing."""
        if self.mean is None or self.sd is None:
            return "failed" if self.failed else ""
        return f"{100 * self.mean:.2f} ± {100 * self.sd:.2f}"


def compare(out: Path, names: list[str], failures: dict[str, str]) -> list[Cell]:
    """The cells of finished studies below `out`.

    Args:
        names: `<pair>/<method>`, the studies' folders; failures: why some have no result.
    """
    cells: dict[tuple[str, str], Cell] = {}
    shared: dict[tuple[str, str], str] = {}
    for name in names:
        pair, _, method = name.rpartition("/")
        searched = f"{method}, searched"
        if name in failures:
            cells[pair, searched] = Cell(pair=pair, row=searched, failed=failures[name])
            continue
        for entry in Study.load(out / name).leaderboard():
            if not (entry.test or entry.failed):
                continue
            row = searched if entry.winner else f"{method}, authors' values"
            if entry.name in _SHARED:
                # Baselines of a pair are the same runs in each of its studies, unless the
                # method brings a schedule of its own.
                row, run = _SHARED[entry.name], entry.config.fingerprint()
                if shared.setdefault((pair, row), run) != run:
                    row = f"{row} ({method}'s schedule)"
            found = mean_sd(entry.test) if entry.test else (None, None, 0)
            cells[pair, row] = Cell(
                pair=pair, row=row, mean=found[0], sd=found[1], n=found[2], failed=entry.failed
            )
    return list(cells.values())


def _grid(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text."""
    pairs = list(dict.fromkeys(cell.pair for cell in cells))
    rows = list(dict.fromkeys(cell.row for cell in cells))
    shared = [row for row in _SHARED.values() if row in rows]
    rest = sorted((row for row in rows if row not in shared), key=_order)
    by_place = {(cell.row, cell.pair): cell.text() for cell in cells}
    seeds = {cell.n for cell in cells if cell.n}
    head = f"test top-1 %, mean ± sd, n = {', '.join(map(str, sorted(seeds))) or 0}"
    return [head, *pairs], [
        [row, *(by_place.get((row, pair), "") for pair in pairs)] for row in [*shared, *rest]
    ]


def _order(row: str) -> tuple[str, bool]:
    """A method's published values before its searched ones."""
    method, _, kind = row.partition(", ")
    return method, kind == "searched"


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
    write_text(out / f"{COMPARISON}.md", text + "\n")
    write_json(out / f"{COMPARISON}.json", [asdict(cell) for cell in cells])
