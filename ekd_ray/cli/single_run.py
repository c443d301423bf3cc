"""Training one configuration, as `distill` and `train_teacher` ask for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ekd_ray.cli.output import RUNS, join_cluster, print_json, print_plan
from ekd_ray.cli.plan_text import run_plan
from ekd_ray.cli.request import Request
from ekd_ray.cli.terminal import Terminal
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.targets import DIRECTIONS
from ekd_ray.data import load_dataset, short_name
from ekd_ray.engine.checkpoint import CHECKPOINT, forget_checkpoint
from ekd_ray.engine.determinism import decide_determinism
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.engine.out_of_memory import refused_memory_reported
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.engine.resolve import check_workers, resolve
from ekd_ray.engine.train_teacher import check_candidates
from ekd_ray.errors import UserError
from ekd_ray.files import file_name
from ekd_ray.remote.session import mirrored
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import (
    RESULT,
    candidate_folder,
    read_record,
    single_run,
)
from ekd_ray.scale.cluster import check_fits, check_visible, connected, known_nodes, local_nodes
from ekd_ray.scale.one_run import check_workers_fit, parse_workers, run_on_workers
from ekd_ray.scale.teacher_candidates import (
    candidate_study,
    check_candidate_folder,
    train_candidates,
)
from ekd_ray.scale.trainer import Workers
from ekd_ray.studies.pipeline import check_writable, is_left_over, lock_folder


def train(request: Request) -> int:
    """Train `request.run` into its folder: history, events, weights, result.json."""
    assert request.run is not None
    join_cluster(request.address)
    resources = StudyConfig(
        data_root=request.data_root, cpus_per_trial=request.cpus_per_trial or 1,
        gpus_per_trial="auto" if request.gpus_per_trial is None else request.gpus_per_trial,
    )  # fmt: skip
    workers = parse_workers(
        request.workers, cpus=request.cpus_per_trial, gpus=resources.gpus_per_trial
    )
    # Before anything asks for a GPU.
    with share_of_gpu(0) if workers.gpus == 0 else contextlib.nullcontext():
        return _train(request, request.run, workers, resources)


def _train(request: Request, run: DistillConfig, workers: Workers, resources: StudyConfig) -> int:
    config = resolve(run, data_root=request.data_root, download=request.download)
    check_workers(config, workers.most)
    study = None
    if request.candidates:
        check_candidates(config, request.candidates)
        study = candidate_study(config, request.candidates, resources)
        if request.cpus_per_trial:
            study = study.replace(cpus_per_trial=request.cpus_per_trial)
        check_fits(study)
    elif workers.most == 1:  # in this process
        nodes = local_nodes()
        check_workers_fit(replace(workers.on(nodes), cpus=1), nodes)
    elif (there := known_nodes()) is not None:
        check_workers_fit(workers.on(there), there)
    data = short_name(config.dataset)
    default = RUNS / f"{data}-{file_name(config.student)}-{config.method}-seed{config.seed}"
    out = (request.out or default).absolute()
    if request.dry_run:
        plan = run_plan(
            config, out, request.data_root, workers, request.candidates, study, request.role
        )
        values = config.to_dict()
        if request.candidates:
            values["candidates"] = asdict(request.candidates)
        print_plan(plan, values, as_json=request.json)
        return 0
    with mirrored(request.location, out, resume=request.resume), lock_folder(out):
        if request.candidates and study:
            return _train_candidates(config, out, request, request.candidates, study)
        return _train_here(config, out, request, workers)


def _train_here(config: DistillConfig, out: Path, request: Request, workers: Workers) -> int:
    check_run_folder(out, config, resume=request.resume)
    check_candidate_folder(out, None)
    if (out / RESULT).exists():  # finished before: nothing is left to do
        _print_run(out, as_json=request.json)
        return 0
    if request.download:
        load_dataset(config.dataset, "train", data_root=request.data_root, download=True)
    run, data_root = single_run(config, out), request.data_root
    run.write_config()
    plan = "" if request.quiet else run_plan(config, out, data_root, workers, role=request.role)
    with show_run("training", config, quiet=request.quiet, plan=plan) as terminal:
        on_epoch = functools.partial(terminal.epoch, 0)
        if workers.most > 1:
            run_on_workers(run, workers, data_root=data_root, test=request.test, on_epoch=on_epoch)
            terminal.ended(0, failed=False)
        else:
            gpus = workers.on(local_nodes()).known_gpus
            with cpu_threads(workers.cpus), share_of_gpu(gpus):
                train = functools.partial(distill, data_root=data_root, out=out, on_epoch=on_epoch)
                result = decide_determinism(config, train, wanted=run.stage.exports)
                terminal.ended(0, failed=False)
                if request.test:
                    terminal.stage("test split", 1, 0)
                finish_run(run, result, data_root=data_root, test=request.test)
            forget_checkpoint(out)
    _print_run(out, as_json=request.json)
    return 0


def _train_candidates(
    config: DistillConfig, out: Path, request: Request, candidates: Candidates, study: StudyConfig
) -> int:
    """Train the candidates of a teacher below `out`, and write the best of them to it."""
    check_run_folder(out, config, resume=request.resume)
    check_candidate_folder(out, candidates)
    if request.download:
        load_dataset(config.dataset, "train", data_root=request.data_root, download=True)
    single_run(config, out).write_config()
    metric, mode = candidates.choose_by, DIRECTIONS[candidates.choose_by]
    with contextlib.closing(Terminal(metric=metric, mode=mode, quiet=request.quiet)) as terminal:
        if not request.quiet:
            plan = run_plan(
                config, out, request.data_root, candidates=candidates, study=study,
                role=request.role,
            )  # fmt: skip
            terminal.console.print(plan, markup=False)
        with contextlib.nullcontext() if (out / WEIGHTS).exists() else connected(study):
            check_visible(out)
            found = train_candidates(out / WEIGHTS, candidates, study, terminal)
    chosen = found["chosen"]
    if not request.json:
        for entry in found["candidates"]:
            figure = entry["reason"] or f"{metric} {entry['metrics'][metric]:.4f}"
            mark = ", chosen" if entry["seed"] == chosen else ""
            print(f"seed {entry['seed']}: {entry['status']}, {figure}{mark}")
    _print_run(candidate_folder(out, chosen), as_json=request.json, weights=out / WEIGHTS)
    return 0


@contextlib.contextmanager
def show_run(
    title: str, config: DistillConfig, *, quiet: bool, plan: str = ""
) -> Iterator[Terminal]:
    """Show one run while it trains; if it diverges or gets no memory, that is a `UserError`."""
    with contextlib.closing(Terminal(quiet=quiet)) as terminal:
        if plan:
            terminal.console.print(plan, markup=False)
        terminal.stage(title, 1, config.epochs)
        terminal.started(config.student, 0, config.to_dict())
        try:
            with refused_memory_reported(config):
                yield terminal
        except Diverged as error:
            raise UserError(str(error)) from None


def _print_run(out: Path, *, as_json: bool, weights: Path | None = None) -> None:
    record, weights = read_record(out), weights or out / WEIGHTS
    assert record is not None
    if as_json:
        inputs = ("folder", "config", "params", "history")  # they stand in other files
        found = {name: v for name, v in record.to_dict().items() if name not in inputs}
        print_json({**found, "weights": str(weights)})
        return
    figures = {k: v for k, v in record.metrics.items() if k.startswith(("val_", "test_"))}
    if record.log_prior is not None:
        figures["log_prior"] = record.log_prior
    # The accuracy first: it is what one looks for.
    names = sorted(figures, key=lambda name: not name.endswith("_top1"))
    print("  ".join(f"{name} {figures[name]:.4f}" for name in names))
    print(f"weights: {weights}")


def check_run_folder(out: Path, config: DistillConfig, *, resume: bool) -> None:
    """Refuse to mix runs: another configuration's folder, or this one's without --resume."""
    check_writable(out)
    if (out / "config.yaml").exists():
        there = DistillConfig.from_yaml(out / "config.yaml")
        if there.fingerprint() != config.fingerprint():
            raise UserError(f"{out} belongs to another configuration: choose another --out.")
        if not resume:
            raise UserError(f"{out} holds this run already: add --resume, or choose another --out.")
    elif not all(map(is_left_over, out.iterdir())):
        raise UserError(f"{out} holds something else: choose another --out.")
    elif resume and not (out / CHECKPOINT).exists():
        raise UserError(f"{out} holds no run to resume: check --out, or drop --resume.")
