"""Choose a few configurations that together are good for all finished studies at hand.

They are written as a recipe, whose first points a study of a new pair tries first.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.errors import UserError, shorten

EXAMPLES = (
    "ekd-ray portfolio runs/* --out portfolio.yaml",
    "ekd-ray portfolio runs/a runs/b --size 5 --out five.yaml",
)
FIRST = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders or URIs of studies")
    parser.add_argument(
        "--out", default="portfolio.yaml", metavar="FILE", help="recipe to write (portfolio.yaml)"
    )
    parser.add_argument(
        "--size",
        type=flags.whole_number,
        default=10,
        metavar="N",
        help="so many configurations (10)",
    )
    flags.add_common(parser, "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Write the recipe and print its points; returns the exit code."""
    target = Path(args.out)
    if target.exists():
        raise UserError(f"{shorten(args.out)} is there already: name another file by --out.")
    # These load torch and rich.
    from ekd_ray.cli.console import Console, print_points
    from ekd_ray.files import check_file_place, write_text
    from ekd_ray.studies.comparison import find_studies
    from ekd_ray.studies.portfolio import choose_portfolio

    check_file_place(target)
    found = choose_portfolio(find_studies(args.runs), size=args.size)
    write_text(target, found.to_yaml())
    if args.json:
        expected = [[None if x != x else x for x in row] for row in found.expected.tolist()]
        print_json({
            "file": str(target), "points": [*found.points], "expected": expected,
            "studies": [*found.studies],
        })  # fmt: skip
        return 0
    console = Console()
    for index, line in enumerate(found.studies, start=1):
        console.print(f"study {index}: {line}")
    columns = (*found.space, *(f"study {index}" for index, _ in enumerate(found.studies, start=1)))
    rows = [
        (
            *(point.get(name, "") for name in found.space),
            *("" if x != x else f"{x:+.2f}" for x in e),
        )
        for point, e in zip(found.points, found.expected.tolist(), strict=True)
    ]
    print_points(console, columns, rows)
    print_text("Expected of each, in standard deviations over the space of a study (0: its mean).")
    if len(found.points) < args.size:
        print_text(f"{len(found.points)} of {args.size}: others would be too near to these.")
    print_text(f"recipe: {target} (ekd-ray tune --space {shlex.quote(str(target))} --teacher T "
               "--student S --dataset D)")  # fmt: skip
    return 0
