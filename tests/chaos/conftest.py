"""A Ray of its own for what is killed, and the table of all kills at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_run import nothing_left
from kill_tally import COLUMNS, TALLY


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A folder of Ray's own, so that the study's processes are known by it, and its cache."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds Ray's processes through /proc")
    folder = Path(tempfile.mkdtemp(prefix="ekd"))  # sockets want a short path
    made = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "EKD_CACHE_DIR": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    with nothing_left(made):
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say who was killed how often, and what it cost; as JSON too, in $EKD_CHAOS_JSON."""
    if not TALLY.rows:
        return
    rows = TALLY.totals()
    width = max(map(len, rows))
    terminalreporter.write_line("\n" + " " * width + "".join(f"{name:>10}" for name in COLUMNS))
    for kind, counts in rows.items():
        line = "".join(f"{counts[name]:10d}" for name in COLUMNS)
        terminalreporter.write_line(f"{kind:{width}}{line}")
    terminalreporter.write_line(json.dumps(rows))
    if path := os.environ.get("EKD_CHAOS_JSON"):
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")
