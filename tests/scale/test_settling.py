"""Each state that a kill can leave, and how a continued study settles it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from test_searcher import make, suggest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.history import HISTORY
from ekd_ray.errors import UserError
from ekd_ray.results.records import FAILURE, RunRecord, read_record, trial_folder
from ekd_ray.scale import worker
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import open_study
from ekd_ray.scale.worker import RUN, TrainOptions
from ekd_ray.studies.pipeline import check_study, open_run

EPOCHS = 3


@pytest.fixture
def config() -> StudyConfig:
    return StudyConfig(
        distill=DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS),
        space={"lr": {"choices": [0.01, 0.02, 0.05]}},
        first_points=({"lr": 0.05}, {"lr": 0.02}),
        trials=2,
    )


def train(searcher: OptunaSearcher, name: str, job: RunRecord, epochs: int) -> None:
    """Leave what a worker does after so many epochs; Tune passes on all but the last."""
    rows = [{"epoch": e, "val_top1": e / 10, "seconds": 1.0} for e in range(1, epochs + 1)]
    (job.folder / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows[:-1]:
        searcher.on_trial_result(name, row)


def test_first_points_that_were_not_written_yet_come_too(
    tmp_path: Path, config: StudyConfig
) -> None:
    config = config.replace(space={"lr": {"low": 0.001, "high": 0.1}})
    open_study(tmp_path, config).enqueue_trial({"lr": 0.05})
    searcher = make(tmp_path, config)
    assert [suggest(searcher, name).config["lr"] for name in "ab"] == [0.05, 0.02]
    waiting = open_study(tmp_path, config).get_trials(states=[TrialState.WAITING])
    assert not waiting


def test_a_trial_that_is_stopped_earlier_than_it_had_come_agrees_with_the_journal(
    tmp_path: Path, config: StudyConfig
) -> None:
    first = make(tmp_path, config)
    train(first, "a", suggest(first, "a"), 3)
    second = make(tmp_path, config)
    job = suggest(second, "a")
    assert job.number == 0
    train(second, "a", job, 1)
    second.on_trial_complete("a", {})
    record = read_record(trial_folder(tmp_path, 0))
    trial = open_study(tmp_path, config).get_trials()[0]
    assert record is not None
    assert (record.status, trial.state) == ("pruned", TrialState.PRUNED)
    assert trial.intermediate_values == {row["epoch"]: row["val_top1"] for row in record.history}


@pytest.mark.parametrize("marked", [False, True])
def test_a_repeated_point_that_was_not_ended_is_not_run(
    tmp_path: Path, config: StudyConfig, marked: bool
) -> None:
    """The kill came after the point was drawn, or after it was known for a repetition."""
    searcher = make(tmp_path, config)
    train(searcher, "a", suggest(searcher, "a"), EPOCHS)
    searcher.on_trial_complete("a", {})
    study = open_study(tmp_path, config)
    study.enqueue_trial({"lr": 0.02})
    study.ask()  # the second first point
    study.enqueue_trial({"lr": 0.05})
    trial = study.ask({})
    while trial.number != 3:
        trial = study.ask()
    searcher.space(trial)
    if marked:
        trial.set_user_attr("repeats trial", 0)
    again = make(tmp_path, config)
    names = iter("bcdefg")
    jobs = []
    while isinstance(suggested := again.suggest(name := next(names)), dict):
        jobs.append(RunRecord.from_dict(suggested[RUN]))
        train(again, name, jobs[-1], EPOCHS)
        again.on_trial_complete(name, {})
    rates = [job.config["lr"] for job in jobs]
    assert 0.05 not in rates
    assert len(rates) == len(set(rates))
    ended = open_study(tmp_path, config).get_trials()[3]
    assert (ended.state, ended.value) == (TrialState.COMPLETE, 0.3)
    assert ended.user_attrs == {"repeats trial": 0}


def test_a_trial_whose_process_died_before_it_ran_begins_again_once(
    tmp_path: Path, config: StudyConfig
) -> None:
    searcher = make(tmp_path, config)
    assert [suggest(searcher, name).number for name in "ab"] == [0, 1]
    assert searcher.suggest("c") is None, "not over while a trial runs"
    searcher.on_trial_complete("a", error=True)
    begun = read_record(trial_folder(tmp_path, 0))
    assert begun is not None and begun.status == "running"
    again = suggest(searcher, "d")
    assert again.number == 0
    searcher.on_trial_complete("d", error=True)
    record = read_record(trial_folder(tmp_path, 0))
    assert record is not None
    assert record.status == "failed"
    assert "died" in str(record.reason)
    searcher.on_trial_complete("b", error=True)
    train(searcher, "e", suggest(searcher, "e"), EPOCHS)
    searcher.on_trial_complete("e")
    assert searcher.suggest("f") == "FINISHED"


def test_the_checkpoint_of_a_trial_that_has_ended_goes(tmp_path: Path, config: StudyConfig) -> None:
    first = make(tmp_path, config)
    job = suggest(first, "a")
    train(first, "a", job, EPOCHS)
    job.close("complete")
    (job.folder / CHECKPOINT).write_bytes(b"checkpoint")
    make(tmp_path, config)
    assert not (job.folder / CHECKPOINT).exists()


def test_a_reason_that_nobody_read_does_not_outlive_the_next_try(
    tmp_path: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory once, then killed: the trial is what its second try makes of it."""
    job = suggest(make(tmp_path, config), "a")
    (job.folder / FAILURE).write_text(json.dumps({"reason": "out of GPU memory"}))
    second = make(tmp_path, config)
    job = suggest(second, "a")

    def distilled(*_: Any, **__: Any) -> None:
        train(second, "a", job, EPOCHS)

    monkeypatch.setattr(worker, "distill", distilled)
    worker.train_run(job, lambda row: None, options=TrainOptions(data_root=None, threads=1))
    second.on_trial_complete("a", {})
    record = read_record(job.folder)
    assert record is not None
    assert record.status == "complete"


def test_a_folder_in_which_nothing_was_begun_is_free(tmp_path: Path, config: StudyConfig) -> None:
    """The kill came while the study's file was written."""
    config, out = check_study(config), tmp_path / "run"
    out.mkdir()
    for name in (".probe.tmp", ".study.yaml.x1y2z3a4.tmp"):
        (out / name).write_text("format")
    open_run(out, config, resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".profile").write_text("x")
    with pytest.raises(UserError, match="holds no study"):
        open_run(tmp_path / "other", config, resume=False)
