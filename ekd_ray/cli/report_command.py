"""Write a study's report, one HTML file that needs no network; also while the study runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_text

EXAMPLES = ("ekd-ray report runs/quickstart",)
FIRST = ("--out",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of a study")
    parser.add_argument("--out", metavar="FILE", help="where to (RUN/report/index.html)")
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    # These load torch and plotly.
    from ekd_ray.results.report import write_report
    from ekd_ray.results.study import Study

    path = write_report(Study.load(args.run), Path(args.out) if args.out else None)
    if args.json:
        print_text(json.dumps({"report": str(path)}))
    elif not args.quiet:
        print_text(f"report: {path}")
    return 0
