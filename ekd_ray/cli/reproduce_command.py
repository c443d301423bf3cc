"""Train the run of a bundle again and say whether the same came out."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_plan, print_text
from ekd_ray.cli.request import resumed_command
from ekd_ray.errors import UserError, continue_with
from ekd_ray.files import write_json
from ekd_ray.studies.places import check_outlives_job, default_place, find_data_root

if TYPE_CHECKING:
    from ekd_ray.results.reproduce import Reproduction

EXAMPLES = (
    "ekd-ray reproduce runs/quickstart/best",
    "ekd-ray reproduce best --data-root data --teacher-weights FILE",
)
FIRST = (
    *("--data-root", "--dataset", "--teacher-weights", "--out", "--exact", "--resume"),
    "--dry-run",
)
REPORT = "reproduction.json"
EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Prints bit-identical, within-tolerance or different, and where the runs parted first. "
        "Exit codes: 0 the first two, 1 different (with --exact also the second), 2 a mistake in "
        "what was given, 130 interrupted."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that ekd-ray export wrote")
    flags.add_common(parser, "--data-root")
    parser.add_argument(
        "--dataset", metavar="NAME", help="the same data elsewhere: folder:PATH, hf:PATH"
    )
    flags.add_common(parser, "--download")
    parser.add_argument(
        "--teacher-weights",
        metavar="FILE",
        help="the teacher's checkpoint (default: the study's own, by its hash)",
    )
    parser.add_argument(
        "--student-weights",
        metavar="FILE",
        help="what the student starts from (default: the study's or its library's, by the hash)",
    )
    parser.add_argument("--out", metavar="RUN", help="folder of the run (default: below runs/)")
    flags.add_common(parser, "--resume")
    parser.add_argument(
        "--threads", type=flags.whole_number, metavar="N", help="CPU threads (default: as recorded)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of the test accuracy, a fraction (default: 2.8 sd of the seeds, at least 0.005)",
    )
    parser.add_argument("--exact", action="store_true", help="exit with 1 unless bit-identical")
    flags.add_common(parser, "--dry-run", "--quiet", "--json")
    flags.add_plugins(parser)


def run(args: argparse.Namespace) -> int:
    """0: bit-identical or, without `--exact`, within the tolerance; 1: neither.

    Raises:
        UserError: the bundle was changed, its data or its teacher are not there, or its run
            diverges here.
    """
    # These load torch and ray.
    from ekd_ray.cli.plan_text import run_plan
    from ekd_ray.cli.single_run import show_run
    from ekd_ray.data import load_dataset
    from ekd_ray.engine.checkpoint import forget_checkpoint
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.results.records import single_run
    from ekd_ray.results.reproduce import IDENTICAL, WITHIN, own_data_root, prepare, reproduce
    from ekd_ray.studies.pipeline import lock_folder
    from ekd_ray.studies.training import check_run_folder

    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise UserError(f"--tolerance must be >= 0 and < 1, a fraction, got {args.tolerance:g}.")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be >= 1, got {args.threads}.")
    bundle = Bundle.load(args.bundle)
    data_root = find_data_root(args.data_root) or own_data_root(bundle)
    if args.download:
        name = bundle.locate_data(args.dataset).dataset
        load_dataset(name, "train", data_root=data_root, download=True)
    config = prepare(
        bundle,
        data_root=data_root,
        teacher_weights=args.teacher_weights,
        student_weights=args.student_weights,
        dataset=args.dataset,
    )
    out = (
        check_outlives_job(Path(args.out))
        if args.out
        else default_place(f"reproduce-{config.fingerprint()}")
    ).absolute()
    if args.dry_run:
        print_plan(run_plan(config, out, data_root), config.to_dict(), as_json=args.json)
        return 0
    with lock_folder(out):
        check_run_folder(out, config, resume=args.resume)
        single_run(config, out).write_config()
        continue_with(resumed_command(args.typed, args.resume, None if args.out else out))
        with show_run("reproduction", config, quiet=args.quiet) as terminal:
            found = reproduce(
                bundle,
                config,
                out,
                data_root=data_root,
                threads=args.threads,
                tolerance=args.tolerance,
                on_epoch=functools.partial(terminal.epoch, 0),
            )
        write_json(out / REPORT, asdict(found))
        forget_checkpoint(out)
    if args.json:
        print_json({**asdict(found), "out": str(out)})
    else:
        _print(found, out, quiet=args.quiet)
    good = (IDENTICAL,) if args.exact else (IDENTICAL, WITHIN)
    return 0 if found.verdict in good else EXIT_DIFFERENT


def _print(found: Reproduction, out: Path, *, quiet: bool) -> None:
    print_text(found.verdict)
    if quiet:
        return
    if found.first:
        print_text(f"first difference: {found.first}")
        print_text(
            f"test_top1 {found.test_top1:.4f}, stated {found.stated:.4f}, "
            f"tolerance {found.tolerance:.4f}"
        )
    else:
        print_text("every figure of every epoch, every tensor and every test metric are equal")
    print_text(f"promised here: {found.promised}")
    for line in found.elsewhere:
        print_text(f"not as it was: {line}")
    print_text(f"the run: {out}")
