"""Put finished studies into one table, as papers do: a column a pair, a row a method."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.errors import UserError
from ekd_ray.files import check_folder_place

EXAMPLES = (
    "ekd-ray compare runs/ekd runs/dkd runs/kd",
    "ekd-ray compare runs/* --out tables",
)
FIRST = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders or URIs of studies, or a folder of several",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="also write comparison.md and comparison.json there"
    )
    flags.add_common(parser, "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Print the test accuracies of the studies' winners, champions and baselines."""
    # These load torch and rich.
    from ekd_ray.cli.console import Console
    from ekd_ray.results.words import describe_damage
    from ekd_ray.studies.comparison import (
        collect_cells,
        comparison_table,
        find_studies,
        place_studies,
        write_comparison,
    )

    studies = find_studies(args.runs)
    for path, study in list(studies.items()):
        if not any(row.test or row.failed for row in study.leaderboard()):
            print_text(f"left out: {path} has no final run yet", file=sys.stderr)
            del studies[path]
        for line in describe_damage(study.damaged()):
            print_text(line, file=sys.stderr)
    if not studies:
        raise UserError("there is nothing to compare: give studies that have come to their end.")
    cells = collect_cells(place_studies(studies))
    if args.out:
        check_folder_place(Path(args.out))
        write_comparison(Path(args.out), cells)
    if args.json:
        print_json([asdict(cell) for cell in cells])
    else:
        Console().print(comparison_table(cells))
    return 0
