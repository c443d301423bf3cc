"""What `launchers/reproduce.py` does: train a bundle's run again and say how it came out."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from ekd_ray.cli.distill_command import check_run_folder
from ekd_ray.cli.output import print_json
from ekd_ray.cli.plan_text import run_plan
from ekd_ray.cli.terminal import Terminal
from ekd_ray.cli.tune_command import RUNS
from ekd_ray.config import DistillConfig
from ekd_ray.data import load_dataset
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.distill import Diverged
from ekd_ray.errors import UserError
from ekd_ray.files import write_json
from ekd_ray.results import Bundle
from ekd_ray.results.records import single_run
from ekd_ray.results.reproduce import IDENTICAL, WITHIN, Reproduction, prepare, reproduce

REPORT = "reproduction.json"
EXIT_DIFFERENT = 1


def run(args: argparse.Namespace) -> int:
    """0: bit-identical or, without `--exact`, within the tolerance; 1: neither.

    Raises:
        UserError: the bundle was changed, its data or its teacher are not there, or its run
            diverges here.
    """
    if args.tolerance is not None and not 0 <= args.tolerance < 1:
        raise UserError(f"--tolerance must be >= 0 and < 1, a fraction, got {args.tolerance:g}.")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be >= 1, got {args.threads}.")
    bundle = Bundle.load(args.bundle)
    data_root = args.data_root or os.environ.get("EKD_DATA_ROOT")
    if args.download:
        name = args.dataset or bundle.config.dataset
        load_dataset(name, "train", data_root=data_root, download=True)
    config = prepare(
        bundle,
        data_root=data_root,
        teacher_weights=args.teacher_weights,
        dataset=args.dataset,
    )
    out = Path(args.out or RUNS / f"reproduce-{config.fingerprint()}").absolute()
    if args.dry_run:
        plan = run_plan(config, out, data_root)
        print_json(config.to_dict()) if args.json else print(plan)
        return 0
    found = _trained(bundle, config, out, data_root, args)
    write_json(out / REPORT, asdict(found))
    forget_checkpoint(out)
    if args.json:
        print_json({**asdict(found), "out": str(out)})
    else:
        _print(found, quiet=args.quiet)
    good = (IDENTICAL,) if args.exact else (IDENTICAL, WITHIN)
    return 0 if found.verdict in good else EXIT_DIFFERENT


def _trained(
    bundle: Bundle,
    config: DistillConfig,
    out: Path,
    data_root: str | None,
    args: argparse.Namespace,
) -> Reproduction:
    check_run_folder(out, config, resume=args.resume)
    single_run(config, out).write_config()
    terminal = Terminal(quiet=args.quiet)
    terminal.stage("reproduction", 1, config.epochs)
    terminal.started(config.student, 0, config.to_dict())
    try:
        return reproduce(
            bundle,
            config,
            out,
            data_root=data_root,
            threads=args.threads,
            tolerance=args.tolerance,
            on_epoch=lambda row: terminal.epoch(0, row),
        )
    except Diverged as error:
        raise UserError(str(error)) from None
    finally:
        terminal.close()


def _print(found: Reproduction, *, quiet: bool) -> None:
    print(found.verdict)
    if quiet:
        return
    if found.first:
        print(f"first difference: {found.first}")
        print(
            f"test_top1 {found.test_top1:.4f}, stated {found.stated:.4f}, "
            f"tolerance {found.tolerance:.4f}"
        )
    else:
        print("every figure of every epoch, every tensor and every test metric are equal")
    for line in found.elsewhere:
        print(f"not as it was: {line}")
