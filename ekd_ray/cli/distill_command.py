"""Train one configuration, without a search: one student from one teacher."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.output import show_during
from ekd_ray.cli.request import run_request

EXAMPLES = (
    "ekd-ray distill --pair resnet56-resnet20 --teacher-weights FILE --data-root data",
    "ekd-ray distill --config best/distill.yaml --teacher-weights FILE --seed 1 --out runs/again",
)
FIRST = (
    *("--dataset", "--pair", "--teacher-weights", "--method", "--set", "--list-settings"),
    *("--epochs", "--config", "--test", "--out", "--data-root", "--resume", "--dry-run"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(home=None)
    flags.add_pair(flags.add_run_settings(parser))
    parser.add_argument("--config", metavar="FILE", help="a distill.yaml to start from")
    flags.add_common(parser, "--test")
    flags.add_workers(parser)
    flags.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Train one configuration into `--out`: history, events, weights, result.json."""
    request = run_request(args)
    with show_during("loading PyTorch and Ray ...", quiet=args.quiet):
        from ekd_ray.cli.single_run import train

    return train(request)
