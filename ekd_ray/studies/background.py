"""A study in a child process, which ends with its parent unless it is detached.

`python -m ekd_ray.studies.background` is that child; what it is to do comes by its standard input.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

from ekd_ray.config import StudyConfig
from ekd_ray.config.plugins import LoadedPlugins
from ekd_ray.errors import EXIT_INTERRUPTED, Interrupted, UserError
from ekd_ray.remote.location import Location
from ekd_ray.results.records import STUDY_FILE
from ekd_ray.results.study import (
    DRIVER_ERROR,
    DRIVER_LOG,
    GRACE_SECONDS,
    Study,
    driver_failure,
)
from ekd_ray.scale.cluster import joined_address
from ekd_ray.studies.callbacks import Together
from ekd_ray.studies.pipeline import conduct_study, lock_folder

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """The child's task.

    Attributes:
        parent: the process with which it ends; None if it is detached.
    """

    config: StudyConfig
    out: Path
    location: Location | None
    resume: bool
    download: bool
    accept_versions: bool
    parent: int | None
    plugins: LoadedPlugins  # which come with the job


def start_study(
    config: StudyConfig,
    out: Path,
    *,
    location: Location | None,
    resume: bool,
    download: bool,
    accept_versions: bool = False,
    detach: bool,
) -> Study:
    """Begin or continue a checked study in a child process; returns once it has its folder.

    Raises:
        UserError: the study could not begin.
    """
    with lock_folder(out):  # of another driver not even the log is written to
        pass
    job = Job(
        config=config, out=out, location=location, resume=resume, download=download,
        accept_versions=accept_versions, parent=None if detach else os.getpid(),
        plugins=LoadedPlugins(config.distill.plugins),
    )  # fmt: skip
    environment = {**os.environ, **joined_address()}
    with open(out / DRIVER_LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ekd_ray.studies.background"],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
            start_new_session=True,  # the Ctrl-C of a cell is not for it
        )  # fmt: skip
    assert process.stdin is not None
    with process.stdin:
        pickle.dump(job, process.stdin)
    while not (out / STUDY_FILE).exists():
        if (code := process.poll()) is not None:
            raise driver_failure(out, code)
        time.sleep(POLL_SECONDS)
    return replace(Study.load(out), process=process)


def main(source: IO[bytes]) -> int:
    """Do the job that comes from `source`; returns the exit code."""
    # A parent that ignores Ctrl-C must not keep its child from being stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _stop_as_interrupted)
    job: Job = pickle.load(source)
    if job.parent is not None:
        threading.Thread(target=_end_with, args=(job.parent,), daemon=True).start()
    try:
        conduct_study(
            job.config, job.out, Together([]), location=job.location, resume=job.resume,
            download=job.download, accept_versions=job.accept_versions,
        )  # fmt: skip
    except (KeyboardInterrupt, Interrupted):
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"{DRIVER_ERROR}{error}", file=sys.stderr)
        return error.exit_code
    return 0


def _stop_as_interrupted(number: int, frame: FrameType | None) -> None:
    interrupted = signal.getsignal(signal.SIGINT)  # Tune has one of its own while it runs
    assert callable(interrupted)
    interrupted(signal.SIGINT, frame)


def _end_with(parent: int) -> None:
    """Stop this process as Ctrl-C does once its parent has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
