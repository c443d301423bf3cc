"""Write a study's report, one HTML file that needs no network; also while the study runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_text
from ekd_ray.files import check_file_place

EXAMPLES = ("ekd-ray report runs/quickstart",)
FIRST = ("--out", "--no-pictures")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a study")
    parser.add_argument("--out", metavar="FILE", help="where to (default: RUN/report/index.html)")
    parser.add_argument(
        "--no-pictures", action="store_true", help="without the test images of the errors"
    )
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    # These load torch and plotly.
    from ekd_ray.results.report import write_report
    from ekd_ray.results.study import Study
    from ekd_ray.results.words import describe_damage

    study = Study.load(args.run)
    out = Path(args.out) if args.out else None
    if out:
        check_file_place(out)
    path = write_report(study, out, pictures=not args.no_pictures)
    for line in describe_damage(study.damaged()):
        print_text(line, file=sys.stderr)
    if args.json:
        print_text(json.dumps({"report": str(path)}))
    elif not args.quiet:
        print_text(f"report: {path}")
    return 0
