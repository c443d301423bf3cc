"""A real study whose driver gets SIGKILL at random moments until it is let to end.

`make chaos` kills 20 times; `make test` leaves it out, for tests/scale/test_study_run.py kills a
study as well. EKD_CHAOS_SEED draws other moments.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from agreement import check_ended, journal
from chaos_run import Run, check_records, processes

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.results import Study
from ekd_ray.scale.cluster import local_cpus

KILLS = int(os.environ.get("EKD_CHAOS_KILLS", "0"))
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not KILLS, reason="minutes: make chaos"),
]
SEED = int(os.environ.get("EKD_CHAOS_SEED", "0"))
TRIALS = max(6, 2 * KILLS)  # so that the search outlasts its kills on an idle machine, too
# Stages in the order of a study, and how often each has its turn in 20 kills.
TURNS = {"import": 2, "teacher": 2, "ray": 2, "search": 8, "tables": 2, "confirm": 3, "export": 1}
# Seconds from the sign that a stage has begun, or has got on, within which the kill comes.
WITHIN = {
    "import": (6.0, 6.0), "teacher": (4.0, 0.3), "ray": (8.0, 3.0), "search": (15.0, 1.5),
    "tables": (2.0, 1.0), "confirm": (15.0, 1.5), "export": (1.5, 0.5),
}  # fmt: skip


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


@pytest.fixture(scope="module")
def killed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed KILLS times and then ended by itself."""
    folder = tmp_path_factory.mktemp("chaos")
    out, draw = folder / "run", random.Random(SEED)
    print(f"\nEKD_CHAOS_SEED={SEED} EKD_CHAOS_KILLS={KILLS}, {TRIALS} trials, in {folder}")
    targets, count = plan(draw), 0
    records: dict[str, bytes] = {}
    while True:
        run = Run(out, environment, folder / f"driver-{count:02d}.log", TRIALS)
        landed = True
        if run.searched:  # a kill in the search will not come any more
            targets[count:] = [stage for stage in targets[count:] if stage != "search"]
        if count < len(targets):
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
        records = check_records(run, records)
        states = [trial.state.name.lower() for trial in journal(out)]
        if status == 0 and count >= len(targets):
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
    drawn = [trial for trial in Study.load(killed).records() if trial.full_run_of is None]
    assert len(drawn) == TRIALS
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
