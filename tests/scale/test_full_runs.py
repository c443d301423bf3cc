"""Full runs of stopped trials, without a cluster: Tune's calls are made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState
from test_settling import train

from ekd_ray.cli.study_text import print_progress
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.progress import savings
from ekd_ray.results.records import RunRecord, read_record, trial_folder
from ekd_ray.results.study import Study
from ekd_ray.scale.budget import Budget
from ekd_ray.scale.full_runs import FullRuns, promise
from ekd_ray.scale.schedulers import Chance
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import FULL_RUN, open_study
from ekd_ray.scale.worker import RUN

EPOCHS = 4
CHANCE = Chance(classes=10, images=100)
BOTH = {2: (4, TrialState.COMPLETE), 0: (5, TrialState.COMPLETE)}


@pytest.fixture
def config() -> StudyConfig:
    return StudyConfig(
        distill=DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS),
        space={"lr": {"low": 0.001, "high": 0.1, "log": True}},
        trials=4,
        confirm_top_k=3,
        rungs=(1, 2),
    )


def begin(searcher: OptunaSearcher, name: str) -> RunRecord:
    suggested = searcher.suggest(name)
    assert isinstance(suggested, dict)
    return RunRecord.from_dict(suggested[RUN])


def run_all(searcher: OptunaSearcher, lengths: list[int]) -> list[RunRecord]:
    """Let trials run, each so many epochs; an empty one fails."""
    jobs = []
    for epochs in lengths:
        jobs.append(begin(searcher, "t"))
        train(searcher, "t", jobs[-1], epochs)
        searcher.on_trial_complete("t", {})
    return jobs


def searched(run: Path, config: StudyConfig, lengths: list[int]) -> list[RunRecord]:
    return run_all(OptunaSearcher(run, config, resolve(config.distill)), lengths)


def make(run: Path, config: StudyConfig, budget: Budget | None = None) -> FullRuns:
    budget = budget or Budget(config)
    return FullRuns(run, config, resolve(config.distill), budget=budget, chance=CHANCE)


def full_runs_of(run: Path, config: StudyConfig) -> dict[int, tuple[int, TrialState]]:
    trials = open_study(run, config).get_trials()
    return {t.user_attrs[FULL_RUN]: (t.number, t.state) for t in trials if FULL_RUN in t.user_attrs}


def test_the_most_promising_run_in_full_as_trials_of_their_own(
    tmp_path: Path, config: StudyConfig
) -> None:
    stopped = searched(tmp_path, config, [1, EPOCHS, 2, 1])
    searcher = make(tmp_path, config)
    assert searcher.remaining == 2
    jobs = run_all(searcher, [EPOCHS, EPOCHS])
    assert searcher.suggest("t") == "FINISHED"
    assert [(job.number, job.full_run_of) for job in jobs] == [(4, 2), (5, 0)]
    assert [job.config for job in jobs] == [stopped[2].config, stopped[0].config]
    assert full_runs_of(tmp_path, config) == BOTH
    record = read_record(trial_folder(tmp_path, 4))
    assert record is not None
    assert (record.status, record.full_run_of, record.params) == ("complete", 2, stopped[2].params)
    assert record.name == "trial 4 (full run of trial 2)"
    assert make(tmp_path, config).remaining == 0


def test_the_number_of_trials_is_that_of_the_search(tmp_path: Path, config: StudyConfig) -> None:
    searched(tmp_path, config, [1, EPOCHS, 2, 1])
    run_all(make(tmp_path, config), [EPOCHS, EPOCHS])
    longer = OptunaSearcher(tmp_path, config.replace(trials=6), resolve(config.distill))
    assert longer.remaining == 2
    assert [record.number for record in longer.records()] == [0, 1, 2, 3]


def test_show_knows_full_runs_and_that_their_stops_saved_nothing(
    tmp_path: Path, config: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(tmp_path, config, [1, EPOCHS, 2, 1])
    study = Study(path=tmp_path, config=config, header={})
    assert savings(study).stopped_epochs == 3 + 2 + 3
    run_all(make(tmp_path, config), [EPOCHS, EPOCHS])
    study = Study(path=tmp_path, config=config, header={})
    assert savings(study).stopped_epochs == 3
    print_progress(study, None, "")
    shown = capsys.readouterr().out
    assert "4 (full run of trial 2)" in shown and "2 full runs of stopped trials" in shown
    assert "4 of 4 trials have ended" in shown


@pytest.mark.parametrize("lengths", [[EPOCHS, EPOCHS, EPOCHS, 1], [EPOCHS] * 4])
def test_enough_of_full_length_are_enough(
    tmp_path: Path, config: StudyConfig, lengths: list[int]
) -> None:
    searched(tmp_path, config, lengths)
    assert make(tmp_path, config).suggest("t") == "FINISHED"


def test_one_that_fails_is_followed_by_the_next(tmp_path: Path, config: StudyConfig) -> None:
    searched(tmp_path, config, [1, EPOCHS, 2, 1])
    searcher = make(tmp_path, config)
    assert [job.full_run_of for job in run_all(searcher, [0, EPOCHS, EPOCHS])] == [2, 0, 3]
    assert searcher.remaining == 0


@pytest.mark.parametrize("epochs", [None, 0, 2, EPOCHS])
@pytest.mark.parametrize("recorded", [False, True])
def test_killed_at_any_moment_none_is_lost_or_doubled(
    tmp_path: Path, config: StudyConfig, epochs: int | None, recorded: bool
) -> None:
    """Begun in Optuna alone, begun, in the middle, at its end; told to Optuna or not."""
    searched(tmp_path, config, [1, EPOCHS, 2, 1])
    first = make(tmp_path, config)
    job = begin(first, "t")
    if epochs is None:
        (job.folder / "config.yaml").unlink()
        job.folder.rmdir()
    else:
        train(first, "t", job, epochs)
        if recorded and epochs == EPOCHS:
            job.close("complete")
    search = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert (search.remaining, search.unfinished) == (0, False), "it is not the search's"
    second = make(tmp_path, config)
    assert second.remaining == (1 if recorded and epochs == EPOCHS else 2)
    run_all(second, [EPOCHS] * second.remaining)
    assert full_runs_of(tmp_path, config) == BOTH
    assert not second.unfinished


def test_the_budget_holds_for_full_runs_too(tmp_path: Path, config: StudyConfig) -> None:
    searched(tmp_path, config, [1, EPOCHS, 2, 1])
    assert make(tmp_path, config.replace(budget_epochs=8)).remaining == 0
    searcher = make(tmp_path, config.replace(budget_epochs=9))
    assert searcher.remaining == 2
    run_all(searcher, [EPOCHS])
    assert searcher.remaining == 0, "12 epochs are over 9"


def test_a_stopped_trial_that_keeps_the_constraints_runs_beside_complete_ones_that_break_them(
    tmp_path: Path, config: StudyConfig
) -> None:
    config = config.replace(constraints=["val_top1<=0.3"], confirm_top_k=1, trials=2)
    searched(tmp_path, config, [2, EPOCHS])
    (job,) = run_all(make(tmp_path, config), [3])
    assert job.full_run_of == 0
    assert make(tmp_path, config.replace(constraints=["val_top1<=0.1"])).remaining == 0


def trial(number: int, values: list[float], ece: float = 0.0) -> RunRecord:
    history = [{"epoch": e, "val_top1": v, "val_ece": ece} for e, v in enumerate(values, start=1)]
    return RunRecord(folder=Path(), stage=RunStage.SEARCH, name="", number=number, history=history)


def test_feasible_first_then_no_guessing_then_the_higher_rung_then_the_score(
    config: StudyConfig,
) -> None:
    config = config.replace(constraints=["val_ece<=0.1"])
    ordered = [
        trial(7, [0.4, 0.5]), trial(3, [0.4, 0.4]), trial(5, [0.9]), trial(2, [0.3]),
        trial(1, [0.1, 0.11]), trial(0, [0.9, 0.9], ece=0.2), trial(4, [0.9, 0.9], ece=0.3),
    ]  # fmt: skip
    shuffled = sorted(ordered, key=lambda record: record.number or 0)
    found = sorted(shuffled, key=lambda record: promise(record, config, CHANCE))
    assert [record.number for record in found] == [7, 3, 5, 2, 1, 0, 4]


def test_a_trial_that_was_stopped_and_not_ended_is_ended_on_resume(
    tmp_path: Path, config: StudyConfig
) -> None:
    """The scheduler had answered, and the driver died before the trial was closed."""
    searcher = OptunaSearcher(tmp_path, config, resolve(config.distill))
    train(searcher, "a", begin(searcher, "a"), 2)
    again = OptunaSearcher(tmp_path, config, resolve(config.distill))
    again.end_stopped({0, 9})
    (ended,) = again.records()
    assert (ended.number, ended.status, ended.params.keys()) == (0, "pruned", {"lr"})
    assert [t.state for t in open_study(tmp_path, config).get_trials()] == [TrialState.PRUNED]
    assert again.remaining == config.trials - 1
