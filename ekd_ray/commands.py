"""What the launchers do once their flags have become a configuration."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ekd_ray.comparison import COMPARISON, compare, comparison_table, write_comparison
from ekd_ray.config import StudyConfig
from ekd_ray.data import load_dataset, short_name
from ekd_ray.errors import UserError
from ekd_ray.files import file_name
from ekd_ray.losses.objective import resolve_method
from ekd_ray.pipeline import check_study, open_run, run_study
from ekd_ray.plan_text import study_plan
from ekd_ray.remote.location import Location, is_uri
from ekd_ray.remote.session import holds, mirrored, put_files
from ekd_ray.results.bundle import Bundle, export_bundle
from ekd_ray.results.exports import check_exports
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.report import REPORT
from ekd_ray.results.study import STUDY_FILE, Study, milestone_epochs
from ekd_ray.scale.cluster import ADDRESS, connected
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


def print_json(value: Any) -> None:
    """Results for programs, on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True))


def tune(configs: dict[str, StudyConfig], args: argparse.Namespace) -> int:
    """Run one study, or one after the other, from teacher to exported winner.

    Args:
        configs: the studies by their folder below `--out`; a single one has the name "".
    """
    join(args)
    if "" in configs:
        return _tune_one(configs[""], args)
    return _tune_many(configs, args)


def join(args: argparse.Namespace) -> None:
    """The cluster of --address is the one that Ray is told of."""
    if args.address:
        os.environ[ADDRESS] = args.address


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
        print_plan(study_plan(config, out), config.to_dict(), args)
        return 0
    study, bundle = _run(config, out, args, resume=args.resume, location=args.location)
    if args.json:
        there = {} if args.location is None else {"uri": str(args.location)}
        print_json({"study": str(out), "bundle": str(bundle.path), **there, **bundle.metrics})
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
        print_plan(text, {name: config.to_dict() for name, config in checked.items()}, args)
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
        print_json({"out": str(out), "cells": [asdict(cell) for cell in cells]})
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
    report = study.path / REPORT
    if report.is_file():
        console.print(f"report: {report}", markup=False)
    console.print(f"curves: tensorboard --logdir {study.path}", markup=False)


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
        print_json({"points": points, "distill": base.to_dict(), "space": config.space})
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


def export(args: argparse.Namespace) -> int:
    """Export a study's winner; with `--verify`, say whether the weights give what is stated."""
    if is_uri(args.out):
        raise UserError(f"a bundle is exported to a folder, got --out {args.out}: give one here.")
    study = Study.load(args.run)
    formats = tuple(dict.fromkeys(args.format.split(","))) if args.format else ()
    if args.normalized_input and not formats:
        raise UserError("--normalized-input is about exported programs: add --format pt2,onnx.")
    if args.dry_run:
        check_exports(formats)
        winner = study.best()
        print(f"would export {winner.name} of {args.run} to {args.out}")
        return 0
    terminal = Terminal(quiet=args.quiet)
    try:
        terminal.stage("export", 1, 0)
        bundle = export_bundle(
            study, Path(args.out), formats=formats, normalized_input=args.normalized_input
        )
        if args.verify:
            terminal.stage("test split", 1, 0)
        data_root = args.data_root or study.config.data_root
        found = bundle.verify(evaluate=args.verify, data_root=data_root)
    finally:
        terminal.close()
    if args.json:
        print_json({"bundle": str(bundle.path), "ok": found.ok, "problems": list(found.problems)})
    elif not args.quiet:
        _print_export(bundle, verified=args.verify and found.ok)
    if not found.ok:
        raise UserError(f"{bundle.path}: {' '.join(found.problems)}")
    return 0


def _print_export(bundle: Bundle, *, verified: bool) -> None:
    stated = bundle.metrics["model"]["test_top1"]
    note = ", reproduced by the stored weights" if verified else ""
    print(f"bundle: {bundle.path} ({bundle.config.student}, test top-1 {stated:.2%}{note})")
    for name, program in bundle.metrics.get("exports", {}).items():
        gap = program["largest_difference"]
        print(f"{name}: differs from the PyTorch model by {gap:.1g} at most")


def print_plan(text: str, values: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(values)
    else:
        print(text)
