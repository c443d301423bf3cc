"""One run without a search, once its flags have become a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from ekd_ray.cli.output import print_json, print_plan
from ekd_ray.cli.plan_text import run_plan
from ekd_ray.cli.terminal import Terminal
from ekd_ray.cli.tune_command import RUNS, join
from ekd_ray.config import DistillConfig
from ekd_ray.data import load_dataset, short_name
from ekd_ray.engine.checkpoint import CHECKPOINT, forget_checkpoint
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.engine.resolve import check_workers, resolve
from ekd_ray.errors import UserError
from ekd_ray.files import file_name
from ekd_ray.remote.mirror import STATE as MIRROR_STATE
from ekd_ray.remote.session import mirrored
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import RESULT, read_record, single_run
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.one_run import parse_workers, run_on_workers
from ekd_ray.scale.trainer import Workers
from ekd_ray.studies.pipeline import check_writable


def train(config: DistillConfig, args: argparse.Namespace) -> int:
    """Train one configuration into `--out`: history, events, weights, result.json."""
    join(args)
    workers = parse_workers(args.workers, cpus=args.cpus_per_trial, gpus=args.gpus_per_trial)
    config = resolve(config, data_root=args.data_root, download=args.download)
    check_workers(config, workers.most)
    data = short_name(config.dataset)
    default = RUNS / f"{data}-{file_name(config.student)}-{config.method}-seed{config.seed}"
    out = Path(args.out or default).absolute()
    if args.dry_run:
        print_plan(run_plan(config, out, args.data_root, workers), config.to_dict(), args)
        return 0
    with mirrored(args.location, out, resume=args.resume):
        return _train_here(config, out, args, workers)


def _train_here(
    config: DistillConfig, out: Path, args: argparse.Namespace, workers: Workers
) -> int:
    check_run_folder(out, config, resume=args.resume)
    if (out / RESULT).exists():  # finished before: nothing is left to do
        _print_run(out, args)
        return 0
    if args.download:
        load_dataset(config.dataset, "train", data_root=args.data_root, download=True)
    terminal = Terminal(quiet=args.quiet)
    if not args.quiet:
        terminal.console.print(run_plan(config, out, args.data_root, workers), markup=False)
    terminal.stage("training", 1, config.epochs)
    terminal.started(config.student, 0, config.to_dict())
    run = single_run(config, out)
    run.write_config()
    try:
        if workers.most > 1:
            run_on_workers(
                run,
                workers,
                data_root=args.data_root,
                test=args.test,
                on_epoch=lambda row: terminal.epoch(0, row),
            )
            terminal.ended(0, failed=False)
        else:
            _alone(config, out, args, terminal)
    except Diverged as error:
        raise UserError(str(error)) from None
    finally:
        terminal.close()
    _print_run(out, args)
    return 0


def _alone(config: DistillConfig, out: Path, args: argparse.Namespace, terminal: Terminal) -> None:
    """The run in this process."""
    with cpu_threads(args.cpus_per_trial or local_cpus()):
        result = distill(
            config,
            data_root=args.data_root,
            out=out,
            on_epoch=lambda row: terminal.epoch(0, row),
        )
        terminal.ended(0, failed=False)
        if args.test:
            terminal.stage("test split", 1, 0)
        finish_run(single_run(config, out), result, data_root=args.data_root, test=args.test)
    forget_checkpoint(out)


def _print_run(out: Path, args: argparse.Namespace) -> None:
    record = read_record(out)
    assert record is not None
    if args.json:
        inputs = ("folder", "config", "params", "history")  # and of other files
        found = {name: v for name, v in record.to_dict().items() if name not in inputs}
        print_json({**found, "weights": str(out / WEIGHTS)})
        return
    figures = {k: v for k, v in record.metrics.items() if k.startswith(("val_", "test_"))}
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(f"weights: {out / WEIGHTS}")


def check_run_folder(out: Path, config: DistillConfig, *, resume: bool) -> None:
    """Refuse to mix runs: another configuration's folder, or this one's without --resume."""
    check_writable(out)
    if (out / "config.yaml").exists():
        there = DistillConfig.from_yaml(out / "config.yaml")
        if there.fingerprint() != config.fingerprint():
            raise UserError(f"{out} belongs to another configuration: choose another --out.")
        if not resume:
            raise UserError(f"{out} holds this run already: add --resume, or choose another --out.")
    elif any(path.name != MIRROR_STATE for path in out.iterdir()):
        raise UserError(f"{out} holds something else: choose another --out.")
    elif resume and not (out / CHECKPOINT).exists():
        raise UserError(f"{out} holds no run to resume: check --out, or drop --resume.")
