"""A real study whose driver gets SIGKILL at one point after the other, from its imports to its
report, and again while it recovers: `make chaos`.

At each point a process of the study, its driver or one of its workers, stands still until the
driver is dead (holds/sitecustomize.py), so that no kill comes too early or too late.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from agreement import journal
from chaos_run import (
    Forks,
    Run,
    check_metrics,
    check_records,
    check_whole,
    nothing_left,
    processes,
    start_held,
)
from clusters import cluster
from holding import Holds
from kill_tally import TALLY

from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.results import Study
from ekd_ray.scale.cluster import local_cpus

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not os.environ.get("EKD_CHAOS_KILLS"), reason="minutes: make chaos"),
]
TRIALS, MORE = 10, 2
AGAIN = "again while it recovers"
EXTENDED = "while it is extended"
# When, and at which point of the study: those of a stage are in the order in which a study passes
# them. A driver continues what the one before it has left.
COURSE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("imports", "check", ()),
    ("imports", "rename", ("study.yaml",)),
    ("teacher", "epoch", ("epoch 1.",)),
    ("teacher", "epoch", ("epoch 2.",)),
    (AGAIN, "restore", ("teacher",)),
    ("teacher", "rename", ("teacher.safetensors",)),
    (AGAIN, "begin", ("study.yaml",)),
    ("teacher", "begin", ("teacher.json",)),
    ("teacher's cache", "fill", ("part 0.",)),
    ("teacher's cache", "fill", ("part 5.",)),
    ("search", "suggest", ()),
    (AGAIN, "sweep", ()),
    ("search", "run", ("trials/",)),
    (AGAIN, "settle", ()),
    ("search", "epoch", ("trials/", "epoch 1.")),
    ("search", "rename", ("trials/", "checkpoint.pt")),
    ("search", "epoch", ("trials/", "epoch 2.")),
    (AGAIN, "restore", ("trials/",)),
    ("search", "begin", ("trials/", "result.json")),
    ("search", "rename", ("trials/", "result.json")),
    ("search", "tell", ()),
    (AGAIN, "tell", ()),
    ("search", "journal", ()),
    (AGAIN, "journal", ()),
    ("search", "epoch", ("trials/", "epoch 3.")),
    (EXTENDED, "begin", ("study.yaml",)),
    (EXTENDED, "settle", ()),
    (EXTENDED, "epoch", (f"trials/{TRIALS:04d}", "epoch 1.")),
    ("tables", "rename", ("trials.parquet",)),
    ("confirm", "epoch", ("confirm/select", "epoch 2.")),
    (AGAIN, "restore", ("confirm/select",)),
    ("confirm", "finish", ("confirm/select",)),
    ("confirm", "rename", ("confirm/select", "result.json")),
    ("confirm", "epoch", ("confirm/final", "epoch 1.")),
    ("confirm", "rename", ("confirm/final", "model.safetensors")),
    ("confirm", "rename", ("confirm/final", "result.json")),
    ("confirm", "rename", ("confirm.parquet",)),
    ("export", "rename", (".best.", "metrics.json")),
    ("export", "swap", ()),
    ("report", "report", ()),
    (AGAIN, "swap", ()),
    ("report", "rename", ("report/index.html",)),
)


def kind_of(when: str) -> str:
    return f"driver, {when}"


@pytest.fixture(scope="module")
def killed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed at each point of the course and then ended by itself."""
    folder = tmp_path_factory.mktemp("chaos")
    out, holds = folder / "run", Holds(folder / "holds")
    own = holds.environment(environment)
    records: dict[str, bytes] = {}
    extended = 0
    with nothing_left(environment), cluster() as standing:
        standing.add(cpus=2, **holds.variables)
        own |= standing.environment(**holds.variables)
        forks = Forks(own)

        def start(count: int, log: Path, **options: Any) -> Run:
            # A Ray that is there already serves five of six, while it lives: quicker, too.
            joins = count % 6 and standing.nodes[0].process.poll() is None
            where = {**own, "RAY_ADDRESS": standing.address if joins else ""}
            return Run(out, where, log, TRIALS, **options)

        for count, (when, point, words) in enumerate(COURSE, 1):
            # The first of them does not come to extend the study.
            begin = when == EXTENDED and extended < 2
            extended += when == EXTENDED
            flags = ("--extend", str(MORE)) if begin else ()
            log = folder / f"driver-{count:02d}.log"
            holds.arm(point, *words)
            # Imports are paid once: it only makes it quicker.
            quick = forks if when != "imports" else None
            driver = functools.partial(
                start, count, log, extra=flags, bare=extended > 0, forks=quick
            )
            run, held = start_held(driver, holds)
            held.kill(run.driver.pid)
            age = run.age()
            run.driver.wait()
            TALLY.add(kind_of(when), kills=1)
            records = check_records(run, records, kind_of(when))
            states = [trial.state.name.lower() for trial in journal(out)]
            said = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
            print(
                f"kill {count}: {age:5.1f} s, {when}, at {point} {' '.join(words)}; "
                f"{len(records)} records, {said}", flush=True,
            )  # fmt: skip
            if extended:
                header = yaml.safe_load((out / "study.yaml").read_text())
                assert header["study"]["trials"] == TRIALS + MORE * (extended > 1)
        forks.close()
        run = Run(out, own, folder / "last.log", TRIALS, bare=True)
        check_whole(run, records, kind_of("search"))
        print(f"ended by itself after {run.age():.1f} s", flush=True)
        deadline = time.monotonic() + 120
        while (left := processes(environment)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left, "of a killed driver something runs on"
    return out


def test_everything_agrees_after_the_kills(killed: Path) -> None:
    records = Study.load(killed).records()
    drawn = [trial for trial in records if trial.full_run_of is None]
    assert len(drawn) == TRIALS + MORE
    assert all(record.status in ("complete", "pruned") for record in records)


def test_runs_and_teacher_are_what_undisturbed_ones_give(
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
    wrong = (tmp_path / "teacher.safetensors").read_bytes() != written
    TALLY.add(kind_of("teacher"), wrong=int(wrong))
    assert not wrong
    check_metrics(killed, kind_of("search"))
