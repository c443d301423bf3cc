"""Show a study in the terminal: status, leaderboard, best configuration, importance, failures."""

from __future__ import annotations

import argparse
import sys

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text

EXAMPLES = (
    "ekd-ray show runs/quickstart",
    "ekd-ray show runs/second --compare runs/first",
)
FIRST = ("--compare", "--json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a study, running or finished")
    parser.add_argument("--compare", metavar="RUN", help="another study beside it")
    flags.add_common(parser, "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Print a study, running or finished, and what differs from another one."""
    # These take a while to import.
    from ekd_ray.cli.study_text import print_progress, progress_values
    from ekd_ray.results.study_reader import StudyReader

    study = StudyReader.load(args.run)
    other = None
    if args.compare:
        from ekd_ray.results.words import describe_damage
        from ekd_ray.studies.comparison import compare_studies  # loads SciPy

        second = StudyReader.load(args.compare)
        other = compare_studies(study, second)
        for line in describe_damage(second.damaged()):
            print_text(line, file=sys.stderr)
    if args.json:
        print_json(progress_values(study, other))
    else:
        print_progress(study, other, args.compare)
    return 0
