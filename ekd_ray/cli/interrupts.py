"""How a command ends when it is asked to: in order at the first Ctrl-C or SIGTERM, at once at the
next Ctrl-C."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType

from ekd_ray.errors import EXIT_INTERRUPTED, end_process

_writer = -1  # of the pipe that hears of every signal


def handle_interrupts() -> None:
    """Have SIGTERM end this process as Ctrl-C does, and a second Ctrl-C without any cleaning up.

    The second is heard by a thread, of a pipe into which Python writes each signal as it arrives:
    the main thread may be busy with an import or in compiled code, or have had its handler
    replaced by Tune's or Ray Train's. A file is as after a kill: whole, old or new.
    """
    global _writer
    signal.signal(signal.SIGTERM, _handle_sigterm)
    if _writer < 0:
        # Last of all: an interrupt of what little is left by then would print a traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    else:
        os.close(_writer)  # one command after another in a process counts anew
    reader, _writer = os.pipe()
    os.set_blocking(_writer, False)
    signal.set_wakeup_fd(_writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear_signals, args=(reader,), daemon=True).start()


def _hear_signals(reader: int) -> None:
    asked = False
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if asked and number[0] == signal.SIGINT:
                end_process(
                    "ended at once: run the same command with --resume to continue.",
                    EXIT_INTERRUPTED,
                )
            asked |= number[0] in (signal.SIGINT, signal.SIGTERM)


def _handle_sigterm(number: int, frame: FrameType | None) -> None:
    """A polite kill (of a batch system, a container) ends as Ctrl-C does."""
    interrupted = signal.getsignal(signal.SIGINT)  # Tune has one of its own while it runs
    if not callable(interrupted):  # ignored, as shells have it for jobs in the background
        raise KeyboardInterrupt
    interrupted(signal.SIGINT, frame)
