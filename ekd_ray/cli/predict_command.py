"""Predict pictures with an exported student: a table of classes, probabilities, uncertainty."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.errors import UserError, continue_with

EXAMPLES = (
    "ekd-ray predict best PICTURES",
    "ekd-ray predict best a.jpg b.jpg --out predictions.parquet --coverage 0.9",
)
FIRST = ("--out", "--coverage", "--set-coverage", "--calibrated")
DEFAULT_TABLE = "predictions.csv"
NAMED = 10  # damaged pictures that are named on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that ekd-ray export wrote")
    parser.add_argument(
        "pictures", metavar="FOLDER|FILE", nargs="+", help="pictures, or folders of them"
    )
    parser.add_argument(
        "--out", metavar="FILE",
        help="table to write: FILE.parquet or FILE.csv, which is replaced where it exists "
        f"(default: {DEFAULT_TABLE}, which is not)",
    )  # fmt: skip
    parser.add_argument(
        "--coverage", type=float, metavar="SHARE",
        help="keep this share of pictures like the test split's, 0 to 1; the others abstain",
    )  # fmt: skip
    flags.add_common(parser, "--calibrated")
    parser.add_argument(
        "--set-coverage", type=float, metavar="SHARE",
        help="also a set of classes for each picture, which holds the true one for this share of "
        "pictures like the test split's, 0.5 to 0.995; no picture abstains by it",
    )  # fmt: skip
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Write the table, and say what is in it and which pictures could not be read."""
    # These load torch.
    from rich.progress import Progress

    from ekd_ray.cli.console import Console
    from ekd_ray.config.phrases import several
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.results.prediction_table import check_table, list_pictures

    continue_with(shlex.join(args.typed), keeps=False)
    bundle = Bundle.load(args.bundle)
    pictures = list_pictures(args.pictures)
    if args.out is None and Path(DEFAULT_TABLE).exists():
        raise UserError(f"{DEFAULT_TABLE} is there already: say with --out FILE where to write.")
    out = check_table(args.out or DEFAULT_TABLE)
    console = Console(stderr=True)
    silent = args.quiet or args.json or not console.is_terminal
    with Progress(console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("predict", total=len(pictures))
        found = bundle.predict_files(
            pictures, out, coverage=args.coverage, calibrated=args.calibrated,
            set_coverage=args.set_coverage,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    for problem in found.damaged[:NAMED]:
        print_text(f"left out: {problem}", file=sys.stderr)
    if len(found.damaged) > NAMED:
        print_text(f"left out: {len(found.damaged) - NAMED} more (--json lists all)",
                   file=sys.stderr)  # fmt: skip
    if args.json:
        print_json(
            {"out": str(found.path), "rows": found.rows, "damaged": list(found.damaged),
             **({} if args.coverage is None else {"abstained": found.abstained})}
        )  # fmt: skip
    elif not args.quiet:
        parts = [several(found.rows, "picture")]
        if args.coverage is not None:
            parts.append(f"{found.abstained} abstain")
        if found.damaged:
            parts.append(f"{len(found.damaged)} cannot be read")
        print_text(f"predictions: {found.path} ({', '.join(parts)})")
    return 0
