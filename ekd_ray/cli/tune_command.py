"""What the launchers do once their flags have become a configuration."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ekd_ray.cli.output import print_json, print_plan
from ekd_ray.cli.plan_text import study_plan
from ekd_ray.cli.terminal import (
    Terminal,
    difference_lines,
    front_table,
    leaderboard_table,
    winner_settings,
)
from ekd_ray.config import StudyConfig
from ekd_ray.data import load_dataset, short_name
from ekd_ray.errors import UserError
from ekd_ray.files import file_name
from ekd_ray.remote.location import Location
from ekd_ray.remote.session import holds, mirrored, put_files
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.records import STUDY_FILE, milestone_epochs
from ekd_ray.results.report import REPORT
from ekd_ray.results.study import Study
from ekd_ray.scale.cluster import ADDRESS, connected
from ekd_ray.scale.journal import drop_unknown
from ekd_ray.studies.comparison import COMPARISON, collect_cells, comparison_table, write_comparison
from ekd_ray.studies.pipeline import check_study, open_run, run_study
from ekd_ray.studies.warm_start import warm_started

RUNS = Path("runs")


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
    cells = collect_cells(out, list(checked), failures)
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
    (score,) = [r.value(metric) for r in study.records() if r.number == winner.number]
    fresh, _, count = mean_sd(winner.val)
    assert score is not None
    return f"winner's {metric}: {score:.4f} in the search, {fresh:.4f} over {count} fresh seed(s)"
