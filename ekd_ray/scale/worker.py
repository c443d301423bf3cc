"""The train loop as a Ray worker: what a trial runs, alone or as one of several workers."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.engine.distill import Diverged, RunResult, distill
from ekd_ray.engine.measure.cost import student_costs
from ekd_ray.engine.runlog import Session, read_history
from ekd_ray.engine.schedule import settled_since
from ekd_ray.errors import NoSpace, UserError, disk_full_error
from ekd_ray.files import write_json
from ekd_ray.results.records import FAILURE

Report = Callable[[dict[str, Any]], None]
RUNG_SCORE = "rung_score"
# Left by a trial that found the disk full: it has not failed, and is continued once there is room.
FULL = "disk_full.json"
# torch on CPUs has no exception of its own for it.
_REFUSED = "DefaultCPUAllocator: can't allocate memory"
# Where not even that could be written, a disk with less than this is taken to be full.
_LEAST_FREE = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to do: a resolved configuration, where its files go and what it may use.

    `name` is what progress shows; `number` the trial's number in the study; `costs` names
    what is to be known of the student besides its metrics; `compared` is the metric whose mean
    over the epochs is reported as `RUNG_SCORE`; `shown` names the settings that TensorBoard's
    HParams tab shows, in one line for all runs of a `group`.
    """

    name: str
    number: int
    folder: str
    settings: dict[str, Any]
    data_root: str | None
    threads: int
    costs: tuple[str, ...] = ()
    compared: str | None = None
    shown: tuple[str, ...] = ()
    group: str = ""

    def as_config(self) -> dict[str, Any]:
        """The plain mapping that Ray carries as the trial's config."""
        return {"job": asdict(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Job:
        """The job back from `as_config`."""
        return cls(**config["job"])


def run_job(job: Job, report: Report, *, checkpoint_seconds: float = 30.0) -> RunResult | None:
    """Run one job, reporting each epoch's row.

    A run that diverges, runs out of memory or proves illegal leaves its reason in
    `failure.json` and returns None: that is a result of the search, not an error of it. A
    full disk is an error: see `check_room`.
    """
    folder = Path(job.folder)
    if ranks.is_first():  # of an earlier try, which was killed before anybody read it
        (folder / FAILURE).unlink(missing_ok=True)
        (folder / FULL).unlink(missing_ok=True)
    try:
        return _run(job, folder, report, checkpoint_seconds)
    except Exception as error:
        full = disk_full_error(error)
        if full is not None and ranks.is_first():
            with contextlib.suppress(OSError):  # what could not be written was removed
                write_json(folder / FULL, {"reason": str(full)})
        raise


def check_room(folder: Path) -> None:
    """Whether the run in a folder, which ended in an error, met a full disk.

    Raises:
        NoSpace: it did; the study is to stop, for the configuration is not to blame.
    """
    if (folder / FULL).exists():
        raise NoSpace(json.loads((folder / FULL).read_text(encoding="utf-8"))["reason"])
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE:
            raise NoSpace(
                f"a run failed with {free // 2**20} MiB free on the disk of {folder}: free some, "
                "then run the same command with --resume; what was finished is kept."
            )


def _run(job: Job, folder: Path, report: Report, checkpoint_seconds: float) -> RunResult | None:
    try:
        config = DistillConfig.from_dict(job.settings)
        torch.set_num_threads(job.threads)  # the latency among the costs is the trial's own
        return distill(
            config,
            data_root=job.data_root,
            out=folder,
            on_epoch=_scored(report, folder, job.compared, config),
            threads=job.threads,
            constants=student_costs(config, job.costs),
            session=Session(settings=tuple(job.shown), group=job.group),
            checkpoint_seconds=checkpoint_seconds,
        )
    except (Diverged, UserError) as error:
        if ranks.is_first():
            write_json(folder / FAILURE, {"reason": str(error)})
    except (MemoryError, RuntimeError, OSError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        write_json(folder / FAILURE, {"reason": reason})
        if ranks.world_size() > 1:
            raise  # the other ranks wait in a collective: only a restart frees them
    return None


def out_of_memory(error: BaseException) -> str | None:
    """The reason of a run whose memory was refused, by a GPU or by this machine; else None.

    A process that the system kills for its memory has no say: see `ProcessDeaths`.
    """
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {line}"
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or refused or _REFUSED in line:
        return f"out of memory: {line.rpartition(_REFUSED)[2].strip(' .:') or 'refused'}"
    return None


def rung_score(values: Sequence[float], config: DistillConfig) -> float:
    """What a run is compared by after the epochs that have these values: their mean since the
    learning rate last fell.

    A single epoch at a high rate says little: what a run will be worth shows better in the mean.
    """
    return statistics.fmean(values[settled_since(config, len(values)) - 1 :])


def _scored(report: Report, folder: Path, metric: str | None, config: DistillConfig) -> Report:
    """Reports that also say the run's `rung_score`; a resumed run has that of its epochs before."""
    if metric is None:
        return report

    def scored(row: dict[str, Any]) -> None:
        values = [epoch[metric] for epoch in read_history(folder)]
        # Workers on other nodes do not see the folder; the first one's report counts.
        report({**row, RUNG_SCORE: rung_score(values, config) if values else row[metric]})

    return scored


Body = Callable[[Job, Report], object]


def alone(config: dict[str, Any], *, body: Body = run_job) -> None:
    """`body` in the Tune trial's own process; every epoch reaches the scheduler."""
    from ray import tune

    body(Job.from_config(config), tune.report)


def in_group(config: dict[str, Any], *, body: Body = run_job) -> None:
    """`body` as one worker of a trial that has several; all ranks report, as Ray Train asks."""
    import ray.train
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":  # a node's workers see all of its GPUs
        torch.cuda.set_device(device)
    body(Job.from_config(config), ray.train.report)
