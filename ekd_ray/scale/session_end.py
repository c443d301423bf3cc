"""The end of a Ray of our own whose driver is killed: this file is also the program of the process
that waits for it, and so imports the standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROCESSES = Path("/proc")
ROUNDS = 50  # of looking for processes that were being started
ROUND_SECONDS = 0.1


@contextlib.contextmanager
def ended_with_driver(folder: Path) -> Iterator[None]:
    """Have all that is left of a Ray killed when the body has ended, or this process has, however.

    The system ends what a killed driver has started, and workers end with their raylet, but its
    agents would look for the GCS for a minute. Where processes cannot be listed (macOS), a process
    of Ray's own does it.

    Args:
        folder: this Ray's alone; each of its processes writes a log there, by which it is known.
    """
    if not PROCESSES.exists():
        yield
        return
    # Without site packages, because it should cost next to nothing; in a session of its own,
    # because it must not end with this process's terminal. Who has joined this Ray from another
    # session is left alone.
    command = [sys.executable, "-I", "-S", __file__, os.path.realpath(folder), str(os.getsid(0))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ):
        yield


def processes_of(folder: str, session: int) -> list[int]:
    """The processes of a terminal session that have a log below a folder open to write."""
    found = []
    for process in PROCESSES.glob("[0-9]*"):
        pid = int(process.name)
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.getsid(pid) == session and any(
                os.readlink(link).startswith(f"{folder}/") and link.lstat().st_mode & stat.S_IWUSR
                for link in (process / "fd").iterdir()
            ):
                found.append(pid)
    return found


def main(folder: str, session: str) -> None:
    """Kill the processes of `folder` once nobody holds the other end of the standard input."""
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        processes = {*processes_of(folder, int(session))} - {os.getppid()}  # where it lives on
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not processes:
            return
        time.sleep(ROUND_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
