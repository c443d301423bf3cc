"""The searcher without a cluster: Tune's calls are made by hand."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.results.records import FAILURE, JOURNAL, RESULT, RunRecord, read_record, trial_folder
from ekd_ray.scale import search
from ekd_ray.scale.schedulers import make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import drop_unknown_trials, open_study
from ekd_ray.scale.worker import RUN

EPOCHS = 9


@pytest.fixture
def config() -> StudyConfig:
    return StudyConfig(
        distill=DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS),
        space={"lr": {"low": 0.001, "high": 0.1, "log": True}},
        first_points=({"lr": 0.05},),
        trials=4,
    )


def make(run: Path, config: StudyConfig) -> OptunaSearcher:
    return OptunaSearcher(run, config, resolve(config.distill))


def train(searcher: OptunaSearcher, trial_id: str, job: RunRecord, values: list[float]) -> None:
    """Do what a worker and Tune do for `len(values)` epochs: Tune passes on all but the last."""
    folder = job.folder
    with open(folder / HISTORY, "a") as file:
        for epoch, value in enumerate(values, start=1):
            row = {"epoch": epoch, "val_top1": value, "seconds": 1.0}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if epoch < len(values):
                searcher.on_trial_result(trial_id, row)


def suggest(searcher: OptunaSearcher, trial_id: str) -> RunRecord:
    suggested = searcher.suggest(trial_id)
    assert suggested is not None
    return RunRecord.from_dict(suggested[RUN])


def states(run: Path, config: StudyConfig) -> list[TrialState]:
    return [trial.state for trial in open_study(run, config).get_trials()]


def test_the_first_suggestion_is_the_first_point(tmp_path: Path, config: StudyConfig) -> None:
    job = suggest(make(tmp_path, config), "a")
    assert job.number == 0
    assert job.config["lr"] == 0.05
    written = DistillConfig.from_yaml(job.folder / "config.yaml")
    assert written == DistillConfig.from_dict(job.config)


@pytest.mark.parametrize(
    ("values", "failure", "error", "state", "status"),
    [
        ([0.1] * EPOCHS, None, False, TrialState.COMPLETE, "complete"),
        ([0.1, 0.2, 0.3], None, False, TrialState.PRUNED, "pruned"),
        ([0.1], "val_top1 became nan", False, TrialState.FAIL, "failed"),
        ([0.1, 0.2], None, True, TrialState.FAIL, "failed"),
        ([], None, False, TrialState.FAIL, "failed"),
    ],
)
def test_a_trial_ends_in_optuna_and_on_disk_as_it_ended(
    tmp_path: Path, config: StudyConfig, values: list[float], failure: str | None, error: bool,
    state: TrialState, status: str,
) -> None:  # fmt: skip
    searcher = make(tmp_path, config)
    job = suggest(searcher, "a")
    train(searcher, "a", job, values)
    if failure:
        (job.folder / FAILURE).write_text(json.dumps({"reason": failure}))
    searcher.on_trial_complete("a", {"epoch": len(values)}, error=error)

    (trial,) = open_study(tmp_path, config).get_trials(states=[state])
    record = read_record(job.folder)
    assert record is not None
    assert record.status == status
    assert trial.intermediate_values == dict(enumerate(values, start=1))
    if state == TrialState.FAIL:
        assert record.reason == trial.user_attrs["reason"]
        assert (failure or "died") in record.reason
    if state == TrialState.COMPLETE:
        assert trial.value == values[-1]


def test_a_killed_run_is_settled_on_resume(tmp_path: Path, config: StudyConfig) -> None:
    """Four trials: finished; finished but Optuna not told; running; begun without a file."""
    first = make(tmp_path, config)
    jobs = [suggest(first, name) for name in "abcd"]
    train(first, "a", jobs[0], [0.3] * EPOCHS)
    first.on_trial_complete("a", {})
    train(first, "b", jobs[1], [0.2, 0.1])
    jobs[1].close("pruned")
    train(first, "c", jobs[2], [0.4])
    (jobs[3].folder / "config.yaml").unlink()
    jobs[3].folder.rmdir()
    before = {i: (jobs[i].folder / RESULT).read_bytes() for i in (0, 1)}

    second = make(tmp_path, config)
    assert states(tmp_path, config) == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.RUNNING,
        TrialState.RUNNING,
    ]
    assert second.remaining == 2, "only the interrupted trials are left to run"
    for number in (2, 3):
        again = suggest(second, "x")
        assert (again.number, again.config) == (number, jobs[number].config)
        (again.folder / HISTORY).unlink(missing_ok=True)
        train(second, "x", again, [0.4] + [0.5] * (EPOCHS - 1))
        second.on_trial_complete("x", {})
    assert second.remaining == 0
    assert not second.unfinished
    after = {i: (jobs[i].folder / RESULT).read_bytes() for i in (0, 1)}
    assert before == after


@pytest.mark.parametrize(
    "history",
    [[], [{"epoch": 1, "val_nll": 1.0}], [{"epoch": 1, "val_top1": None}],
     [{"epoch": -3, "val_top1": 0.3}], [{"epoch": 1, "val_top1": 0.3, "seconds": None}]],
)  # fmt: skip
@pytest.mark.parametrize("ended", ["complete", "pruned", "running"])
def test_a_damaged_record_is_put_aside_on_resume(
    tmp_path: Path, config: StudyConfig, history: list[dict[str, Any]], ended: str
) -> None:
    """Killed before Optuna knew its end: the trial goes on under its number."""
    first = make(tmp_path, config)
    job = suggest(first, "a")
    train(first, "a", job, [0.3])
    if ended == "running":
        (job.folder / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in history))
    else:
        replace(job, status=ended, history=history).write()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second = make(tmp_path, config)
    assert ended == "running" or "put aside" in str(said[-1].message)
    assert second.remaining == 4 and suggest(second, "b").number == 0
    assert not (job.folder / RESULT).exists()


@pytest.mark.parametrize(
    "line",
    ["garbage", "[1]", "\0" * 50, "[" * 10**5, '{"op_code": 99, "worker_id": "x"}',
     '{"op_code": 4, "worker_id": "x"}', '{"op_code": 0, "study_name": "x", "directions": [7]}',
     None],
    ids=["words", "list", "nulls", "deep", "operation", "keys", "direction", "no journal"],
)  # fmt: skip
def test_a_damaged_journal_is_made_anew_from_the_trials(
    tmp_path: Path, config: StudyConfig, line: str | None
) -> None:
    """Two trials had ended, one of them in a record that is damaged, and one was interrupted."""
    first = make(tmp_path, config)
    jobs = [suggest(first, name) for name in "abc"]
    train(first, "a", jobs[0], [0.3] * EPOCHS)
    train(first, "b", jobs[1], [0.2])
    train(first, "c", jobs[2], [0.1])
    first.on_trial_complete("a", {})
    first.on_trial_complete("b", {})
    (jobs[1].folder / RESULT).write_text("")
    before = {t.number: t for t in first.study.get_trials()}
    journal = tmp_path / JOURNAL
    if line is None:
        journal.unlink()
    else:
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([*lines[:3], line, *lines[3:], ""]))
        assert drop_unknown_trials(tmp_path) == [], "of a journal that cannot be read none is known"
    with pytest.warns(UserWarning, match="made anew" if line is None else "line 4"):
        second = make(tmp_path, config)
    assert (tmp_path / f"{JOURNAL}.damaged").exists() == (line is not None)
    now = {t.number: t for t in second.study.get_trials()}
    assert now[0].state == TrialState.COMPLETE and now[0].values == before[0].values
    assert now[0].intermediate_values == before[0].intermediate_values
    for number in (0, 1, 2):
        assert now[number].params == before[number].params
        assert now[number].distributions == before[number].distributions
    assert [now[number].state for number in (1, 2)] == [TrialState.RUNNING] * 2
    assert suggest(second, "d").number == 1 and suggest(second, "e").number == 2
    assert suggest(second, "f").number == 3
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("kept", [0, 1, 0.5], ids=["empty", "first line", "half"])
def test_a_journal_that_was_cut_lends_no_trial_another_one_s_point(
    tmp_path: Path, config: StudyConfig, kept: float
) -> None:
    """What is left of its lines is whole; the trials behind them have records."""
    first = make(tmp_path, config)
    for name in "abc":
        train(first, name, suggest(first, name), [0.3] * EPOCHS)
        first.on_trial_complete(name, {})
    before = {t.number: t.params for t in first.study.get_trials()}
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    count = int(kept * len(lines)) if kept < 1 else 1
    (tmp_path / JOURNAL).write_text("".join(lines[:count]))
    with pytest.warns(UserWarning, match="lacks trial"):
        second = make(tmp_path, config.replace(trials=4))
    now = second.study.get_trials()
    assert {t.number: t.params for t in now if t.state == TrialState.COMPLETE} == before
    assert suggest(second, "d").number == 3


def test_more_trials_extend_a_finished_study(tmp_path: Path, config: StudyConfig) -> None:
    searcher = make(tmp_path, config.replace(trials=1))
    train(searcher, "a", suggest(searcher, "a"), [0.1])
    searcher.on_trial_complete("a", {}, error=True)
    assert searcher.remaining == 0
    assert make(tmp_path, config.replace(trials=3)).remaining == 2


@pytest.mark.parametrize("budget", [{"budget_epochs": 2 * EPOCHS}, {"budget_hours": 0.5}])
def test_no_trial_begins_after_the_budget(
    tmp_path: Path, config: StudyConfig, budget: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials of full length, or of a quarter of an hour each; a third one is not begun."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    searcher = make(tmp_path, config.replace(**budget))
    for number in range(2):
        assert searcher.remaining == 4 - number
        train(searcher, "a", suggest(searcher, "a"), [0.1] * EPOCHS)
        searcher.on_trial_complete("a", {})
        clock[0] += 900
    assert searcher.suggest("b") == "FINISHED"
    assert (searcher.remaining, searcher.unfinished) == (0, False)
    assert make(tmp_path, config).remaining == 2, "a larger budget goes on"


def test_a_trial_that_was_begun_is_finished_beyond_the_budget(
    tmp_path: Path, config: StudyConfig
) -> None:
    first = make(tmp_path, config)
    train(first, "a", suggest(first, "a"), [0.1] * 3)
    second = make(tmp_path, config.replace(budget_epochs=1))
    assert second.remaining == 1
    assert suggest(second, "a").number == 0


def test_an_illegal_point_is_a_failed_trial_and_the_next_one_is_asked(
    tmp_path: Path, config: StudyConfig
) -> None:
    """lr below lr_min: legal one by one, refused together."""
    config = config.replace(
        distill=config.distill.replace(lr=0.1, lr_min=0.04),
        first_points=({"lr": 0.001}, {"lr": 0.05}),
    )
    job = suggest(make(tmp_path, config), "a")
    assert (job.number, job.config["lr"]) == (1, 0.05)
    record = read_record(trial_folder(tmp_path, 0))
    assert record is not None
    assert record.status == "failed"
    assert "lr_min" in str(record.reason)


def test_a_trial_whose_process_died_before_its_first_epoch_is_tried_once_more(
    tmp_path: Path, config: StudyConfig
) -> None:
    searcher = make(tmp_path, config)
    first = suggest(searcher, "a")
    searcher.on_trial_complete("a", {}, error=True)
    again = suggest(searcher, "b")
    assert (again.number, again.config) == (first.number, first.config)
    searcher.on_trial_complete("b", {}, error=True)
    record = read_record(again.folder)
    assert record is not None and record.status == "failed"
    assert suggest(searcher, "c").number == first.number + 1


def test_what_tune_prints_stays_out_of_the_results(tmp_path, monkeypatch, capsys):
    """`--json` stands alone on standard output, also where Tune speaks of a resumed trial."""

    class Talking:
        def __init__(self, *arguments, **settings):
            pass

        def fit(self):
            print("Trial train_in_process_1 completed. Last result:")

    monkeypatch.setattr(search.tune, "Tuner", Talking)
    monkeypatch.setattr(search, "TrialSlots", lambda *arguments: None)
    config = StudyConfig()
    search.run_tuner(
        tmp_path, config, None, searcher=None, scheduler=make_scheduler(config), observer=None
    )
    said = capsys.readouterr()
    assert said.out == "" and "completed" in said.err
