"""A training run in a Ray process: the trial's own one, or one of several workers of it."""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.plugins import LoadedPlugins
from ekd_ray.engine import ranks
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.data_pin import check_pinned
from ekd_ray.engine.decoding import share_cores
from ekd_ray.engine.determinism import decide_determinism
from ekd_ray.engine.distill import Diverged, TrainedStudent, distill
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.engine.measure.cost import student_costs
from ekd_ray.engine.out_of_memory import out_of_memory
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.runlog import Session
from ekd_ray.errors import (
    SAME_COMMAND,
    Halted,
    NoSpace,
    UserError,
    halting_error,
    name_continuation,
)
from ekd_ray.files import read_json, write_json
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import FAILURE, RESULT, RunRecord, find_pin
from ekd_ray.scale.cluster import own_cores
from ekd_ray.scale.worker_output import output_noted

Report = Callable[[dict[str, Any]], None]
# What a Ray process does for a run: `train_run` with its options, or a test's own.
Train = Callable[[RunRecord, Report], object]
RUN = "run"  # the key of the run, as `RunRecord.to_dict` gives it, in a Tune trial's config
# Left by a trial that found the disk full, or other data: it has not failed, and is continued once
# that is mended.
HALTED = "halted.json"
# Where not even that could be written, a disk with less than this is taken to be full.
_LEAST_FREE = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How runs are trained, whichever they are.

    `costs` names what is to be known of the student besides its metrics; `shown` names the
    settings that TensorBoard's HParams tab shows; `test`: a single run reads the test split;
    `pin`: what `find_pin` found, which the data of the node must be.
    """

    data_root: str | None
    threads: int
    costs: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    test: bool = False
    pin: Any = None
    plugins: LoadedPlugins = LoadedPlugins()  # which come with the options

    @classmethod
    def of_study(cls, config: StudyConfig, folder: Path) -> TrainOptions:
        """Those of the runs of a study in a folder."""
        return cls(
            data_root=config.data_root, threads=config.cpus_per_trial, costs=config.costs,
            shown=tuple(config.space or {}), pin=find_pin(folder),
            plugins=LoadedPlugins(config.distill.plugins),
        )  # fmt: skip


def train_in_process(config: dict[str, Any], *, train: Train, gpus: float, limited: bool) -> None:
    """Train in the Tune trial's own process; every epoch reaches the scheduler.

    `gpus` and `limited` are of `share_of_gpu`.
    """
    from ray import tune  # slow to import, and training alone does without

    run = RunRecord.from_dict(config[RUN])
    with share_of_gpu(gpus, limited=limited), output_noted(run.folder):
        train(run, tune.report)


def train_as_worker(config: dict[str, Any], *, train: Train, gpus: float) -> None:
    """Train as one worker of several; all ranks report, as Ray Train asks."""
    import ray.train  # slow to import, and training alone does without
    from ray.train.torch import get_device

    run = RunRecord.from_dict(config[RUN])
    with share_of_gpu(gpus), output_noted(run.folder):
        if gpus:  # a node's workers see all of its GPUs
            device = get_device()
            if device.type == "cuda":
                torch.cuda.set_device(device)
        train(run, ray.train.report)


def train_run(
    run: RunRecord, report: Report, *, options: TrainOptions, checkpoint_seconds: float = 30.0
) -> TrainedStudent | None:
    """Train a run, reporting each epoch's row; None if it failed, or had ended before.

    A run that diverges, runs out of memory or proves illegal leaves its reason in
    `failure.json`: that is a result of the search, not an error of it. A full disk and other
    data are errors: see `check_halted`. A run of the search is recorded by its driver, which knows
    whether it was stopped early; any other one here.

    Raises:
        MemoryError: it ran out of memory. Its process is to be replaced, which alone frees all of
            it, and the other ranks, which wait for this one; the next one finds the reason.
    """
    folder, first = run.folder, ranks.is_first()
    if ranks.from_first((folder / RESULT).exists()):  # a worker died after all was done
        return None
    failed = ranks.from_first((folder / FAILURE).exists())  # in another process
    if first:  # of an earlier try, which was killed before anybody read it
        (folder / HALTED).unlink(missing_ok=True)
    try:
        result = None if failed else _distill(run, report, options, checkpoint_seconds)
        if run.stage is RunStage.SEARCH:
            return result
        if result is not None:
            finish_run(run, result, data_root=options.data_root, test=options.test)
            if first:
                forget_checkpoint(folder)
        elif first and run.stage is not RunStage.SINGLE:  # which may be tried again
            run.close("failed")
        return result
    except Exception as error:
        halted = halting_error(error)
        if halted is not None and first:
            with contextlib.suppress(OSError):  # what could not be written was removed
                write_json(folder / HALTED, {"reason": str(halted)})
        elif reason := out_of_memory(error, DistillConfig.from_dict(run.config)):
            write_json(folder / FAILURE, {"reason": reason})
            traceback.print_exc()
            raise MemoryError(reason) from None
        raise


def _distill(
    run: RunRecord, report: Report, options: TrainOptions, checkpoint_seconds: float
) -> TrainedStudent | None:
    """Train a run; None if it failed of itself, for a reason that is then in its folder."""
    try:
        config = DistillConfig.from_dict(run.config)
        # Of another node than the one that the study was begun on: its data may be others.
        # Which of them validate is a setting, and a final run has none.
        if isinstance(options.pin, dict):
            cure = f"give the node {platform.node()} the same data"
            check_pinned(
                run.folder, {**options.pin, "validation": None}, config, options.data_root,
                look=False, test=run.stage is RunStage.FINAL,
                cure=f"{cure}, then run {SAME_COMMAND}; what was finished is kept",
            )  # fmt: skip
        share_cores(own_cores())
        torch.set_num_threads(options.threads)  # the latency among the costs is the trial's own
        confirms = run.stage in (RunStage.SELECT, RunStage.FINAL)
        group = f"{run.stage} {run.name}" if confirms else ""
        train = functools.partial(
            distill,
            data_root=options.data_root,
            out=run.folder,
            on_epoch=report,
            threads=options.threads,
            constants=student_costs(config, options.costs, options.data_root),
            session=Session(settings=options.shown, group=group),
            checkpoint_seconds=checkpoint_seconds,
        )
        return decide_determinism(config, train, wanted=run.stage.exports)
    except Halted:
        raise
    except (Diverged, UserError) as error:
        traceback.print_exc()  # for failure.log
        if ranks.is_first():
            write_json(run.folder / FAILURE, {"reason": str(error)})
    return None


def check_halted(folder: Path) -> None:
    """Check whether the run in a folder, which ended in an error, met a full disk or other data.

    Raises:
        Halted: it did; the study is to stop, because the configuration is not to blame.
    """
    if (folder / HALTED).exists():
        # The process of the run did not know by which command the study was begun.
        reason = str(read_json(folder / HALTED).get("reason"))
        raise Halted(reason.replace(SAME_COMMAND, name_continuation()))
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE:
            raise NoSpace(
                f"a run failed with {free // 2**20} MiB free on the disk of {folder}: free some, "
                f"then run {name_continuation()}; what was finished is kept."
            )
