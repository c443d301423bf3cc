"""How every command runs and ends: flags, exit codes, signals, one sentence for a mistake."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from ekd_ray.cli.flags import load_plugins
from ekd_ray.errors import Interrupted, UserError, disk_full_error

EXIT_INTERRUPTED = 130
STDOUT = 1


class Command(Protocol):
    """A module `*_command`: the flags of a command, and what it does with them."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Declare the flags; loads nothing heavy, so that `--help` is quick."""

    def run(self, args: argparse.Namespace, /) -> int:
        """Do it; returns the exit code."""


def run_command(command: Command, description: str | None, **defaults: object) -> int:
    """Read the arguments of this process and run a command with them; returns its exit code.

    A shell that asks for completions gets these instead.

    Args:
        defaults: what the launcher sets that no flag does, such as the folder of its recipes.
    """
    parser = argparse.ArgumentParser(description=description)
    command.add_arguments(parser)
    parser.set_defaults(**defaults)
    if "_ARGCOMPLETE" in os.environ:
        from ekd_ray.cli.completion import complete  # needs argcomplete, an extra

        complete(parser)
    args = parser.parse_args()
    load_plugins(args)
    return command.run(args)


def run(main: Callable[[], int | None]) -> None:
    """Run a launcher's main and leave with its exit code: 0 done, 1 a check said no,
    2 the user's mistake (one sentence, no traceback), 130 interrupted or terminated."""
    signal.signal(signal.SIGTERM, _handle_sigterm)
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, Interrupted):
        print("interrupted: run the same command with --resume to continue.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        full = disk_full_error(error)
        if full is not None:
            print(f"error: {full}", file=sys.stderr)
            code = full.exit_code
        elif isinstance(error, BrokenPipeError) and _is_reader_gone():
            code = 0
        else:
            raise
    if _is_reader_gone():  # what is left for it must not fail in the last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _is_reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # errors only
    return bool(poll.poll(0))


def _handle_sigterm(number: int, frame: FrameType | None) -> None:
    """A polite kill (of a batch system, a container) ends as Ctrl-C does."""
    interrupted = signal.getsignal(signal.SIGINT)  # Tune has one of its own while it runs
    if not callable(interrupted):  # ignored, as shells have it for jobs in the background
        raise KeyboardInterrupt
    interrupted(signal.SIGINT, frame)
