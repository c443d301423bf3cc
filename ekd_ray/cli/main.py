# PYTHON_ARGCOMPLETE_OK
"""`ekd-ray`: the table of commands, and how every one runs and ends: flags, exit codes, one
sentence for a mistake.

A command's module is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import select
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ekd_ray.cli.help_text import HelpParser, all_actions
from ekd_ray.cli.interrupts import describe_interrupt, handle_interrupts
from ekd_ray.cli.output import print_text
from ekd_ray.errors import (
    EXIT_INTERRUPTED,
    Interrupted,
    UserError,
    halting_error,
    unknown_name,
    user_error,
)

STDOUT, STDERR = 1, 2
PACKAGE = Path(__file__).parents[1]

# Title -> command -> (module, one line of help).
GROUPS = {
    "begin": {
        "quickstart": ("quickstart_command", "a whole study on handwritten digits, in minutes"),
        "doctor": ("doctor_command", "what there is to compute with, and whether it works"),
    },
    "train": {
        "tune": ("tune_command", "search the best distillation, confirm and export it"),
        "distill": ("distill_command", "one student from one teacher, without a search"),
        "train-teacher": ("teacher_command", "a teacher, or any network alone"),
        "join-teachers": ("join_command", "several teachers as one, an ensemble"),
    },
    "look": {
        "show": ("show_command", "a study in the terminal, running or finished"),
        "report": ("report_command", "a study as a page of HTML"),
        "compare": ("compare_command", "several studies in one table"),
        "logs": ("logs_command", "why a trial or another run failed, and what it wrote"),
    },
    "use": {
        "export": ("export_command", "the winner as a folder: weights, configuration, evidence"),
        "evaluate": (
            "evaluate_command",
            "an exported winner's figures, its uncertainty among them",
        ),
        "predict": ("predict_command", "pictures with an exported winner, as a table"),
        "reproduce": ("reproduce_command", "train an exported winner again, and compare"),
        "portfolio": ("portfolio_command", "what is good for all studies at hand, for a new one"),
    },
    "prepare": {
        "space": ("space_command", "recipes and search spaces: list, show, copy, schema"),
        "cache": ("cache_command", "the teacher's cached answers: list, fill, verify, remove"),
        "cluster": ("cluster_command", "what a Ray cluster lacks, before a study is sent there"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}
_EXAMPLES = (
    "ekd-ray quickstart",
    "ekd-ray tune --pair resnet56-resnet20 --teacher-weights FILE --data-root data",
)


class Command(Protocol):
    """A module `*_command`: the flags of a command, and what it does with them.

    The first paragraph of its docstring describes it in the help.
    """

    EXAMPLES: Sequence[str]  # command lines, which its help begins with
    FIRST: Sequence[str]  # the flags that `--help` shows where not all fit on a screen

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Declare the flags; loads nothing heavy, so that `--help` is quick."""

    def run(self, args: argparse.Namespace, /) -> int:
        """Do it; returns the exit code."""


def main(command: str | None = None, **defaults: object) -> None:
    """Run what this process's arguments say, and leave with its exit code.

    Args:
        command: the one command of a launcher; None for `ekd-ray`, whose first argument names it.
        defaults: what the launcher sets that no flag does, such as the folder of its recipes.
    """
    try:
        run(lambda: run_command(sys.argv[1:], command, **defaults))
    except SystemExit as left:
        if left.code == EXIT_INTERRUPTED:
            # Without taking modules apart: on a busy machine torch's take a minute, in which
            # nobody hears another Ctrl-C.
            atexit._run_exitfuncs()
            os._exit(EXIT_INTERRUPTED)
        raise


def run_command(argv: Sequence[str], name: str | None, **defaults: object) -> int:
    """Run a command with these arguments; returns its exit code.

    A shell that asks for completions gets these instead.
    """
    if "_ARGCOMPLETE" in os.environ:
        from ekd_ray.cli.completion import complete  # needs argcomplete, an extra

        complete(root_parser() if name is None else command_parser(name, defaults=defaults))
    if name is not None:
        prog, typed = Path(sys.argv[0]).name, ("python", sys.argv[0], *argv)
    else:
        if not argv or argv[0].startswith("-"):
            return _answer(argv[0] if argv else "--help")
        typed = ("ekd-ray", *argv)
        name, *argv = argv
        prog = f"ekd-ray {name}"
    args = command_parser(name, prog, defaults).read(argv)
    args.typed = typed
    from ekd_ray.cli.flags import load_plugins  # the help of all commands does without

    load_plugins(args)
    return load_command(name).run(args)


def load_command(name: str) -> Command:
    """The module of a command; `UserError` for an unknown name."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command: Command = importlib.import_module(f"ekd_ray.cli.{COMMANDS[name][0]}")
    return command


def command_parser(
    name: str, prog: str | None = None, defaults: Mapping[str, Any] | None = None
) -> HelpParser:
    """The parser of a command alone."""
    parser = _fill(HelpParser(prog=prog or f"ekd-ray {name}"), name)
    parser.set_defaults(**defaults or {})
    return parser


def root_parser() -> HelpParser:
    """The parser of all commands, for a shell's completion: it imports each of them."""
    parser = HelpParser(prog="ekd-ray")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        _fill(commands.add_parser(name, help=line), name)
    return parser


def _fill(parser: HelpParser, name: str) -> HelpParser:
    command = load_command(name)
    parser.description = (command.__doc__ or "").partition("\n\n")[0]
    command.add_arguments(parser)
    parser.examples = command.EXAMPLES
    for inner in all_parsers(parser):
        inner.first = command.FIRST
    return parser


def all_parsers(parser: HelpParser) -> list[HelpParser]:
    """A command's parser, then those of its own commands, as of `cache fill`."""
    subparsers = [a for a in all_actions(parser) if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(inner for action in subparsers for inner in action.choices.values())]


def _answer(flag: str) -> int:
    """Answer `ekd-ray` without a command; returns the exit code."""
    if flag == "--version":
        from ekd_ray import __version__

        print_text(f"ekd_ray {__version__}")
    elif flag in ("-h", "--help"):
        print_text(overview())
    elif flag == "--help-all":
        print_text(overview())
        for name in COMMANDS:
            for inner in all_parsers(command_parser(name)):
                print_text(f"\n{inner.format_help_all()}", end="")
    else:
        raise UserError(f"{flag} needs a command before it: ekd-ray COMMAND {flag}.")
    return 0


def overview() -> str:
    """The help of `ekd-ray`: examples, and the commands by what they are for."""
    lines = ["usage: ekd-ray COMMAND [flags]"]
    lines += ["", *(f"  {example}" for example in _EXAMPLES), ""]
    for title, commands in GROUPS.items():
        for index, (name, (_, text)) in enumerate(commands.items()):
            lines.append(f"{title if index == 0 else '':9s}{name:15s}{text}")
    lines += ["", "ekd-ray COMMAND --help shows what one needs first, --help-all all flags."]
    return "\n".join(lines)


def run(main: Callable[[], int | None]) -> None:
    """Run a launcher's main and leave with its exit code: 0 done, 1 a check said no,
    2 the user's mistake (one sentence, no traceback), 130 interrupted or terminated."""
    handle_interrupts()
    warnings.showwarning = _show_warning(warnings.showwarning)
    threading.excepthook = _report_in_thread
    try:
        code = main() or 0
    except (KeyboardInterrupt, Interrupted):
        print_text(describe_interrupt(), file=sys.stderr)
        code = EXIT_INTERRUPTED
    except Exception as error:
        said = user_error(error) or halting_error(error)
        if said is not None:
            print_text(f"error: {said}", file=sys.stderr)
            code = said.exit_code
        elif isinstance(error, BrokenPipeError) and (_is_gone(STDOUT) or _is_gone(STDERR)):
            code = 0
        else:
            raise
    for stream, number in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.flush()
        except BrokenPipeError:  # what is left must not fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream.flush()
    sys.exit(code)


def _show_warning(others: Callable[..., None]) -> Callable[..., None]:
    """Show warnings of ours in one line, and those of other packages as Python does."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE):
            print_text(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            others(message, category, filename, *rest)

    return show


def _report_in_thread(error: threading.ExceptHookArgs) -> None:
    """A thread that writes meets a full disk before the one that says so."""
    if error.exc_value is None or halting_error(error.exc_value) is None:
        threading.__excepthook__(error)


def _is_gone(stream: int) -> bool:
    """Whether a stream is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(stream, 0)  # errors only
    return bool(poll.poll(0))
