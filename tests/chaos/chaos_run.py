"""A driver of a study in a process of its own, and whatever it has started."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agreement import ended

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """One driver of the study, from its start to its death or end."""

    out: Path
    environment: dict[str, str]
    log: Path
    trials: int
    extra: tuple[str, ...] = ()
    started: float = field(default_factory=time.time)
    working: float | None = None
    """Seconds until Ray had jobs of the study again."""

    def __post_init__(self) -> None:
        command = [
            sys.executable, str(ROOT / "launchers" / "tune_cifar.py"),
            "--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "120",
            "--epochs", "3", "--trials", str(self.trials), "--seeds", "1", "--top-k", "2",
            "--max-concurrent", "2", "--set", "baselines=[none]", "--set", "teacher=resnet8",
            "--set", "teacher_training={epochs: 1}", "--out", str(self.out), *self.extra,
        ]  # fmt: skip
        if self.began:
            command.append("--resume")
        self.before = ended(self.out)
        with open(self.log, "w") as log:
            self.driver = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=ROOT
            )

    @property
    def began(self) -> bool:
        return (self.out / "study.yaml").exists()

    def newer(self, name: str) -> bool:
        path = self.out / name
        return path.exists() and path.stat().st_mtime > self.started

    def grown(self, stage: str) -> bool:
        records = ended(self.out)
        return sum(p.startswith(stage) for p in records) > sum(
            p.startswith(stage) for p in self.before
        )

    @property
    def searched(self) -> bool:
        return sum(path.startswith("trials") for path in ended(self.out)) >= self.trials

    def stage(self) -> str:
        """Where the study is, from what is in its folder."""
        if not self.newer("study.yaml"):
            return "import"
        if not (self.out / "teacher" / "teacher.safetensors").exists():
            return "teacher"
        if self.newer("confirm.parquet"):
            return "export"
        if not self.searched:
            return "search" if self.newer(".ray") else "ray"
        if not self.newer("trials.parquet"):
            return "tables" if self.grown("trials") else "ray"
        at_work = self.newer(".ray") or (self.out / "confirm").exists()
        return "confirm" if at_work else "tables"

    def signs(self, stage: str) -> tuple[Callable[[], bool], Callable[[], bool]]:
        """Whether a stage has begun in this run, and whether it has got on in it."""
        out = self.out
        return {
            "import": (lambda: True, lambda: True),
            "teacher": (
                lambda: self.stage() == "teacher",
                lambda: self.newer("teacher/history.jsonl"),
            ),
            "ray": (
                lambda: self.newer("study.yaml") and self.stage() != "teacher",
                lambda: (out / "optuna.journal").exists() and self.stage() == "ray",
            ),
            "search": (lambda: self.newer(".ray"), lambda: self.grown("trials")),
            "tables": (
                lambda: self.newer("study.yaml") and self.searched,
                lambda: self.searched and self.newer("trials.parquet"),
            ),
            "confirm": (
                lambda: self.searched and self.newer("trials.parquet") and self.newer(".ray"),
                lambda: self.grown("confirm"),
            ),
            "export": (
                lambda: self.newer("confirm.parquet"),
                lambda: bool(list(out.glob(".best.*"))),
            ),
        }[stage]

    def wait_for(self, sign: Callable[[], bool]) -> bool:
        """Whether the sign came before the driver ended."""
        while self.driver.poll() is None:
            if self.working is None and self.newer(".ray"):
                self.working = time.time() - self.started
            if sign():
                return True
            time.sleep(0.02)
        return False

    def age(self) -> float:
        return time.time() - self.started


def check_records(run: Run, before: dict[str, bytes]) -> dict[str, bytes]:
    """The records of now, after a check that none of those before has changed or gone."""
    now = ended(run.out)
    changed = [path for path, content in before.items() if now.get(path) != content]
    assert not changed, f"records of ended runs changed: {changed}"
    return now


def processes(environment: dict[str, str]) -> dict[int, str]:
    """pid -> command line of everything that was started for this study."""
    mark = f"RAY_TMPDIR={environment['RAY_TMPDIR']}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except OSError:  # it ended meanwhile, or is not ours
            continue
    return found
