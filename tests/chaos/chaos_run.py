"""A driver of a study in a process of its own, and what is checked of its study."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agreement import check_ended, ended
from holding import LIMIT, ROOT, Held, Holds, kill
from kill_tally import TALLY

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.results import Study

# On a machine that is too busy for a Ray; a driver that has none begins nothing, and is no kill.
NO_RAY, STARTS = ("Ray did not start in time", "cannot join the Ray cluster"), 4


class Forks:
    """Starts commands as forks of a process that has imported what they need; one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        script = str(Path(__file__).with_name("forked_command.py"))
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=environment, cwd=ROOT,
        )  # fmt: skip

    def start(self, words: list[str], environment: Mapping[str, str], log: Path) -> ForkedCommand:
        asked = {"log": str(log), "words": words, "environment": dict(environment)}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        return ForkedCommand(self.process)

    def close(self) -> None:
        kill(self.process.pid)
        self.process.wait()


class ForkedCommand:
    """As much of a `Popen` as is needed of a command that `Forks` has started."""

    def __init__(self, parent: subprocess.Popen[bytes]) -> None:
        assert parent.stdout
        self._said = parent.stdout
        self.pid, self.returncode = int(self._said.readline()), None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._said], [], [], 0)[0]:
            self.returncode = int(self._said.readline())
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code


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
    forks: Forks | None = None
    """Starts it without the time of its imports."""
    machine: tuple[str, ...] = ()
    """Words before its command: see `odd_machines`."""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        command = [str(ROOT / "launchers" / "tune_cifar.py")]
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
        self.driver: subprocess.Popen[bytes] | ForkedCommand
        if self.forks:
            self.driver = self.forks.start(command, self.environment, self.log)
            return
        with open(self.log, "w") as log:
            self.driver = subprocess.Popen(
                [*self.machine, sys.executable, *command], stdout=log, stderr=log,
                env=self.environment, cwd=ROOT,
            )  # fmt: skip

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


def start_held(start: Callable[[], Run], holds: Holds) -> tuple[Run, Held]:
    """A driver of which somebody stands at a point; one that gets no Ray is started again."""
    for _ in range(STARTS):
        run = start()
        if held := holds.wait(run.driver):
            return run, held
        if not any(said in run.log.read_text() for said in NO_RAY):
            break
    raise AssertionError(f"nobody came to {holds.armed()}: {run.log.read_text()}")


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
