"""What the launchers do once their flags have become a configuration."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ekd_ray.comparison import COMPARISON, compare, comparison_table, write_comparison
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import load_dataset, short_name
from ekd_ray.engine.distill import CHECKPOINT, Diverged, distill, forget_checkpoint
from ekd_ray.engine.final import WEIGHTS, evaluate_test, save_student
from ekd_ray.engine.plan import resolve
from ekd_ray.engine.precision import environment
from ekd_ray.errors import UserError
from ekd_ray.files import file_name, write_json, write_text
from ekd_ray.losses.objective import resolve_method
from ekd_ray.pipeline import check_study, check_writable, open_run, run_study
from ekd_ray.plan_text import run_plan, study_plan
from ekd_ray.remote.location import Location, is_uri
from ekd_ray.remote.mirror import STATE as MIRROR_STATE
from ekd_ray.remote.session import holds, mirrored, put_files
from ekd_ray.results.bundle import Bundle, export_bundle
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.study import RESULT, STUDY_FILE, Study, milestone_epochs
from ekd_ray.scale.cluster import connected, local_cpus
from ekd_ray.scale.journal import drop_unknown
from ekd_ray.scale.space import check_space, first_points
from ekd_ray.terminal import (
    Terminal,
    difference_lines,
    front_table,
    leaderboard_table,
    winner_settings,
)
from ekd_ray.warm_start import warm_started

RUNS = Path("runs")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def tune(configs: dict[str, StudyConfig], args: argparse.Namespace) -> int:
    """Run one study, or one after the other, from teacher to exported winner.

    Args:
        configs: the studies by their folder below `--out`; a single one has the name "".
    """
    if "" in configs:
        return _tune_one(configs[""], args)
    return _tune_many(configs, args)


def _checked(name: str, config: StudyConfig, args: argparse.Namespace) -> StudyConfig:
    """A study warm-started and checked, its recipe's mistakes told with their lines."""
    with args.origins[name].lines():
        if args.warm_start:
            config = warm_started(config, args.warm_start)
        return check_study(config, download=args.download)


def _tune_one(config: StudyConfig, args: argparse.Namespace) -> int:
    shared = config.distill
    data = short_name(shared.dataset)
    default = RUNS / f"{data}-{file_name(shared.teacher or 'none')}-{file_name(shared.student)}"
    out = Path(args.out or default).absolute()
    config = _checked("", config, args)
    if args.dry_run:
        _plan(study_plan(config, out), config.to_dict(), args)
        return 0
    study, bundle = _run(config, out, args, resume=args.resume, location=args.location)
    if args.json:
        there = {} if args.location is None else {"uri": str(args.location)}
        _print_json({"study": str(out), "bundle": str(bundle.path), **there, **bundle.metrics})
    else:
        _print_study(study, bundle)
    return 0


def _tune_many(configs: dict[str, StudyConfig], args: argparse.Namespace) -> int:
    """A study for every pair and method, then one table; a study that fails stays one cell."""
    out = Path(args.out or RUNS / "comparison").absolute()
    # All are checked before the first one costs anything.
    checked = {name: _checked(name, config, args) for name, config in configs.items()}
    places = {name: args.location and args.location.child(name) for name in configs}
    there = [name for name in configs if _is_there(out / name, places[name])]
    if there and not args.resume:
        raise UserError(f"{out / there[0]} holds a study already: add --resume, or another --out.")
    if args.dry_run:
        plans = {name: study_plan(config, out / name) for name, config in checked.items()}
        text = "\n\n".join(f"study      {name}\n{plan}" for name, plan in plans.items())
        _plan(text, {name: config.to_dict() for name, config in checked.items()}, args)
        return 0
    failures = {}
    with connected(*checked.values()):
        for name, config in checked.items():
            if not args.quiet:
                Console(highlight=False).rule(name)
            try:
                _run(config, out / name, args, resume=name in there, location=places[name])
            except UserError as error:
                failures[name] = str(error)
                print(f"error: {name}: {error}", file=sys.stderr)
    cells = compare(out, list(checked), failures)
    write_comparison(out, cells)
    if args.location:
        put_files(args.location, out, [f"{COMPARISON}.md", f"{COMPARISON}.json"])
    if args.json:
        _print_json({"out": str(out), "cells": [asdict(cell) for cell in cells]})
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(comparison_table(cells))
        console.print(f"table: {out / COMPARISON}.md", markup=False)
    return 1 if failures else 0


def _is_there(folder: Path, location: Location | None) -> bool:
    return (folder / STUDY_FILE).exists() if location is None else holds(location, STUDY_FILE)


def _run(
    config: StudyConfig,
    out: Path,
    args: argparse.Namespace,
    *,
    resume: bool,
    location: Location | None,
) -> tuple[Study, Bundle]:
    """Run (or continue) a checked study with its progress on the terminal."""
    if location and config.optuna_storage:
        raise UserError(
            "optuna_storage does not go together with a URI as --out, which a lost machine would "
            "leave behind the database: remove it, the journal is kept at the URI."
        )
    with mirrored(location, out, resume=resume, settle=drop_unknown):
        return _run_here(config, out, args, resume=resume)


def _run_here(
    config: StudyConfig, out: Path, args: argparse.Namespace, *, resume: bool
) -> tuple[Study, Bundle]:
    shared = config.distill
    if args.download:
        load_dataset(shared.dataset, "train", data_root=config.data_root, download=True)
    study = open_run(out, config, resume=resume)
    terminal = Terminal(
        metric=config.metric,
        mode=config.mode,
        shown=tuple(config.space or {}),
        rungs=milestone_epochs(config),
        quiet=args.quiet,
    )
    if not args.quiet:
        terminal.console.print(study_plan(config, out), markup=False)
    try:
        return study, run_study(study, terminal)
    finally:
        terminal.close()


def _print_study(study: Study, bundle: Bundle) -> None:
    board, config = study.leaderboard(), study.config
    # Figures whole: a line that the terminal breaks is better than one cut short.
    width = max(Console().width, 80 + 18 * (len(config.watched) - 1))
    console = Console(highlight=False, soft_wrap=True, width=width)
    if config.objectives:
        console.print(front_table(study.pareto(), config))
    console.print(leaderboard_table(board, config))
    console.print(winner_settings(board, config), markup=False)
    for row in board:
        if row.failed:
            console.print(f"{row.name} failed: {row.failed}", markup=False)
    for line in difference_lines(study.differences()):
        console.print(line, markup=False)
    gap = _selection_gap(study, board[0])
    if gap:
        console.print(gap, markup=False)
    console.print("The winner was chosen on validation; the test split was read once, after.")
    console.print(f"bundle: {bundle.path}", markup=False)
    console.print(f"look:   tensorboard --logdir {study.path}", markup=False)


def _selection_gap(study: Study, winner: Row) -> str:
    """The winner's curse in one line: its search score against its score under fresh seeds."""
    metric = study.config.metric
    if not winner.val:
        return ""
    number = int(winner.name.split()[-1])
    (score,) = [r.value(metric) for r in study.records() if r.number == number]
    fresh, _, count = mean_sd(winner.val)
    assert score is not None
    return f"winner's {metric}: {score:.4f} in the search, {fresh:.4f} over {count} fresh seed(s)"


def show_space(config: StudyConfig, args: argparse.Namespace) -> int:
    """A search space in words, points drawn from it at random, and what all trials share.

    Nothing is looked up but names and bounds: data and teacher need not be there.
    """
    if args.points < 1:
        raise UserError(f"--points must be >= 1, got {args.points}.")
    with args.origins[""].lines():
        space = check_space(config)
    base = resolve_method(config.distill)
    points = space.sample(args.points, seed=args.seed)
    if args.json:
        _print_json({"points": points, "distill": base.to_dict(), "space": config.space})
        return 0
    # Names and figures whole: a line that the terminal breaks is better than one cut short.
    width = max(Console().width, 10 + sum(max(9, len(name)) + 3 for name in space.parameters))
    console = Console(highlight=False, width=width)
    for name, parameter in space.parameters.items():
        console.print(f"{name:16s} {parameter.describe()}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("point", *space.parameters):
        table.add_column(column, justify="right", no_wrap=True)
    named = [("first", point) for point in first_points(config)]
    for name, point in [*named, *((str(i), point) for i, point in enumerate(points, start=1))]:
        cells = (point.get(column, "") for column in space.parameters)
        table.add_row(name, *(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)
    console.print("shared by all trials:")
    for name, value in base.to_dict().items():
        if value is not None and name not in space.parameters:
            console.print(f"  {name}: {value}", markup=False)
    return 0


def train(config: DistillConfig, args: argparse.Namespace) -> int:
    """Train one configuration into `--out`: history, events, weights, result.json."""
    config = resolve(config, data_root=args.data_root, download=args.download)
    data = short_name(config.dataset)
    default = RUNS / f"{data}-{file_name(config.student)}-{config.method}-seed{config.seed}"
    out = Path(args.out or default).absolute()
    if args.dry_run:
        _plan(run_plan(config, out, args.data_root), config.to_dict(), args)
        return 0
    with mirrored(args.location, out, resume=args.resume):
        return _train_here(config, out, args)


def _train_here(config: DistillConfig, out: Path, args: argparse.Namespace) -> int:
    _check_run_folder(out, config, resume=args.resume)
    if (out / RESULT).exists():  # finished before: nothing is left to do
        _print_run(out, args)
        return 0
    if args.download:
        load_dataset(config.dataset, "train", data_root=args.data_root, download=True)
    terminal = Terminal(quiet=args.quiet)
    if not args.quiet:
        terminal.console.print(run_plan(config, out, args.data_root), markup=False)
    terminal.stage("training", 1, config.epochs)
    terminal.started(config.student, 0, config.to_dict())
    write_text(out / "config.yaml", config.to_yaml())
    try:
        result = distill(
            config,
            data_root=args.data_root,
            out=out,
            on_epoch=lambda row: terminal.epoch(0, row),
            threads=args.cpus_per_trial or local_cpus(),
        )
    except Diverged as error:
        raise UserError(str(error)) from None
    finally:
        terminal.close()
    save_student(result, out / WEIGHTS)
    metrics = dict(result.metrics)
    if args.test:
        metrics |= evaluate_test(result, data_root=args.data_root)
    record = {
        "metrics": metrics,
        "log_prior": result.log_prior,
        "precision": result.precision,
        "data_fingerprint": result.data_fingerprint,
        "fingerprint": config.fingerprint(),
        "seconds": result.seconds,
        "environment": environment(),
    }
    write_json(out / RESULT, record)
    forget_checkpoint(out)
    _print_run(out, args)
    return 0


def _print_run(out: Path, args: argparse.Namespace) -> None:
    record = json.loads((out / RESULT).read_text(encoding="utf-8"))
    if args.json:
        _print_json({**record, "weights": str(out / WEIGHTS)})
        return
    figures = {k: v for k, v in record["metrics"].items() if k.startswith(("val_", "test_"))}
    print("  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(f"weights: {out / WEIGHTS}")


def _check_run_folder(out: Path, config: DistillConfig, *, resume: bool) -> None:
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


def export(args: argparse.Namespace) -> int:
    """Export a study's winner; with `--verify`, say whether the weights give what is stated."""
    if is_uri(args.out):
        raise UserError(f"a bundle is exported to a folder, got --out {args.out}: give one here.")
    study = Study.load(args.run)
    if args.dry_run:
        winner = study.best()
        print(f"would export {winner.name} of {args.run} to {args.out}")
        return 0
    bundle = export_bundle(study, Path(args.out))
    data_root = args.data_root or study.config.data_root
    found = bundle.verify(evaluate=args.verify, data_root=data_root)
    if args.json:
        _print_json({"bundle": str(bundle.path), "ok": found.ok, "problems": list(found.problems)})
    elif not args.quiet:
        _print_export(bundle, verified=args.verify and found.ok)
    if not found.ok:
        raise UserError(f"{bundle.path}: {' '.join(found.problems)}")
    return 0


def _print_export(bundle: Bundle, *, verified: bool) -> None:
    stated = bundle.metrics["model"]["test_top1"]
    note = ", reproduced by the stored weights" if verified else ""
    print(f"bundle: {bundle.path} ({bundle.config.student}, test top-1 {stated:.2%}{note})")


def _plan(text: str, values: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        _print_json(values)
    else:
        print(text)
