"""Real processes that are held at named points and killed there, and the count of what it cost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agreement import check_ended, ended
from kill_tally import TALLY

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.results import Study

ROOT = Path(__file__).parents[2]
HOLDS = Path(__file__).with_name("holds")  # its sitecustomize.py says what a hold is
# Until a process must have come to its point, or ended: many times what it takes on a busy machine.
LIMIT = 480.0


@dataclass(frozen=True)
class Held:
    """A process that stands at a point."""

    file: Path
    pid: int
    label: str

    def release(self) -> None:
        self.file.unlink(missing_ok=True)

    def kill(self, pid: int | None = None) -> None:
        """Kill it, or another one while it stands there; what still lives may go on."""
        kill(pid or self.pid)
        self.release()


def kill(pid: int) -> None:
    """SIGKILL a process that this test has started, or a child of it; wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while time.monotonic() < until and is_alive(pid):
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Holds:
    """A folder of holds, and what stands at them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process that minds the holds, and so of all that it starts."""
        return {
            **base,
            "PYTHONPATH": f"{HOLDS}:{ROOT}",
            "EKD_HOLDS": str(self.folder),
            "PYTHONUNBUFFERED": "1",
        }

    def arm(self, point: str, *words: str, once: bool = False) -> None:
        """Hold the first process that comes to a point whose label has all of these words.

        Args:
            once: only if no process of the run that it is at was held like this before.
        """
        name = f"{point}.{next(self._names):04d}"
        new = self.folder / f"{name}.tmp"
        new.write_text(json.dumps({"words": words, "once": once}))
        new.rename(self.folder / f"{name}.armed")

    def armed(self) -> list[str]:
        return [path.read_text() for path in self.folder.glob("*.armed")]

    def clear(self) -> None:
        """Disarm all, and let go on what is held."""
        for path in self.folder.iterdir():
            if path.suffix != ".struck":
                path.unlink(missing_ok=True)

    def held(self) -> list[Held]:
        found = []
        for path in sorted(self.folder.glob("*.held")):
            with contextlib.suppress(OSError):
                said = json.loads(path.read_text())
                if "pid" in said:  # else it is about to say so
                    found.append(Held(path, said["pid"], said["label"]))
        return found

    def wait(self, driver: subprocess.Popen[Any], limit: float = LIMIT) -> Held | None:
        """The process that stands at a point; None if the driver ended and nobody came there.

        Raises:
            AssertionError: neither within the limit.
        """
        until = time.monotonic() + limit
        while time.monotonic() < until:
            over = driver.poll() is not None
            if held := self.held():
                return held[0]
            if over:
                return None
            time.sleep(0.01)
        raise AssertionError(f"nothing came to {self.armed()} in {limit:g} s")


@dataclass
class Run:
    """One driver of the study, from its start to its death or end."""

    out: Path
    environment: dict[str, str]
    log: Path
    trials: int
    extra: tuple[str, ...] = ()
    bare: bool = False
    """Continue by `--resume` and `--out` alone, with `extra`."""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        command = [sys.executable, str(ROOT / "launchers" / "tune_cifar.py")]
        if not self.bare:
            command += [
                "--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "120",
                "--epochs", "3", "--trials", str(self.trials), "--seeds", "1", "--top-k", "2",
                "--max-concurrent", "2", "--set", "baselines=[none]", "--set", "teacher=resnet8",
                "--set", "teacher_training={epochs: 2}", "--set", "precision=float32",
            ]  # fmt: skip
        command += ["--out", str(self.out), *self.extra]
        if (self.out / "study.yaml").exists():
            command.append("--resume")
        self.before = ended(self.out)
        with open(self.log, "w") as log:
            self.driver = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=ROOT
            )

    def age(self) -> float:
        return time.monotonic() - self.started

    def grown(self, stage: str) -> bool:
        """Whether a run of `trials` or `confirm` has ended since this driver began."""
        return any(path.startswith(stage) for path in ended(self.out).keys() - self.before.keys())

    def wait_for(self, sign: Callable[[], bool]) -> bool:
        """Whether the sign came before the driver ended, or the limit."""
        until = time.monotonic() + LIMIT
        while self.driver.poll() is None and time.monotonic() < until:
            if sign():
                return True
            time.sleep(0.02)
        return False

    def wait(self, limit: float = 2 * LIMIT) -> int:
        """The driver's exit code."""
        try:
            return self.driver.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {limit:g} s: {self.log.read_text()}") from None


def check_records(run: Run, before: dict[str, bytes], kind: str = "no kill") -> dict[str, bytes]:
    """The records of now, after a check that none of those before has changed or gone."""
    now = ended(run.out)
    gone = [path for path in before if path not in now]
    again = [path for path, content in before.items() if now.get(path, content) != content]
    TALLY.add(kind, lost=len(gone), repeated=len(again))
    assert not gone, f"records were lost: {gone}"
    assert not again, f"runs that had ended ran again: {again}"
    return now


def check_whole(run: Run, before: dict[str, bytes], kind: str) -> None:
    """A study that came to its end: nothing lost, repeated or failed, all tables agree."""
    assert run.wait() == 0, run.log.read_text()
    check_records(run, before, kind)
    with TALLY.watch(kind):
        check_ended(run.out)
        statuses = {record.status for record in Study.load(run.out).records()}
        assert statuses <= {"complete", "pruned"}, statuses


def check_metrics(out: Path, kind: str) -> None:
    """Every run of a study has, bit for bit, the figures of one that nobody disturbed."""
    wrong = []
    for path in sorted(ended(out)):
        record = json.loads((out / path).read_text())
        alone = distill(DistillConfig.from_dict(record["config"]), threads=1)
        history = [without_seconds(row) for row in alone.history]
        if history[: len(record["history"])] != [without_seconds(r) for r in record["history"]]:
            wrong.append(path)
    TALLY.add(kind, wrong=len(wrong))
    assert not wrong, f"other figures than undisturbed: {wrong}"


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def processes(environment: Mapping[str, str]) -> dict[int, str]:
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


@contextlib.contextmanager
def nothing_left(environment: Mapping[str, str]) -> Iterator[None]:
    """Kill what was started for a study when it is over."""
    try:
        yield
    finally:
        for pid in processes(environment):
            kill(pid)
