"""Searches on a real Ray: trials that diverge, whose processes die or are refused memory, and one
of two workers."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from optuna.trial import TrialState
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial
from tuned_runs import tune_with

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.files import write_json
from ekd_ray.results import Study
from ekd_ray.results.failure_log import FAILURE_LOG
from ekd_ray.results.records import (
    FAILURE,
    RESULT,
    RunRecord,
    read_record,
    single_run,
    trial_folder,
)
from ekd_ray.scale import worker
from ekd_ray.scale.cluster import connected
from ekd_ray.scale.run_list import RunList
from ekd_ray.scale.search import ObserverCallback, search
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.trial_slots import DEATH_REASON, ProcessDeaths
from ekd_ray.scale.worker import RUN, Report, TrainOptions, train_run
from ekd_ray.studies.pipeline import check_study, open_run

RATES = (0.05, 0.04, 0.03, 0.01, 0.02, 0.06)
DIES_ALWAYS, DIES_ONCE, ASKS_TOO_MUCH, DIVERGES, LIVES, BREAKS = range(len(RATES))
EPOCHS = 2
OPTIONS = TrainOptions(data_root=None, threads=1)
WORDS, SECRET, PASSWORD = "the last words of", "canary0123456789", "canary-password"


STUDY = StudyConfig(
    distill=DistillConfig(
        dataset="digits", student="resnet8", method="none", epochs=EPOCHS, batch_size=16,
        train_subset=120, lr=0.02,
    ),
    space={"lr": {"choices": list(RATES)}}, first_points=tuple({"lr": rate} for rate in RATES),
    trials=len(RATES), baselines=(), scheduler="none", max_concurrent=2,
)  # fmt: skip


STARTS = "starts"  # trial and process, in order


def perilous(job: RunRecord, report: Report) -> object:
    """A run that meets its fate when its first epoch has ended."""
    mark = job.folder.with_suffix(".died")
    with open(job.folder.parent.parent / STARTS, "a") as file:
        file.write(f"{job.number} {os.getpid()}\n")

    def fate(row: dict[str, Any]) -> None:
        said = f"{WORDS} {job.number} \x1b[2J {SECRET} s3://me:{PASSWORD}@host/bucket"
        print(said, file=sys.stderr, flush=True)
        if job.number == DIES_ALWAYS or (job.number == DIES_ONCE and not mark.exists()):
            with open(mark, "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        if job.number == ASKS_TOO_MUCH:
            torch.empty(2**50)
        if job.number == BREAKS:
            raise KeyError("surprise")
        report(row)

    # No legal rate makes a loss infinite for sure.
    rate = patch("ekd_ray.engine.distill.learning_rate", lambda *_: 1e30)
    with rate if job.number == DIVERGES else nullcontext():
        return train_run(job, fate, options=OPTIONS, checkpoint_seconds=0.0)


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    os.environ["EKD_CANARY_TOKEN"] = SECRET  # Ray's processes inherit it
    try:
        with connected():
            yield
    finally:
        del os.environ["EKD_CANARY_TOKEN"]


@pytest.fixture(scope="module")
def ended(one_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OptunaSearcher]:
    run = tmp_path_factory.mktemp("deaths") / "run"
    return run, tune_with(run, STUDY, perilous)


@pytest.mark.slow  # the tests of a trial's error below need no Ray
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "status", "reason", "deaths"),
    [
        (DIES_ALWAYS, "failed", "the trial's process died (killed, or out of memory)", 2),
        (DIES_ONCE, "complete", None, 1),
        (
            ASKS_TOO_MUCH,
            "failed",
            "out of memory with batch_size 16 (can't allocate memory: you",
            0,
        ),
        (DIVERGES, "failed", "train_loss became", 0),
        (LIVES, "complete", None, 0),
        (BREAKS, "failed", "an error of the program or of a plugin ended it: KeyError", 0),
    ],
)
def test_a_trial_has_one_process_to_spare_and_its_reason(
    ended: tuple[Path, OptunaSearcher], number: int, status: str, reason: str | None, deaths: int
) -> None:
    run, searcher = ended
    record = read_record(trial_folder(run, number))
    assert record is not None
    assert record.status == status
    assert (record.reason or "").startswith(reason or "") and bool(record.reason) == bool(reason)
    mark = trial_folder(run, number).with_suffix(".died")
    assert (len(mark.read_text()) if mark.exists() else 0) == deaths
    # One that died in epoch 2 had a checkpoint of epoch 1, whose row is there once.
    epochs = [row["epoch"] for row in record.history]
    assert epochs == {ASKS_TOO_MUCH: [1], DIVERGES: []}.get(number, [1, 2])
    trial = searcher.study.get_trials()[number]
    assert trial.state == (TrialState.FAIL if status == "failed" else TrialState.COMPLETE)
    assert trial.user_attrs.get("reason") == record.reason


@pytest.mark.slow  # the tests of a trial's error below need no Ray
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (DIES_ALWAYS, ["Ray says", "died", WORDS]),
        (ASKS_TOO_MUCH, ["out of memory", "Traceback", "RuntimeError"]),
        (DIVERGES, ["Diverged: train_loss became"]),
        (BREAKS, ["KeyError: 'surprise'", WORDS]),
        (DIES_ONCE, None),
        (LIVES, None),
    ],
)
def test_what_a_failed_trial_wrote_is_kept_in_its_folder(
    ended: tuple[Path, OptunaSearcher], launch: Any, number: int, words: list[str] | None
) -> None:
    """And `ekd-ray logs` shows it, after Ray and its folder have gone."""
    run, _ = ended
    folder = trial_folder(run, number)
    assert not list(folder.glob(".output*")), "no path of this machine is left"
    code, out, err = launch("logs", run, number)
    if words is None:
        assert not (folder / FAILURE_LOG).exists()
        assert code == 2 and "has not failed" in err
        assert f"{DIES_ALWAYS}, {ASKS_TOO_MUCH}, {DIVERGES}, {BREAKS}" in err
        return
    assert code == 0, err
    for word in [f"trial {number} failed:", *words]:
        assert word in out
    for other in {*range(len(RATES))} - {number}:
        assert f"{WORDS} {other} " not in out, "another trial of the same process"
    assert "\x1b" not in out
    kept = (folder / FAILURE_LOG).read_text()
    assert SECRET not in kept and PASSWORD not in kept
    if WORDS in words:
        assert f"{WORDS} {number} \\x1b[2J $EKD_CANARY_TOKEN s3://***@host" in out


@pytest.mark.slow  # the tests of a trial's error below need no Ray
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_of_two_workers_runs_nested(one_ray: None, tmp_path: Path) -> None:
    config = check_study(STUDY.replace(workers_per_trial=2, trials=1))
    observer = Mock()
    open_run(tmp_path / "run", config, resume=False)
    search(tmp_path / "run", config, resolve(config.distill), observer)
    (record,) = Study.load(tmp_path / "run").records()
    assert record.status == "complete"
    assert [row["epoch"] for row in record.history] == [1, 2]
    reported = [row["val_top1"] for _, row in (call.args for call in observer.epoch.mock_calls)]
    assert reported == [row["val_top1"] for row in record.history]


def test_an_error_of_the_program_is_named(tmp_path: Path) -> None:
    trial = Trial("function", stub=True)
    trial.storage = SimpleNamespace(trial_driver_staging_path=str(tmp_path))
    deaths = ProcessDeaths()
    deaths.on_step_begin(0, [trial])
    try:
        raise KeyError("surprise")
    except KeyError as error:
        trial.handle_error(RayTaskError("train", traceback.format_exc(), error))
    assert "KeyError: 'surprise'" in str(deaths.reason(trial.trial_id))
    trial.handle_error(RayActorError())
    assert deaths.reason(trial.trial_id) is None, "it died"


def test_a_run_of_the_confirm_stage_has_the_reason_too(tmp_path: Path) -> None:
    jobs = RunList([single_run(DistillConfig(), tmp_path)])
    jobs.suggest("a")
    jobs.on_trial_complete("a", {DEATH_REASON: "ended for memory"}, error=True)
    assert json.loads((tmp_path / worker.FAILURE).read_text()) == {"reason": "ended for memory"}


@pytest.mark.slow  # the tests of a trial's error below need no Ray
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_process_that_was_refused_memory_trains_no_further_trial(
    ended: tuple[Path, OptunaSearcher],
) -> None:
    starts = [
        tuple(map(int, line.split())) for line in (ended[0] / STARTS).read_text().splitlines()
    ]
    begun = [index for index, (number, _) in enumerate(starts) if number == ASKS_TOO_MUCH]
    assert len(begun) == 2, "once to meet it, once to say so"
    first, again = (starts[index][1] for index in begun)
    assert first not in [process for _, process in starts[begun[0] + 1 :]]
    assert again != first


@pytest.mark.parametrize("stage", [RunStage.SELECT, RunStage.SEARCH, RunStage.SINGLE])
def test_memory_that_is_refused_ends_the_process_and_then_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: RunStage
) -> None:
    run = RunRecord(folder=tmp_path, stage=stage, name="x", config=DistillConfig().to_dict())
    asked = []

    def refused(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(worker, "student_costs", lambda *_: {})
    monkeypatch.setattr(worker, "distill", refused)
    with pytest.raises(MemoryError, match=r"2\.00 GiB"):
        train_run(run, print, options=OPTIONS)
    assert not (tmp_path / RESULT).exists()
    assert train_run(run, print, options=OPTIONS) is None, "in the process that replaced it"
    reason = json.loads((tmp_path / worker.FAILURE).read_text())["reason"]
    assert "out of GPU memory with batch_size 64" in reason and asked == [1]
    # The driver records a trial of the search; a single run may be tried again.
    record = read_record(tmp_path)
    assert (record is not None) == (stage is RunStage.SELECT)
    assert record is None or (record.status, record.reason) == ("failed", reason)


@pytest.mark.parametrize(
    ("left", "said"), [(RESULT, "diverged"), (FAILURE, "no memory"), (None, None)]
)
def test_a_trial_that_begins_again_is_not_said_to_have_failed(
    tmp_path: Path, left: str | None, said: str | None
) -> None:
    run = RunRecord(folder=tmp_path, stage=RunStage.SEARCH, name="trial 3", number=3)
    trial, ended = SimpleNamespace(config={RUN: run.to_dict()}), []
    observer: Any = SimpleNamespace(ended=lambda number, failure: ended.append((number, failure)))
    callback = ObserverCallback(observer)
    callback.on_trial_error(0, [], trial)
    assert ended == []
    if left == RESULT:
        run.close("failed", reason=said)
    elif left:
        write_json(tmp_path / left, {"reason": said})
    callback.on_trial_error(0, [], trial)
    assert ended == [(3, said)] * bool(left)
    callback.on_trial_complete(0, [], trial)
    assert ended[-1] == (3, said if left == FAILURE else None), "one that diverged ends so"
