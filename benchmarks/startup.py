"""The wait before anything happens: the import, the help, beside a bare interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import ratio, spread

STARTS = {
    "python": ["-c", "pass"],
    "import": ["-c", "import ekd_ray"],
    "help": ["-m", "ekd_ray", "--help"],
    "help of tune": ["-m", "ekd_ray", "tune", "--help"],
}


def measure(rounds: int, note: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds of each start, taking turns, and the ratios of their medians to bare Python's."""
    note("startup: processes that do nothing, import, print their help")
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds + 1):
        for name, arguments in STARTS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    warm = {name: values[1:] for name, values in seconds.items()}  # files are cached by then
    ratios = {
        f"start of {name} / of python": ratio(values, warm["python"])["median"]
        for name, values in warm.items()
        if name != "python"
    }
    return {name: spread(values) for name, values in warm.items()}, ratios
