"""A real study whose driver gets SIGKILL at random moments until it is let to end.

`make chaos` kills 20 times; `make test` leaves it out, for tests/scale/test_study_run.py kills a
study as well. EKD_CHAOS_SEED draws other moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from agreement import check_ended, ended, journal

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.results import Study
from ekd_ray.scale.cluster import local_cpus

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]
SEED = int(os.environ.get("EKD_CHAOS_SEED", "0"))
TRIALS = max(6, KILLS - 4)
# Stages in the order of a study, and how often each has its turn in 20 kills.
TURNS = {"import": 2, "teacher": 2, "ray": 2, "search": 8, "tables": 2, "confirm": 3, "export": 1}
# Seconds from the sign that a stage has begun, or has got on, within which the kill comes.
WITHIN = {
    "import": (6.0, 6.0), "teacher": (4.0, 0.3), "ray": (8.0, 3.0), "search": (15.0, 1.5),
    "tables": (2.0, 1.0), "confirm": (15.0, 1.5), "export": (1.5, 0.5),
}  # fmt: skip


@dataclass
class Run:
    """One driver of the study, from its start to its death or end."""

    out: Path
    environment: dict[str, str]
    log: Path
    trials: int = TRIALS
    started: float = field(default_factory=time.time)
    working: float | None = None
    """Seconds until Ray had jobs of the study again."""

    def __post_init__(self) -> None:
        command = [
            sys.executable, str(ROOT / "launchers" / "tune_cifar.py"),
            "--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "120",
            "--epochs", "3", "--trials", str(self.trials), "--seeds", "1", "--top-k", "2",
            "--max-concurrent", "2", "--set", "baselines=[none]", "--set", "teacher=resnet8",
            "--set", "teacher_training={epochs: 1}", "--out", str(self.out),
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
        """That a stage has begun in this run, and that it has got on in it."""
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


def plan(draw: random.Random) -> list[str]:
    """The stages to kill in, as far as possible in the order in which a study passes them.

    Every continuation imports and starts Ray again, so that these have their turns anywhere.
    """
    turns = [stage for stage, count in TURNS.items() for _ in range(count)]
    order = {stage: float(index) for index, stage in enumerate(TURNS)}
    chosen = [turns[i % len(turns)] for i in draw.sample(range(max(KILLS, len(turns))), KILLS)]
    late = {"import": (0, 6), "ray": (1.5, 6)}
    return [
        stage
        for _, stage in sorted(
            (draw.uniform(*late.get(s, (order[s], order[s]))), s) for s in chosen
        )
    ]


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


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A folder of Ray's own, so that the study's processes are known by it, and its cache."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds Ray's processes through /proc")
    folder = Path(tempfile.mkdtemp(prefix="ekd"))  # sockets want a short path
    yield {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "EKD_CACHE_DIR": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    for pid in processes({"RAY_TMPDIR": str(folder)}):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def killed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed KILLS times and then ended by itself."""
    folder = tmp_path_factory.mktemp("chaos")
    out, draw = folder / "run", random.Random(SEED)
    print(f"\nEKD_CHAOS_SEED={SEED} EKD_CHAOS_KILLS={KILLS}, {TRIALS} trials, in {folder}")
    targets, count = plan(draw), 0
    records: dict[str, bytes] = {}
    while True:
        run = Run(out, environment, folder / f"driver-{count:02d}.log")
        landed = True
        if count < KILLS:
            kind = draw.randrange(2)
            delay = draw.uniform(0, WITHIN[targets[count]][kind])
            landed = run.wait_for(run.signs(targets[count])[kind])
            until = run.age() + delay
            run.wait_for(lambda run=run, until=until: run.age() >= until)
            stage = run.stage()
            run.driver.kill()
        else:
            run.wait_for(lambda: False)
        status = run.driver.wait()
        now = ended(out)
        changed = [path for path, content in records.items() if now.get(path) != content]
        assert not changed, f"records of ended runs changed: {changed}"
        records = now
        states = [trial.state.name.lower() for trial in journal(out)]
        if status == 0 and count >= KILLS:
            print(
                f"ended by itself after {run.age():.1f} s, at work after {run.working or 0:.1f} s"
            )
            return out
        assert status in (0, -signal.SIGKILL), run.log.read_text()
        if status == 0:  # it was too quick for this one: a finished study is continued, too
            print(f"  (ended before the kill for {targets[count]!r} came: once more)")
            continue
        count += 1
        print(
            f"kill {count}: {run.age():5.1f} s, during {stage} (aimed at {targets[count - 1]}"
            f"{'' if landed else ', not seen'}), at work after {run.working or 0:.1f} s; "
            f"{len(records)} records, "
            + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)),
            flush=True,
        )


def test_everything_agrees_after_the_kills(killed: Path) -> None:
    assert len(Study.load(killed).records()) == TRIALS
    check_ended(killed)
    assert all(record.status in ("complete", "pruned") for record in Study.load(killed).records())


def test_nothing_of_a_killed_driver_runs_on(killed: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 120
    while (left := processes(environment)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def metrics(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_trials_and_teacher_are_what_undisturbed_runs_give(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    study = Study.load(killed)
    settings = study.config.teacher_training or {}
    config = teacher_config(study.config.distill, str(study.config.distill.teacher), settings)
    # Threads are part of what a run's bits depend on.
    train_teacher(config, tmp_path / "teacher.safetensors", threads=local_cpus())
    torch.set_num_threads(1)
    written = (killed / "teacher" / "teacher.safetensors").read_bytes()
    assert (tmp_path / "teacher.safetensors").read_bytes() == written

    records = study.records()
    by_length = sorted(records, key=lambda record: len(record.history))
    for record in (by_length[0], by_length[-1]):
        alone = distill(DistillConfig.from_dict(record.config), threads=1)
        length = len(record.history)
        assert metrics(alone.history)[:length] == metrics(record.history), record.number


def test_killed_workers_cost_no_trial(environment: dict[str, str], tmp_path: Path) -> None:
    """All of them at once, one of which may just have been handed from trial to trial."""
    run = Run(tmp_path / "run", environment, tmp_path / "driver.log", trials=4)
    assert run.wait_for(lambda: run.grown("trials")), run.log.read_text()
    for pid, name in processes(environment).items():
        if name.startswith("ray::ImplicitFunc"):
            os.kill(pid, signal.SIGKILL)
    assert run.driver.wait() == 0, run.log.read_text()
    check_ended(run.out)
    statuses = [record.status for record in Study.load(run.out).records()]
    assert set(statuses) <= {"complete", "pruned"}, statuses
    assert json.loads((run.out / "best" / "metrics.json").read_text())["model"]["test_top1"]
