"""Run a whole study on handwritten digits: teacher, search, confirmation, exported winner.

No download, no GPU, minutes on a laptop. Interrupted, the same command continues it; finished, it
shows it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ekd_ray.cli import flags, tune_command
from ekd_ray.cli.help_text import HelpParser
from ekd_ray.cli.output import print_text

EXAMPLES = ("ekd-ray quickstart", "ekd-ray quickstart --out /tmp/quickstart")
FIRST = ()
STUDY = ("--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "560")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="runs/quickstart", metavar="RUN",
        help="folder of the study (default: runs/quickstart)",
    )  # fmt: skip
    flags.add_common(parser, "--resume", "--address", "--keep-ray-logs")
    flags.add_common(parser, "--dry-run", "--quiet", "--json")


def run(args: argparse.Namespace) -> int:
    """Run or continue the study, then say what can be done with it."""
    parser = HelpParser()
    tune_command.add_arguments(parser)
    study = parser.read([*STUDY, "--out", args.out])
    for name in ("address", "keep_ray_logs", "dry_run", "quiet", "json"):
        setattr(study, name, getattr(args, name))
    study.resume = args.resume or (Path(args.out) / "study.yaml").exists()
    code = tune_command.run(study)
    if code == 0 and not (args.dry_run or args.quiet or args.json):
        print_text(
            f"next: ekd-ray show {args.out}\n"
            f"      ekd-ray reproduce {args.out}/best      # bit-identical on this machine"
        )
    return code
