"""How a command ends when it is asked to: in order at the first Ctrl-C or SIGTERM, at once at the
next Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from ekd_ray.errors import EXIT_INTERRUPTED, continue_with, continuing_command, end_process

_writer = -1  # of the pipe that hears of every signal
_repeated = 0  # of what it hears, interrupts that this process sends itself
AGAIN_SECONDS = 0.1


def describe_interrupt() -> str:
    """The line with which an interrupted command ends."""
    command = continuing_command()
    return f"interrupted; continue with: {command}" if command else "interrupted."


def handle_interrupts() -> None:
    """Have SIGTERM end this process as Ctrl-C does, and a second Ctrl-C without any cleaning up.

    The second is heard by a thread, of a pipe into which Python writes each signal as it arrives:
    the main thread may be busy with an import or in compiled code, and Tune and Ray Train have
    handlers of their own while they run. Files are left as by a kill: each as it was, or new.
    """
    global _writer
    continue_with(None)
    sys.unraisablehook = _repeat_swallowed
    signal.signal(signal.SIGTERM, _handle_sigterm)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _handle_sigint)
    if _writer >= 0:  # one command after another in a process: each counts anew
        os.close(_writer)
    reader, _writer = os.pipe()
    os.set_blocking(_writer, False)
    signal.set_wakeup_fd(_writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear_signals, args=(reader,), daemon=True).start()


def _hear_signals(reader: int) -> None:
    global _repeated
    asked = False
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if _repeated and number[0] == signal.SIGINT:
                _repeated -= 1
            elif asked and number[0] == signal.SIGINT:
                command = continuing_command()
                how = f"; continue with: {command}" if command else "."
                end_process(f"ended at once{how}", EXIT_INTERRUPTED)
            else:
                asked |= number[0] in (signal.SIGINT, signal.SIGTERM)


def _repeat_swallowed(found: Any) -> None:
    """Interrupt again where Python prints what is raised and goes on: in hooks of a fork, such as
    logging's, and in destructors."""
    global _repeated
    if not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)
        return
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, _handle_sigint)
        _repeated += 1
        main = threading.main_thread().ident
        again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()


def _handle_sigint(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave_to_thread)
    raise KeyboardInterrupt


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Nothing may be raised, and its traceback printed, in the moment until the thread acts."""


def _handle_sigterm(number: int, frame: FrameType | None) -> None:
    """A polite kill (of a batch system, a container) ends as Ctrl-C does."""
    interrupted = signal.getsignal(signal.SIGINT)  # Tune has one of its own while it runs
    if not callable(interrupted):  # ignored, as shells have it for jobs in the background
        raise KeyboardInterrupt
    interrupted(signal.SIGINT, frame)
