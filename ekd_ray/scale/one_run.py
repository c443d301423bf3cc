"""One run on several workers, without a search: what `ekd-ray distill --workers` does."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ekd_ray.config.phrases import command_text, several
from ekd_ray.config.plugins import LoadedPlugins
from ekd_ray.config.study_config import Gpus
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.history import read_history
from ekd_ray.errors import UserError, name_continuation
from ekd_ray.results.records import FAILURE, RESULT, RunRecord, failure_reason, find_pin
from ekd_ray.scale.cluster import (
    Node,
    check_gpus,
    connected,
    count_room,
    live_nodes,
    local_cpus,
    on_cluster,
    refuse_misfit,
)
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.trainer import SCRATCH, Workers, fit_group
from ekd_ray.scale.worker import RUN, TrainOptions, train_run
from ekd_ray.scale.worker_output import keep_failure_log

# Starts of the worker group after its first, each from the newest checkpoint.
RESTARTS = 3
PROGRESS_SECONDS = 1.0


def parse_workers(text: str, *, cpus: int | None, gpus: Gpus) -> Workers:
    """`N` or `MIN:MAX` workers; raises `UserError` for anything else, and for what cannot work.

    Without `cpus`, they share the CPUs of this machine; on a cluster elsewhere each has one.
    """
    least, colon, most = text.partition(":")
    numbers = [least, most] if colon else [least, least]
    if not all(number.isdecimal() for number in numbers) or not 1 <= int(least) <= int(numbers[1]):
        raise UserError(f"--workers takes N or MIN:MAX with 1 <= MIN <= MAX, got {text!r}.")
    if cpus is not None and cpus < 1:
        raise UserError(f"--cpus-per-worker must be >= 1, got {cpus}.")
    check_gpus(gpus, int(numbers[1]))
    here = 1 if on_cluster() else max(1, local_cpus() // int(numbers[1]))
    return Workers(least=int(least), most=int(numbers[1]), cpus=cpus or here, gpus=gpus)


def check_workers_fit(workers: Workers, nodes: Collection[Node]) -> None:
    """Raise `UserError` if not even the least number of workers fits: it would wait for ever."""
    cpus, gpus = workers.cpus, workers.known_gpus
    room = count_room(nodes, cpus=cpus, gpus=gpus)
    if room < workers.least:
        share = f"{several(cpus, 'CPU')} and {several(gpus, 'GPU')}"
        need = f"the run needs {share}"
        if workers.most > 1:
            need = f"{several(workers.least, 'worker')} need {share} each, {room} would fit"
        raise refuse_misfit(
            need, nodes, cpus=cpus, gpus=gpus, workers=workers.most, workers_flag="--workers"
        )


def run_on_workers(
    run: RunRecord,
    workers: Workers,
    *,
    data_root: str | None,
    test: bool,
    on_epoch: Callable[[dict[str, Any]], None],
) -> None:
    """Train a run to its weights and `result.json`; its folder must be one that all nodes see.

    Args:
        test: read the test split, once.
        on_epoch: called with each new epoch's row, seen at most `PROGRESS_SECONDS` late.

    Raises:
        UserError: it diverged, proved illegal, or its workers died `RESTARTS` + 1 times.
    """
    from ray.train import TrainingFailedError

    folder = run.folder
    (folder / FAILURE).unlink(missing_ok=True)
    plugins = LoadedPlugins(tuple(run.config["plugins"]))
    options = TrainOptions(
        data_root=data_root, threads=workers.cpus, test=test, pin=find_pin(folder), plugins=plugins
    )
    with connected():
        nodes = live_nodes().values()
        workers = workers.on(nodes)
        check_workers_fit(workers, nodes)
        try:
            with epochs_reported(folder, on_epoch):
                fit_group(
                    {RUN: run.to_dict()},
                    workers=workers,
                    train=functools.partial(train_run, options=options),
                    callbacks=[],
                    failures=RESTARTS,
                    scratch=folder / SCRATCH,
                )
        except TrainingFailedError as error:
            keep_failure_log(folder, str(error))
            reason = failure_reason(folder)
            if not (folder / FAILURE).exists():
                reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"the workers died {RESTARTS + 1} times ({reason.rstrip('.')}): "
                f"{command_text('logs', folder)} shows more; continue with {name_continuation()}."
            ) from error
        finally:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        if not (folder / RESULT).exists():
            keep_failure_log(folder, "")
    if not (folder / RESULT).exists():
        raise UserError(failure_reason(folder))


def note_continued(observer: Observer, name: str, folder: Path, epochs: int) -> None:
    """Say of a run that it goes on from a checkpoint, where one is in its folder."""
    if (folder / CHECKPOINT).exists():
        done = len(read_history(folder))
        observer.note(
            f"{name} is continued from its checkpoint: {done} of {several(epochs, 'epoch')} done"
        )


@contextlib.contextmanager
def epochs_reported(folder: Path, on_epoch: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Report the new rows of a run's history while another process trains it."""
    ended = threading.Event()
    known_epoch = max((row["epoch"] for row in read_history(folder)), default=0)
    reporter = threading.Thread(
        target=report_epochs, args=(folder, known_epoch, ended, on_epoch), daemon=True
    )
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def report_epochs(
    folder: Path,
    known_epoch: int,
    ended: threading.Event,
    on_epoch: Callable[[dict[str, Any]], None],
) -> None:
    """Report each row after `known_epoch` once; a restarted group trains some epochs again."""
    while True:
        last = ended.wait(PROGRESS_SECONDS)
        for row in read_history(folder):
            if row["epoch"] > known_epoch:
                known_epoch = row["epoch"]
                on_epoch(row)
        if last:
            return
