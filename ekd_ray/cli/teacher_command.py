"""Train a teacher, or any network alone; its checkpoint holds the learned prior."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.output import show_during
from ekd_ray.cli.request import teacher_request
from ekd_ray.config.candidates import CHOOSE_BY
from ekd_ray.studies.overlay import OF_A_STUDENT

EXAMPLES = (
    "ekd-ray train-teacher --dataset digits --model resnet20 --evidential --epochs 12",
    "ekd-ray train-teacher --model resnet56 --evidential --data-root data --candidates 3",
)
FIRST = (
    *("--dataset", "--model", "--evidential", "--set", "--list-settings", "--epochs"),
    *("--candidates", "--test", "--out", "--data-root", "--resume", "--dry-run"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_run_settings(parser, in_recipe=False, without=OF_A_STUDENT)
    parser.add_argument("--model", metavar="NAME", help="architecture to train")
    parser.add_argument(
        "--evidential", action="store_true", help="evidential cross-entropy with a learned prior"
    )
    flags.add_common(parser, "--test")
    group = parser.add_argument_group("several candidates, one of which is chosen")
    group.add_argument(
        "--candidates",
        dest="candidate_count",
        type=flags.whole_number,
        metavar="K",
        help="train K teachers that differ by seed, and keep the best (default: 1)",
    )
    group.add_argument(
        "--seeds",
        type=flags.whole_number,
        nargs="+",
        metavar="N",
        help="their seeds (default: --seed and those after it)",
    )
    group.add_argument(
        "--choose-by",
        metavar="METRIC",
        help=f"{', '.join(CHOOSE_BY[:-1])} or {CHOOSE_BY[-1]} (default: {CHOOSE_BY[0]})",
    )
    flags.add_workers(parser)
    flags.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Train one network into `--out`: history, events, weights, result.json."""
    request = teacher_request(args)
    with show_during("loading PyTorch and Ray ...", quiet=args.quiet):
        from ekd_ray.cli.single_run import train

    return train(request)
