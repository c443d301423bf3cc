"""Search the best way to distil a teacher into a student; confirm and export it.

What is heavy (torch, ray, pyarrow, rich) is imported inside the functions, so that `--help` and a
mistake in the flags do not wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_ray.cli import flags
from ekd_ray.cli.output import (
    print_json,
    print_plan,
    print_text,
    set_up_ray,
    show_during,
    show_scanned,
)
from ekd_ray.cli.request import Request, study_request
from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError, continue_with
from ekd_ray.studies.places import default_folder, default_place
from ekd_ray.studies.recipes import Recipe

if TYPE_CHECKING:
    from ekd_ray.remote.location import Location
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.results.study_reader import StudyReader


EXAMPLES = (
    "ekd-ray tune --dataset digits --pair resnet20-resnet8 --train-subset 560",
    "ekd-ray tune --dataset folder:PICTURES --dry-run",
    "ekd-ray tune --pair resnet56-resnet20 --teacher-weights FILE --data-root data",
    "ekd-ray tune --resume --out runs/first",
)
FIRST = (
    *("--dataset", "--pair", "--teacher", "--student", "--teacher-weights", "--method", "--set"),
    *("--list-settings", "--epochs", "--trials", "--seeds", "--out", "--data-root", "--resume"),
    "--dry-run",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(home=None)  # the folder of search_spaces/ that pairs are looked up in
    flags.add_pair(flags.add_run_settings(parser, study=True))
    group = parser.add_argument_group("search")
    group.add_argument(
        "--pairs", metavar="LIST", help="'all', or pairs with commas between: a study for each"
    )
    group.add_argument(
        "--methods", metavar="LIST", help="methods with commas between: a study for each"
    )
    flags.add_setting(group, "trials", in_recipe=True)
    group.add_argument(
        "--extend",
        type=flags.whole_number,
        metavar="N",
        help="with --resume: N more configurations for the study in --out",
    )
    group.add_argument(
        "--repair",
        action="store_true",
        help="with --resume: first rebuild a damaged study.yaml from the trials",
    )
    group.add_argument(
        "--accept-versions",
        action="store_true",
        help="with --resume: go on under releases whose results need not compare with those there",
    )
    group.add_argument(
        "--warm-start",
        nargs="+",
        default=[],
        metavar="RUN",
        help="finished studies, also of other pairs, that the search learns from",
    )
    for name in ("budget_epochs", "budget_hours", "budget_gpu_hours", "stop_below"):
        flags.add_setting(group, name)
    flags.add_setting(group, "objectives", "--objective", metavar="NAME")
    flags.add_setting(group, "constraints", "--constraint", metavar="BOUND")
    flags.add_setting(group, "optuna_storage", metavar="URL")
    flags.add_setting(group, "track", metavar="SERVICE[:PLACE]")
    group.add_argument(
        "--baselines",
        nargs="*",
        metavar="NAME",
        help="rows the winner is compared with: none, kd, ekd-softmax (default: the first two)",
    )
    flags.add_setting(group, "softmax_teacher_weights", metavar="FILE")
    flags.add_setting(group, "confirm_seeds", "--seeds", in_recipe=True)
    flags.add_setting(group, "confirm_top_k", "--top-k", in_recipe=True)
    for name in ("max_concurrent", "workers_per_trial"):
        flags.add_setting(group, name)
    flags.add_setting(group, "gpus_per_trial", "--gpus-per-trial", "--gpus-per-worker")
    flags.add_common(group, "--require-gain", "--address", "--assume", "--keep-ray-logs")
    flags.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Run one study, or one after the other, from teacher to exported winner."""
    from ekd_ray.scale.assumed_nodes import assuming

    if args.repair:
        _repair(args)
    request = study_request(args)
    with show_during("loading PyTorch and Ray ...", quiet=request.quiet):
        set_up_ray(request.address, keep_logs=request.keep_ray_logs)
    with assuming(request.assume):
        if "" in request.studies:
            return _run_one(request.studies[""], request)
        return _run_many(request)


def _repair(args: argparse.Namespace) -> None:
    """Rebuild the head of the study in --out, if it is damaged; says what was done."""
    from ekd_ray.studies.places import locate

    out, location = locate(args.out) if args.out else (None, None)
    if out is None or location is not None or not args.resume:
        raise UserError("--repair goes together with --resume and --out FOLDER, no URI.")
    with show_during("looking at the study's records ...", quiet=args.quiet):
        from ekd_ray.studies.repair import repair_study

        done = repair_study(out)
    print_text(done, file=sys.stderr)


def _run_one(recipe: Recipe, request: Request) -> int:
    _check_gain_can_settle(recipe.config, request)
    with show_during("reading the data and checking the study ...", quiet=request.quiet):
        from ekd_ray.cli.plan_text import study_plan
        from ekd_ray.cli.study_text import print_study
        from ekd_ray.results.study import Study
        from ekd_ray.studies.pipeline import check_folder, prepare_study

        shared = recipe.config.distill
        out = request.out or default_folder(shared, shared.teacher or "none", shared.student)
        out = out.absolute()
        config = prepare_study(
            recipe, warm_start=request.warm_start, download=request.download,
            resumed=out if request.resume else None, **_progress(request),
        )  # fmt: skip
    if request.dry_run:
        if request.location is None:
            check_folder(out, config, resume=request.resume)
        print_plan(study_plan(config, out), config.to_dict(), as_json=request.json)
        return 0
    bundle = _run_study(config, out, request, request.location, resume=request.resume)
    study = Study.load(out)
    if request.json:
        there = {"uri": str(request.location)} if request.location else {}
        print_json({"study": str(out), "bundle": str(bundle.path), **there, **bundle.metrics})
    else:
        print_study(study, bundle)
    return _fail_without_gain(study, request)


def _progress(request: Request) -> dict[str, Any]:
    return {} if request.quiet else {"say": show_scanned}


def _check_gain_can_settle(config: StudyConfig, request: Request) -> None:
    """Raise `UserError` for --require-gain on a study that can never show one."""
    from ekd_ray.results.leaderboard import STUDENT_ALONE
    from ekd_ray.results.paired import LEAST_SEEDS

    if not request.require_gain:
        return
    if STUDENT_ALONE not in config.baselines:
        raise UserError(
            f"--require-gain compares with the student alone, the baseline '{STUDENT_ALONE}', and "
            f"the baselines are {', '.join(config.baselines) or 'left out'}: add it to --baselines."
        )
    if config.most_seeds < LEAST_SEEDS:
        cure = f"give --seeds {LEAST_SEEDS} or more"
        if request.resume:  # whose seeds stand
            cure = f"begin another study with --seeds {LEAST_SEEDS} and another --out"
        raise UserError(
            f"--require-gain needs at least {LEAST_SEEDS} seeds, fewer settle no gain, got "
            f"{config.most_seeds}: {cure}."
        )


def _fail_without_gain(study: StudyReader, request: Request, name: str = "") -> int:
    """The exit code of a finished study; says why where --require-gain makes it 1."""
    from ekd_ray.results.words import refuse_without_gain

    reason = refuse_without_gain(study.leaderboard()) if request.require_gain else ""
    if reason:
        print_text(f"--require-gain: {name and f'{name}: '}{reason}", file=sys.stderr)
    return 1 if reason else 0


def _run_many(request: Request) -> int:
    """A study for every pair and method, then one table; a study that fails stays one cell."""
    from ekd_ray.cli.console import Console
    from ekd_ray.cli.plan_text import study_plan
    from ekd_ray.remote.session import put_files
    from ekd_ray.results.study import Study
    from ekd_ray.scale.cluster import connected
    from ekd_ray.studies.comparison import (
        COMPARISON,
        collect_cells,
        comparison_table,
        write_comparison,
    )
    from ekd_ray.studies.pipeline import prepare_study

    out = (request.out or default_place("comparison")).absolute()
    location = request.location
    # All are checked before the first one costs anything.
    configs = {
        name: prepare_study(
            recipe, warm_start=request.warm_start, download=request.download,
            resumed=out / name if request.resume else None, **_progress(request),
        )
        for name, recipe in request.studies.items()
    }  # fmt: skip
    for config in configs.values():
        _check_gain_can_settle(config, request)
    copies = {name: location and location.child(name) for name in configs}
    begun = [name for name in configs if _holds_study(out / name, copies[name])]
    if begun and not request.resume:
        raise UserError(f"{out / begun[0]} holds a study already: add --resume, or another --out.")
    if request.dry_run:
        plans = {name: study_plan(config, out / name) for name, config in configs.items()}
        text = "\n\n".join(f"study      {name}\n{plan}" for name, plan in plans.items())
        values = {name: config.to_dict() for name, config in configs.items()}
        print_plan(text, values, as_json=request.json)
        return 0
    done: dict[tuple[str, str], Study | str] = {}

    def say(text: str) -> None:
        if not request.quiet:
            print_text(text, file=sys.stderr)

    with connected(*configs.values(), say=say):
        for name, config in configs.items():
            if not request.quiet:
                Console().rule(name)
            pair, _, method = name.rpartition("/")
            place = (pair, method)
            try:
                _run_study(config, out / name, request, copies[name], resume=name in begun)
                done[place] = Study.load(out / name)
            except UserError as error:
                done[place] = str(error)
                print_text(f"error: {name}: {error}", file=sys.stderr)
    cells = collect_cells(done)
    write_comparison(out, cells)
    if location:
        put_files(location, out, [f"{COMPARISON}.md", f"{COMPARISON}.json"])
    if request.json:
        print_json({"out": str(out), "cells": [asdict(cell) for cell in cells]})
    else:
        console = Console()
        console.print(comparison_table(cells))
        console.print(f"table: {out / COMPARISON}.md")
    codes = [
        1 if isinstance(study, str) else _fail_without_gain(study, request, "/".join(place))
        for place, study in done.items()
    ]
    return max(codes, default=0)


def _holds_study(folder: Path, location: Location | None) -> bool:
    from ekd_ray.remote.session import holds
    from ekd_ray.results.records import STUDY_FILE

    return (folder / STUDY_FILE).exists() if location is None else holds(location, STUDY_FILE)


def _run_study(
    config: StudyConfig, out: Path, request: Request, location: Location | None, *, resume: bool
) -> Bundle:
    """Run (or continue) a checked study with its progress on the terminal."""
    from ekd_ray.cli.plan_text import study_plan
    from ekd_ray.cli.terminal import Terminal
    from ekd_ray.results.records import milestone_epochs
    from ekd_ray.results.words import resume_command
    from ekd_ray.scale.schedulers import Chance
    from ekd_ray.studies.pipeline import conduct_study

    terminal = Terminal(
        metric=config.metric,
        mode=config.mode,
        shown=config.shown_settings,
        rungs=milestone_epochs(config),
        chance=Chance.of_study(config.distill, config.data_root),
        quiet=request.quiet,
    )

    def show_plan() -> None:
        several = "" not in request.studies
        added = ["--address", request.address] if request.address else []
        added += ["--require-gain"] if request.require_gain else []
        command = resume_command(config, location or out, *added)
        continue_with(request.typed_resume(out.parents[1]) if several else command)
        if not request.quiet:
            terminal.console.print(study_plan(config, out, begins=True))

    with contextlib.closing(terminal):
        return conduct_study(
            config, out, terminal, location=location, resume=resume, download=request.download,
            accept_versions=request.accept_versions, on_begin=show_plan,
        )  # fmt: skip
