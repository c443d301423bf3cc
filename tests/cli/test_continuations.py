"""A command that is stopped names the one that goes on, and that one can be pasted."""

from __future__ import annotations

import contextlib
import errno
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchers_run import DIGITS, command, forked

from ekd_ray.cli.single_run import _command_with
from ekd_ray.config import DistillConfig
from ekd_ray.errors import Interrupted
from ekd_ray.scale import cluster
from ekd_ray.scale.trainer import Workers
from ekd_ray.studies import pipeline, training

TEACHER = ("--dataset", "digits", "--model", "resnet8", "--epochs", "1")
# Of each: the command, and the function in which it is stopped.
STOPPED = {
    "a study": ("tune", DIGITS, pipeline, "run_study"),
    "a launcher": ("tune_cifar", (*DIGITS, "--trials", 3), pipeline, "run_study"),
    "several studies": ("tune", (*DIGITS, "--methods", "kd,none"), pipeline, "run_study"),
    "the quickstart": ("quickstart", (), pipeline, "run_study"),
    "a teacher": ("train-teacher", TEACHER, training, "_train"),
    "a student": ("distill", (*DIGITS, "--method", "none"), training, "_train"),
    "the teacher of a student": ("distill", DIGITS, training, "teach"),
}


@pytest.fixture
def stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a function of a module raise an error, and note in a file that it was reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)

    # Several studies join their cluster at first.
    monkeypatch.setattr(cluster, "connected", lambda *configs, **_: contextlib.nullcontext())

    def patch(module: Any, function: str, error: BaseException) -> None:
        def stopped(subject: Any, *rest: Any) -> None:
            with open(tmp_path / "reached", "a") as file:
                file.write(f"{getattr(subject, 'path', function)}\n")
            raise error

        monkeypatch.setattr(module, function, stopped)

    return patch


def paste(line: str) -> tuple[int, str]:
    """Run a printed command as a shell would; returns its exit code and what it says."""
    program, *words = shlex.split(line)
    name = Path(words.pop(0)).stem if program == "python" else words.pop(0)
    done = forked(name, *words)
    return done.returncode, done.stderr


@pytest.mark.parametrize("what", STOPPED)
def test_the_command_of_an_interrupt_goes_on(what, stop, tmp_path) -> None:
    name, flags, module, function = STOPPED[what]
    stop(module, function, Interrupted())
    done = forked(name, *flags, "--out", "my runs/one", "--quiet")
    line = re.search(r"interrupted; continue with: (.*)", done.stderr)[1]
    code, err = paste(line)
    assert (done.returncode, code) == (130, 130), err
    assert f"continue with: {line}" in err, "and once more"
    first, second = (tmp_path / "reached").read_text().splitlines()
    assert first == second


def test_no_folder_need_be_given(stop, tmp_path) -> None:
    stop(pipeline, "run_study", Interrupted())
    done = forked("tune", *DIGITS, "--quiet")
    assert paste(done.stderr.partition("continue with: ")[2])[0] == 130
    stop(training, "_train", Interrupted())
    done = forked("train-teacher", *TEACHER, "--quiet")
    assert paste(done.stderr.partition("continue with: ")[2])[0] == 130
    assert len((tmp_path / "reached").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "poor"), [("1e-6", True), ("0.05", False)])
def test_a_teacher_that_may_guess_is_called_so(rate, poor, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (*TEACHER[:-1], "6", "--train-subset", "600", "--set", f"lr={rate}", "--quiet")
    done = command("train-teacher", *flags, "--set", "validation_fraction=0.5")
    assert done.returncode == 0, done.stderr
    assert ("no better than chance" in done.stderr) == poor


def test_a_full_disk_names_the_command_too(stop) -> None:
    stop(pipeline, "run_study", OSError(errno.ENOSPC, "no space", "there"))
    done = forked("tune", *DIGITS, "--quiet", "--out", "runs/one")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    line = re.search(r"free some, then run `(.*)`; what was finished", done.stderr)[1]
    code, err = paste(line)
    assert code == 2 and err.endswith(done.stderr)


@pytest.mark.parametrize(
    ("student", "size", "words"),
    [
        ("resnet20", 32, "--pair resnet20-resnet8"),
        ("resnet20", 24, "--set image_size=24 --pair resnet20-resnet8"),
        ("resnet56", 32, "--teacher resnet56 --student MODEL"),
    ],
)
def test_a_teacher_comes_with_the_command_that_uses_it(student: str, size: int, words: str) -> None:
    config = DistillConfig(dataset="digits", student=student, image_size=size, method="none")
    one = training.Training(
        config=config, out=Path("runs"), workers=Workers(least=1, most=1, cpus=1, gpus=0)
    )
    command = _command_with(Path("t.safetensors"), one)
    assert command == f"ekd-ray tune --dataset digits {words} --teacher-weights t.safetensors"
