"""Whether what one pair has found helps another: leave one pair out.

    python -m benchmarks.transfer PAIR=A.parquet PAIR=B.parquet ... --json out.json

The tables (`benchmarks.curves`) hold the same configurations, trained for each pair. For each
pair in turn the best three of every other one are looked up, as `--warm-start` would add them,
and compared with as many random ones and with the authors' values (number 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.landscape import METRIC
from ekd_ray.files import write_json
from ekd_ray.studies.warm_start import POINTS


def finals(table: Path) -> dict[int, float]:
    """The metric after the last epoch, by the configuration's number."""
    rows = pq.read_table(table, columns=["number", "epoch", METRIC]).to_pylist()
    return {row["number"]: row[METRIC] for row in sorted(rows, key=lambda row: row["epoch"])}


def left_out(pair: str, tables: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Gain of warm starts from the other pairs on this one.

    `best_of_random` is the expectation over all draws of as many configurations; `rank` the
    share of all configurations that the best warm start leaves behind.
    """
    own = tables[pair]
    chosen: set[int] = set()
    for name, other in tables.items():
        if name != pair:
            common = own.keys() & other.keys()
            chosen |= set(sorted(common, key=lambda number: -other[number])[:POINTS])
    ordered = np.sort(list(own.values()))
    # The maximum of k draws without replacement is the i-th smallest with this probability.
    n, k = len(ordered), len(chosen)
    below = np.array([_share(i, n, k) for i in range(1, n + 1)])
    chances = np.diff(below, prepend=0.0)
    warm = max(own[number] for number in chosen)
    return {
        "warm_starts": k,
        "best_warm_start": warm,
        "mean_warm_start": float(np.mean([own[number] for number in chosen])),
        "best_of_random": float(chances @ ordered),
        "mean_of_random": float(ordered.mean()),
        "authors": own[0],
        "best": float(ordered[-1]),
        "rank": float((ordered < warm).mean()),
        "configurations": n,
    }


def _share(i: int, n: int, k: int) -> float:
    """Probability that k of n draws without replacement are all among the i smallest."""
    return float(np.prod([max(0, i - j) / (n - j) for j in range(k)]))


def main() -> None:
    """Leave each pair out once."""
    parser = argparse.ArgumentParser(description="Leave-one-pair-out check of warm starts.")
    parser.add_argument("tables", nargs="+", metavar="PAIR=PARQUET")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = {name: finals(Path(path)) for name, _, path in (t.partition("=") for t in args.tables)}
    # Only what all pairs have trained.
    common = set.intersection(*(set(values) for values in found.values()))
    tables = {name: {n: values[n] for n in sorted(common)} for name, values in found.items()}
    result = {pair: left_out(pair, tables) for pair in tables}
    for pair, figures in result.items():
        print(pair, " ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
