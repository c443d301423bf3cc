"""Train a teacher (or any network alone) and keep its learned prior in its checkpoint."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.request import teacher_request
from ekd_ray.config.candidates import CHOOSE_BY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_run_settings(parser)
    parser.add_argument("--model", required=True, help="architecture to train")
    parser.add_argument(
        "--evidential", action="store_true", help="evidential cross-entropy with a learned prior"
    )
    flags.add_common(parser, "--test")
    group = parser.add_argument_group("several candidates, one of which is chosen")
    group.add_argument(
        "--candidates",
        dest="candidate_count",
        type=int,
        metavar="K",
        help="train K teachers that differ by seed, and keep the best (1)",
    )
    group.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="their seeds (--seed and those after it)"
    )
    group.add_argument(
        "--choose-by",
        metavar="METRIC",
        help=f"{', '.join(CHOOSE_BY[:-1])} or {CHOOSE_BY[-1]} ({CHOOSE_BY[0]})",
    )
    flags.add_workers(parser)
    flags.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Train one network into `--out`: history, events, weights, result.json."""
    request = teacher_request(args)
    from ekd_ray.cli.single_run import train  # loads torch and ray

    return train(request)
