"""Join several teachers into one file, an ensemble, which is given like any other teacher.

Methods with EKD learn from its Dirichlet, whose mean and variance are those of the members; the
others from the mean of their class probabilities.
"""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text

EXAMPLES = (
    "ekd-ray join-teachers a.safetensors b.safetensors c.safetensors --out joined.safetensors",
)
FIRST = ("--out", "--teacher", "--teacher-normalization")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="weights of a teacher; 2 or more")
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="file to write (safetensors), a new one"
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="architecture of those whose file does not say it"
    )
    parser.add_argument(
        "--teacher-normalization",
        metavar="NAME",
        help="normalisation of those whose file does not say it: imagenet, cifar10, cifar100, "
        "half, or 'mean,mean,mean/std,std,std'",
    )
    flags.add_common(parser, "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file, and say how a study is given it."""
    from ekd_ray.engine.teacher.joining import join_teachers  # loads torch

    found = join_teachers(
        args.files, args.out, model=args.teacher, normalization=args.teacher_normalization
    )
    if args.json:
        print_json(
            {"out": str(found.path), "teacher": found.model, "classes": found.num_classes}
        )  # fmt: skip
    elif not args.quiet:
        print_text(
            f"{len(found.members)} teachers of {found.num_classes} classes: give --teacher "
            f"{found.model} --teacher-weights {found.path}"
        )
    return 0
