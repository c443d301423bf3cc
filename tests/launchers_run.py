"""Launchers and commands as processes of their own, and the parsers that they build."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import ekd_ray
from ekd_ray.cli import main
from ekd_ray.cli.help_text import HelpParser

LAUNCHERS = Path(ekd_ray.__file__).parent.parent / "launchers"
TRAINS = "a fork trains nothing: run it with `command`"
DIGITS = ("--dataset", "digits", "--pair", "resnet20-resnet8")


def command(name, *argv):
    """A launcher (`tune_cifar`) or a command of `ekd-ray` (`tune`) in its own process."""
    launcher = LAUNCHERS / f"{name}.py"
    start = [str(launcher)] if launcher.exists() else ["-m", "ekd_ray", name]
    return subprocess.run(
        [sys.executable, *start, *argv],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def forked(name: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """As `command`, in a copy of this process: what it registers stays there, and nothing is
    imported again. For commands that start no Ray and train nothing."""
    # Of a plan, and of its count of FLOPs: seconds in each copy, were they not here.
    for module in ("torch._dynamo", "ekd_ray.studies.training", "ekd_ray.cli.single_run"):
        importlib.import_module(module)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            code: object = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                os.environ |= {"COLUMNS": "200", "NO_COLOR": "1"}
                # The threads of OpenMP that an earlier test began are not in the copy, which would
                # wait for them. Those of autograd would end it, after some tests and not others.
                with (
                    mock.patch("torch.set_num_threads"),
                    mock.patch("torch.autograd.backward", side_effect=AssertionError(TRAINS)),
                ):
                    run_here(name, *argv)
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(
        [name, *map(str, argv)], os.waitstatus_to_exitcode(status), *texts
    )


def parser_of(launcher: Path) -> HelpParser:
    """The parser that a launcher builds."""
    with mock.patch.object(main, "main") as called:
        runpy.run_path(str(launcher), run_name="__main__")
    return main.command_parser(*called.call_args.args, defaults=called.call_args.kwargs)


def run_here(name: str, *argv: object) -> None:
    """A launcher or a command of `ekd-ray` in this process, which it ends with `SystemExit`."""
    launcher = LAUNCHERS / f"{name}.py"
    known = launcher.exists()
    words = [str(launcher) if known else "ekd-ray", *([] if known else [name]), *map(str, argv)]
    with mock.patch.object(sys, "argv", words):
        if known:
            runpy.run_path(str(launcher), run_name="__main__")
        else:
            main.main()
