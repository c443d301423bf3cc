"""Mistakes and machines that show in a study that runs: each row starts a Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cases import Answer, Case, Hands
from holding import ROOT, Holds, kill
from machine_cases import KIND as MACHINE
from machine_cases import WORDS
from odd_machines import FEW_FILES, PROXIES, SMALL_SHM, can_mount, on_machine, ports_taken
from picture_cases import folder, picture

from ekd_ray.results import Study

SECONDS = 300.0  # until a command must have ended
TINY = (
    "--student", "resnet8", "--epochs", "1", "--trials", "1", "--seeds", "1", "--top-k", "1",
    "--max-concurrent", "1", "--set", "precision=float32", "--set", "batch_size=4",
    "--set", "validation_fraction=0.25",
)  # fmt: skip
DIGITS = ("--dataset", "digits", "--train-subset", "40", "--method", "none", *TINY)


def begin(
    hands: Hands,
    *flags: str,
    machine: tuple[str, ...] = (),
    variables: Mapping[str, str] = {},
) -> subprocess.Popen[str]:
    """`ekd-ray tune` in a process of its own, with a Ray of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TMPDIR")}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    environment |= {"EKD_CACHE_DIR": str(hands.folder / "cache"), **variables}
    return subprocess.Popen(
        [*machine, sys.executable, "-m", "ekd_ray", "tune", *flags, "--out", "run"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=hands.folder,
    )  # fmt: skip


def end(driver: subprocess.Popen[str]) -> Answer:
    try:
        text, _ = driver.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(driver.pid)
        raise
    return Answer(driver.returncode, text)


def whole_study(*setup: str, **variables: str) -> Callable[[Hands], Answer]:
    """A study on an odd machine comes to its end."""

    def hand_in(hands: Hands) -> Answer:
        if SMALL_SHM in setup and not can_mount():
            pytest.skip("no file system can be mounted here")
        with ports_taken():
            answer = end(begin(hands, *DIGITS, machine=on_machine(*setup), variables=variables))
        if answer.code == 0:
            study = Study.load(hands.folder / "run")
            assert {run.status for run in study.records()} == {"complete"}
        return answer

    return hand_in


def fails_in_worker(error: str) -> Callable[[Hands], Answer]:
    """A teacher that answers the plan, and raises where a process of Ray asks it."""

    def hand_in(hands: Hands) -> Answer:
        (hands.folder / "tired.py").write_text(TIRED.replace("ERROR", error))
        import torch

        from ekd_ray.models import build_model

        torch.save(build_model("resnet8", 10).state_dict(), hands.folder / "teacher.pth")
        return end(
            begin(
                hands, "--plugin", "tired.py", "--dataset", "digits", "--train-subset", "40",
                "--method", "kd", "--teacher", "tired", "--teacher-weights", "teacher.pth",
                "--teacher-normalization", "half", *TINY,
            )
        )  # fmt: skip

    return hand_in


TIRED = """
import ekd_ray as ekd
import ray
from ekd_ray.models import build_model


def build_tired(num_classes):
    model = build_model("resnet8", num_classes)
    model.register_forward_pre_hook(refuse)
    return model


def refuse(*_):
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        raise ERROR


ekd.register_model("tired", build_tired)
"""


def changed_meanwhile(change: Callable[[Path], object]) -> Callable[[Hands], Answer]:
    """Pictures change when a trial is about to read them."""

    def hand_in(hands: Hands) -> Answer:
        data, holds = folder(hands), Holds(hands.folder / "holds")
        holds.arm("run", "trials/0000")
        driver = begin(hands, "--dataset", data, "--method", "none", *TINY,
                       variables=holds.variables)  # fmt: skip
        try:
            held = holds.wait(driver, SECONDS)
            assert held, driver.communicate()
            change(hands.folder / "pets")
            held.release()
            return end(driver)
        finally:
            kill(driver.pid)

    return hand_in


def one_more(pets: Path) -> None:
    (pets / "train" / "cat" / "new.jpg").write_bytes(picture(999))


def overwritten(pets: Path) -> None:
    """Of the same size, so that its file looks as before; whoever decodes it notices."""
    for path in (pets / "train").glob("*/*.jpg"):
        stamp = path.stat()
        path.write_bytes(b"<html>".ljust(stamp.st_size))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


CASES = [
    Case(MACHINE, "a study with few open files, LANG=C, no HOME, a proxy, and Ray's ports taken",
         whole_study(FEW_FILES, HOME="/dev/null/home", LANG="C", LC_ALL="C", **PROXIES), 0,
         ("bundle",), slow=True),
    Case(MACHINE, "a study with a /dev/shm of 64 MB", whole_study(SMALL_SHM), 0, ("bundle",),
         slow=True),
    Case(WORDS, "a UserError in a trial", fails_in_worker(
         'ekd.UserError("the licence has ended: renew it.")'), 2, ("the licence has ended",),
         slow=True),
    Case("teacher", "it fails in a process of Ray", fails_in_worker(
         'RuntimeError("teacher is tired")'), 2, ("teacher is tired",), slow=True),
    Case("data", "a picture more, between plan and trial", changed_meanwhile(one_more), 2,
         ("other data", "fingerprint", "--resume"), slow=True),
    Case("pictures", "written over between plan and trial", changed_meanwhile(overwritten), 2,
         ("jpg", "replace the file"), slow=True),
]  # fmt: skip
