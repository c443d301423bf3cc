"""The cost of a study of many trials: its driver by report, `show`, the report, a resume.

python -m benchmarks.run crowd --json out.json

The recorded trials are made up, with all files that real ones leave but TensorBoard's. From there
on searcher, scheduler, journal, records and the live view are the real ones, driven as Tune drives
them, many trials at once; Ray is not beneath them.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState

from benchmarks.overhead import SPACE
from ekd_ray.cli.console import Console
from ekd_ray.cli.terminal import Terminal
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import (
    JOURNAL,
    REPORT,
    RunRecord,
    milestone_epochs,
    trial_folder,
    trial_name,
)
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.scale.schedulers import ARRIVALS, Chance, make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.space import Space, point_config
from ekd_ray.scale.storage import open_study, write_together
from ekd_ray.scale.worker import RUN
from ekd_ray.studies.pipeline import check_study, open_run

COUNTS = (100, 1000, 5000)
EPOCHS, SLOTS, DRIVEN, REPEATS = 30, 32, 120, 5
CHANCE = Chance(classes=10, images=200)


def study_config(trials: int, sampler: str = "tpe") -> StudyConfig:
    """A study of digits, five searched parameters, ASHA."""
    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS)
    return check_study(
        StudyConfig(distill=base, space=SPACE, trials=trials, sampler=sampler, baselines=())
    )


def score(params: dict[str, Any], epoch: int) -> float:
    """The made-up accuracy after an epoch: a rate of 0.01 is best, the rest moves it a little."""
    distance = abs(math.log(params["lr"] / 0.01)) + abs(params["momentum"] - 0.9)
    return 0.98 / (1 + 0.2 * distance) * (1 - 0.5 / (1 + epoch))


def length(number: int, rungs: Sequence[int]) -> int:
    """The epochs of a trial: half of them stop at the first rung, a quarter at each other."""
    return rungs[max(0, number % 4 - 1)]


def epoch_row(params: dict[str, Any], epoch: int) -> dict[str, Any]:
    """A row of a history with the columns of a real one."""
    value = score(params, epoch)
    return {
        "epoch": epoch, "lr": params["lr"], "train_loss": 1.5 - value, "train_top1": value,
        "loss_ce": 1.5 - value, "val_loss": 1.6 - value, "val_top1": value,
        "val_top5": min(1.0, value + 0.1), "val_nll": 1.6 - value, "val_ece": 0.1 * (1 - value),
        "val_brier": 1 - value, "seconds": 1.5 + 0.001 * epoch,
    }  # fmt: skip


def record_study(run: Path, config: StudyConfig, trials: int, *, seed: int = 0) -> None:
    """Make a study's folder with so many ended trials: journal, records, settings, comparisons."""
    open_run(run, config, resume=False)
    base, rungs = resolve(config.distill), milestone_epochs(config)
    study, space = open_study(run, config), Space(config.space)
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
    with write_together(study):
        for number in range(trials):
            trial = study.ask()
            point = space(trial)
            epochs = length(number, rungs)
            record = RunRecord(
                folder=trial_folder(run, number), stage=RunStage.SEARCH, name=trial_name(number),
                number=number, config=point_config(base, point).to_dict(), params=point,
            )  # fmt: skip
            record.write_config()
            rows = [epoch_row(point, epoch) for epoch in range(1, epochs + 1)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (record.folder / HISTORY).write_text(lines, encoding="utf-8")
            for row in rows:
                trial.report(row["val_top1"], row["epoch"])
            full = epochs == EPOCHS
            record.close("complete" if full else "pruned")
            state = TrialState.COMPLETE if full else TrialState.PRUNED
            study.tell(trial, rows[-1]["val_top1"] if full else None, state=state)
    make_scheduler(
        config, chance=CHANCE, records=StudyReader.load(run).records(), log=run / ARRIVALS
    )


class Driver:
    """The driver of a study that has recorded trials: what is computed at every event of Tune's."""

    def __init__(self, run: Path, config: StudyConfig) -> None:
        base = resolve(config.distill)
        self.searcher = OptunaSearcher(run, config, base)
        records = self.searcher.records()
        self.scheduler = make_scheduler(config, chance=CHANCE, records=records, log=run / ARRIVALS)
        self.searcher.end_stopped(self.scheduler.stopped)
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        self.terminal = Terminal(rungs=milestone_epochs(config), shown=SPACE, console=console)
        self.terminal.stage("search", config.trials, EPOCHS)
        for record in records:  # as a driver that has seen all of them
            assert record.number is not None
            self.terminal.started(record.title, record.number, record.config)
            self.terminal.epoch(record.number, record.last)
            self.terminal.ended(record.number, failure=None)
        self.rungs = milestone_epochs(config)
        self.spent: dict[str, float] = defaultdict(float)  # processor seconds by kind of event
        self.reports = 0

    def drive(self, trials: int) -> None:
        """Run so many further trials, `SLOTS` of them at once."""
        running: deque[tuple[str, RunRecord, Iterator[dict[str, Any]]]] = deque()
        begun = 0
        while running or begun < trials:
            while begun < trials and len(running) < SLOTS:
                running.append(self._begin(f"t{begun}"))
                begun += 1
            trial_id, run, rows = running.popleft()
            if self._report(trial_id, run, next(rows)):
                running.append((trial_id, run, rows))

    def _begin(self, trial_id: str) -> tuple[str, RunRecord, Iterator[dict[str, Any]]]:
        with self._timed("draw"):
            suggested = self.searcher.suggest(trial_id)
            assert isinstance(suggested, dict)
            run = RunRecord.from_dict(suggested[RUN])
            assert run.number is not None
            self.terminal.started(run.title, run.number, run.config)
        epochs = length(run.number, self.rungs)
        return trial_id, run, (epoch_row(run.config, epoch) for epoch in range(1, epochs + 1))

    def _report(self, trial_id: str, run: RunRecord, row: dict[str, Any]) -> bool:
        """Pass a row on; whether the trial goes on."""
        assert run.number is not None
        with open(run.folder / HISTORY, "a", encoding="utf-8") as history:  # as a trial does
            history.write(json.dumps(row) + "\n")
        trial = SimpleNamespace(config={RUN: {"number": run.number}}, trial_id=trial_id)
        self.reports += 1
        with self._timed("report"):
            self.terminal.epoch(run.number, row)
            # What it answers depends on what the sampler finds: not heeded, so that all studies
            # have as many reports.
            self.scheduler.on_trial_result(None, trial, row)
            if row["epoch"] < length(run.number, self.rungs):
                self.searcher.on_trial_result(trial_id, row)
                return True
        with self._timed("end"):
            self.searcher.on_trial_complete(trial_id, row)
            self.scheduler.on_trial_complete(None, trial, row)
            self.terminal.ended(run.number, failure=None)
        return False

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        before = time.thread_time()  # of the thread that Tune runs in
        yield
        self.spent[name] += time.thread_time() - before


def drive_study(run: Path, sampler: str) -> dict[str, float]:
    """Resume a study and drive `DRIVEN` further trials; what the driver spent on them.

    Returns:
        `resume_seconds` until the first trial is drawn, the import of the libraries not among
        them; processor time of the driver in milliseconds by report, by draw and by end of a
        trial; `memory_mb` at most.
    """
    recorded = StudyReader.load(run)
    config = study_config(recorded.config.trials + 2 * DRIVEN, sampler)
    began = time.perf_counter()
    open_run(run, config, resume=True)
    driver = Driver(run, config)
    driver.drive(1)
    resumed = time.perf_counter() - began
    driver.drive(SLOTS)  # the sampler's models are built
    driver.spent.clear()
    driver.reports = 0
    before = time.perf_counter()
    driver.drive(DRIVEN)
    driver.terminal.close()
    return {
        "resume_seconds": resumed,
        "ms_per_report": 1e3 * sum(driver.spent.values()) / driver.reports,
        "wall_ms_per_report": 1e3 * (time.perf_counter() - before) / driver.reports,
        "reports": driver.reports,
        **{f"ms_per_trial_{name}": 1e3 * spent / DRIVEN for name, spent in driver.spent.items()},
        "memory_mb": peak_memory(),
    }


def peak_memory() -> float:
    """The most MB of memory that this process has had, shared libraries among them.

    `getrusage` would count the process from which it was started as well.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _in_own_process(*command: str) -> tuple[float, str]:
    """(seconds of a command, its imports included, and what it printed)."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, done.stdout


def measure(
    folder: Path, note: Callable[[str], None], counts: Sequence[int] = COUNTS, sampler: str = "tpe"
) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures by number of recorded trials, ratios of the largest study to the smallest).

    A machine is now faster and now slower: the drivers of all sizes are measured by turns,
    `REPEATS` times, each on a copy of its study, and so is `show`; the figures are medians. The
    report is made once.
    """
    found: dict[str, dict[str, float]] = {}
    for count in counts:
        run = folder / f"crowd-{count}"
        began = time.perf_counter()
        record_study(run, study_config(count), count)
        note(f"crowd: {count} trials recorded in {time.perf_counter() - began:.0f} s")
    driven: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(REPEATS):
        for count in counts:
            copied = folder / "driven"
            shutil.copytree(folder / f"crowd-{count}", copied)
            _, said = _in_own_process("-m", "benchmarks.crowd", str(copied), sampler)
            driven[count].append(json.loads(said))
            shutil.rmtree(copied)
    for count in counts:
        run = folder / f"crowd-{count}"
        shows = [_in_own_process("-m", "ekd_ray", "show", str(run))[0] for _ in range(REPEATS)]
        report, _ = _in_own_process("-m", "ekd_ray", "report", str(run))
        runs = driven[count]
        found[str(count)] = {
            "show_seconds": statistics.median(shows), "report_seconds": report,
            "report_mb": (run / REPORT).stat().st_size / 1e6,
            "journal_mb": (run / JOURNAL).stat().st_size / 1e6,
            **{name: statistics.median(one[name] for one in runs) for name in runs[0]},
        }  # fmt: skip
        note(f"crowd: {count} {found[str(count)]}")
    costs = {count: [one["ms_per_report"] for one in runs] for count, runs in driven.items()}
    ratios = [b / a for a, b in zip(costs[counts[0]], costs[counts[-1]], strict=True)]
    setup = {"epochs": EPOCHS, "slots": SLOTS, "driven": DRIVEN, "sampler": sampler,
             "repeats": REPEATS}  # fmt: skip
    return {"setup": setup, "ratios_by_turn": ratios, **found}, {
        f"driver_ms_per_report/{counts[-1]}_over_{counts[0]}": statistics.median(ratios)
    }


if __name__ == "__main__":
    print(json.dumps(drive_study(Path(sys.argv[1]), sys.argv[2])))
