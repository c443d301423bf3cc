"""Training one configuration with its progress on the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ekd_ray.cli.output import print_json, print_plan, print_text, set_up_ray, show_scanned
from ekd_ray.cli.plan_text import run_plan
from ekd_ray.cli.request import Request
from ekd_ray.cli.terminal import Terminal
from ekd_ray.config import DistillConfig
from ekd_ray.config.phrases import command_text
from ekd_ray.config.targets import DIRECTIONS
from ekd_ray.data import dataset_info
from ekd_ray.errors import UserError, continue_with
from ekd_ray.results.run_result import RunResult
from ekd_ray.results.words import exact_figure
from ekd_ray.scale.assumed_nodes import assuming
from ekd_ray.scale.schedulers import Chance
from ekd_ray.studies.overlay import is_own_data
from ekd_ray.studies.places import find_data_root
from ekd_ray.studies.recipes import SEARCH_SPACES
from ekd_ray.studies.training import Training, failures_in_sentences, planned, run_training


def train(request: Request) -> int:
    """Train `request.run` into its folder: history, events, weights, result.json."""
    assert request.run is not None
    set_up_ray(request.address, keep_logs=request.keep_ray_logs)
    with assuming(request.assume), planned(
        request.run, out=request.out, location=request.location, candidates=request.candidates,
        teacher_training=request.teacher_training,
        workers=request.workers, cpus_per_trial=request.cpus_per_trial,
        gpus_per_trial=request.gpus_per_trial, data_root=request.data_root, test=request.test,
        download=request.download, resume=request.resume,
        **({} if request.quiet else {"say": show_scanned}),
    ) as training:  # fmt: skip
        if request.assume and training.workers.most == 1 and training.candidates is None:
            raise UserError(
                "--assume plans several trials or workers, and this run is one process: drop it, "
                "or give --workers N."
            )
        plan = run_plan(
            training.config, training.out, request.data_root, training.workers,
            training.candidates, training.study, training.teaching, request.role,
        )  # fmt: skip
        if request.dry_run:
            values = training.config.to_dict()
            if request.candidates:
                values["candidates"] = asdict(request.candidates)
            print_plan(plan, values, as_json=request.json)
            return 0
        with contextlib.closing(_terminal(training, quiet=request.quiet)) as terminal:

            def show_plan() -> None:
                continue_with(request.typed_resume(training.out))
                if not request.quiet:
                    terminal.console.print(plan)

            result = run_training(training, terminal, on_begin=show_plan)
    _print(result, training, as_json=request.json)
    top1 = result.metrics.get("val_top1")
    at_chance = terminal.chance and top1 is not None and terminal.chance.explains(top1)
    if request.role == "teacher" and at_chance:
        print_text(
            f"warning: this teacher may be no better than chance (val_top1 {top1:.1%}), and a "
            "student learns no more than it knows: train it for longer (--epochs N), or a larger "
            "--model",
            file=sys.stderr,
        )
    if request.role == "teacher" and not (request.json or training.config.plugins):
        print_text(f"a study with this teacher: {_command_with(result.weights, training)}")
    return 0


def _command_with(weights: Path, training: Training) -> str:
    """The command of a study on the same images whose teacher has these weights."""
    config, root = training.config, training.data_root
    words: list[object] = ["tune", "--dataset", config.dataset]
    words += ["--data-root", root] if root not in (None, find_data_root(None)) else []
    words += ["--train-subset", config.train_subset] if config.train_subset else []
    if config.image_size != dataset_info(config.dataset, data_root=root).image_size:
        words += ["--set", f"image_size={config.image_size}"]
    if is_own_data(config.dataset):
        words += ["--teacher", config.student, "--student", "MODEL"]
    elif pairs := sorted((SEARCH_SPACES / config.dataset).glob(f"{config.student}-*.yaml")):
        words += ["--pair", pairs[0].stem]
    else:
        words += ["--teacher", config.student, "--student", "MODEL"]
    return command_text(*words, "--teacher-weights", weights)


def _terminal(training: Training, *, quiet: bool) -> Terminal:
    metric = training.candidates.choose_by if training.candidates else "val_top1"
    chance = Chance.of_study(training.config, training.data_root)
    return Terminal(metric=metric, mode=DIRECTIONS[metric], quiet=quiet, chance=chance)


@contextlib.contextmanager
def show_run(title: str, config: DistillConfig, *, quiet: bool) -> Iterator[Terminal]:
    """Show one run while it trains; if it diverges or gets no memory, that is a `UserError`."""
    with contextlib.closing(Terminal(quiet=quiet)) as terminal:
        terminal.stage(title, 1, config.epochs)
        terminal.started(config.student, 0, config.to_dict())
        with failures_in_sentences(config):
            yield terminal
        terminal.ended(0, failure=None)


def _print(result: RunResult, training: Training, *, as_json: bool) -> None:
    if as_json:
        inputs = ("folder", "config", "params", "history")  # they stand in other files
        found = {name: v for name, v in result.record.to_dict().items() if name not in inputs}
        print_json({**found, "weights": str(result.weights)})
        return
    if training.candidates:
        metric, chosen = training.candidates.choose_by, result.record.seed
        for entry in result.candidates:
            figure = entry["reason"] or f"{metric} {entry['metrics'][metric]:.4f}"
            mark = ", chosen" if entry["seed"] == chosen else ""
            print_text(f"seed {entry['seed']}: {entry['status']}, {figure}{mark}")
    figures = {k: v for k, v in result.metrics.items() if k.startswith(("val_", "test_"))}
    if result.log_prior is not None:
        figures["log_prior"] = result.log_prior
    # The accuracy first: it is what one looks for.
    names = sorted(figures, key=lambda name: name not in ("val_top1", "test_top1"))
    print_text("  ".join(f"{name} {exact_figure(name, figures[name])}" for name in names))
    print_text(f"weights: {result.weights}")
