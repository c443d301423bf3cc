"""Train a teacher (or any network alone) and keep its learned prior in its checkpoint."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.request import teacher_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_run_settings(parser)
    parser.add_argument("--model", required=True, help="architecture to train")
    parser.add_argument(
        "--evidential", action="store_true", help="evidential cross-entropy with a learned prior"
    )
    flags.add_common(parser, "--test")
    flags.add_workers(parser)
    flags.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Train one network into `--out`: history, events, weights, result.json."""
    request = teacher_request(args)
    from ekd_ray.cli.single_run import train  # loads torch and ray

    return train(request)
