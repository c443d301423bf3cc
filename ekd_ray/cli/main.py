"""How every launcher runs and ends: exit codes, signals, one sentence for a user's mistake."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from ekd_ray.errors import Interrupted, UserError, no_space

EXIT_INTERRUPTED = 130


def run(main: Callable[[], int | None]) -> None:
    """Run a launcher's main and leave with its exit code: 0 done, 1 a check said no,
    2 the user's mistake (one sentence, no traceback), 130 interrupted or terminated."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, Interrupted):
        print("interrupted: run the same command with --resume to continue.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        full = no_space(error)
        if full is None:
            raise
        print(f"error: {full}", file=sys.stderr)
        code = full.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """A polite kill (of a batch system, a container) ends as Ctrl-C does."""
    interrupted = signal.getsignal(signal.SIGINT)  # Tune has one of its own while it runs
    if not callable(interrupted):  # ignored, as shells have it for jobs in the background
        raise KeyboardInterrupt
    interrupted(signal.SIGINT, frame)
