"""Study: its tables, its ranking, and that the test split never decides."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_studies import BASE, SPACE, final, select

from ekd_ray import files
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results import Study
from ekd_ray.results.leaderboard import mean_sd
from ekd_ray.results.progress import time_rows
from ekd_ray.results.records import (
    RESULT,
    RunRecord,
    milestone_epochs,
    read_record,
    trial_folder,
)
from ekd_ray.studies.pipeline import check_folder

# Trials


def test_trials_have_one_row_each_with_the_last_metrics(maker):
    study = maker.study()
    maker.trial(0, [0.1, 0.2, 0.3], lr=0.05)
    maker.trial(2, [0.4], status="pruned", lr=0.01)
    maker.trial(1, [], status="failed", reason="out of memory", lr=0.3)
    table = study.trials()
    assert table.column("trial").to_pylist() == [0, 1, 2]
    assert table.column("status").to_pylist() == ["complete", "failed", "pruned"]
    assert table.column("reason").to_pylist() == [None, "out of memory", None]
    assert table.column("epoch").to_pylist() == [3, 0, 1]
    assert table.column("val_top1").to_pylist() == [0.3, None, 0.4]
    assert table.column("seconds").to_pylist() == [1.5, 0.0, 0.5]
    assert table.column("param_lr").to_pylist() == [0.05, 0.3, 0.01]


def test_a_running_trial_has_no_row(maker):
    study = maker.study()
    maker.trial(0, [0.1])
    (trial_folder(maker.path, 1)).mkdir(parents=True)
    (maker.path / "trials" / "1 of mine").mkdir()
    (maker.path / "confirm" / "notes-of-mine").mkdir(parents=True)
    assert study.trials().column("trial").to_pylist() == [0]
    assert [record.number for record in study.records()] == [0]


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        ([1, 0.5], [1.0, 0.5], pa.float64()),
        ([1, 2], [1, 2], pa.int64()),
        (["exp", "relu"], ["exp", "relu"], pa.string()),
        (["cosine", 3], ["cosine", "3"], pa.string()),
        ([True, 0.5], ["True", "0.5"], pa.string()),
        ([None, 0.5], [None, 0.5], pa.float64()),
        ([None, "a"], [None, "a"], pa.string()),
    ],
)
def test_columns_of_searched_values_have_one_type(maker, values, expected, kind):
    study = maker.study()
    for number, value in enumerate(values):
        maker.trial(number, [0.1], x=value)
    column = study.trials().column("param_x")
    assert column.to_pylist() == expected
    assert column.type == kind


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        ({}, 9, [1, 7, 9]),
        ({}, 240, [30, 151, 240]),  # the first epoch at the lower rate
        ({}, 4, [1, 3, 4]),
        ({"grace_epochs": 8}, 9, [7, 8, 9]),
        ({"grace_epochs": 20}, 9, [7, 9]),
        ({"rungs": [1, 3]}, 9, [1, 3, 9]),
        ({"rungs": [3, 9, 27]}, 9, [3, 9]),
        ({"rungs": [3, 1, 3]}, 9, [1, 3, 9]),
        ({"grace_epochs": 1, "scheduler": "none"}, 9, [9]),
        # Where the rate falls smoothly, a geometric series.
        ({"reduction_factor": 3, "schedule": "cosine"}, 10, [2, 6, 10]),
        ({"grace_epochs": 2, "schedule": "cosine"}, 9, [2, 4, 8, 9]),
        ({"schedule": "cosine"}, 240, [60, 120, 240]),
    ],
)
def test_milestones_are_ashas_rungs_and_the_full_budget(settings, epochs, expected):
    settings = dict(settings)
    distill = DistillConfig(epochs=epochs, schedule=settings.pop("schedule", "step"))
    config = StudyConfig(distill=distill, **settings)
    assert milestone_epochs(config) == expected


def test_rungs_have_a_row_per_milestone_and_the_last_epoch(maker):
    study = maker.study(rungs=[1, 3])
    maker.trial(0, [0.1 * e for e in range(1, 10)], lr=0.1)
    maker.trial(1, [0.2] * 4, status="failed", reason="x", lr=0.2)
    maker.trial(2, [0.3] * 3, status="pruned", lr=0.3)
    maker.trial(3, [], status="failed", reason="x", lr=0.4)
    table = study.rungs()
    found = list(zip(table["trial"].to_pylist(), table["epoch"].to_pylist(), strict=True))
    assert found == [(0, 1), (0, 3), (0, 9), (1, 1), (1, 3), (1, 4), (2, 1), (2, 3)]
    assert table["seconds"].to_pylist()[:3] == [0.5, 1.5, 4.5]
    assert table["val_top1"].to_pylist()[1] == pytest.approx(0.3)
    assert set(table.column_names) == set(study.trials().column_names)
    study.write_tables()
    assert pq.read_table(maker.path / "trials.parquet").equals(table)


# Ranking


@pytest.mark.parametrize(
    ("metric", "expected"), [("val_top1", [2, 0, 10_000, 3]), ("val_nll", [3, 0, 10_000, 2])]
)
def test_ranked_are_the_complete_trials_best_first(maker, metric, expected):
    study = maker.study(metric=metric)
    for number, value in ((10_000, 0.5), (0, 0.5), (2, 0.7), (3, 0.4)):
        maker.trial(number, [0.99, value], metric=metric)
    maker.trial(1, [0.9], status="pruned", metric=metric)
    maker.trial(4, [0.0], status="failed", reason="x", metric=metric)
    assert [record.number for record in study.ranked()] == expected
    assert study.trials()["trial"].to_pylist() == [0, 1, 2, 3, 4, 10_000]


@pytest.mark.parametrize("metric", ["val_top1", "val_nll"])
def test_a_trial_without_the_metric_is_left_out(maker, metric):
    study = maker.study(metric=metric)
    maker.trial(0, [0.5], metric="train_loss")
    maker.trial(1, [0.5], metric=metric)
    assert [record.number for record in study.ranked()] == [1]
    assert metric in study.damaged()[0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=10))
def test_mean_and_deviation_are_numpys(values):
    mean, deviation, count = mean_sd(iter(values))
    assert mean == pytest.approx(np.mean(values), abs=1e-6)
    expected = np.std(values, ddof=1) if len(values) > 1 else 0.0
    assert deviation == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert count == len(values)


@pytest.mark.parametrize("wrong", [{"out": 3}, {"formats": "onnx"}, {"normalized_input": 1}])
def test_an_export_of_another_kind_is_refused(maker, wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} must be"):
        maker.study().export(**{"out": maker.path} | wrong)


# Leaderboard


def three_finalists(maker, metric="val_top1"):
    """By validation trial 5 wins (0.60), by test trial 7 or a baseline would."""
    values = {"trial 5": (0.5, 0.7), "trial 7": (0.55, 0.55), "trial 2": (0.3, 0.9)}
    if metric == "val_nll":
        values = {"trial 7": (0.9, 0.9), "trial 5": (0.2, 0.4), "trial 2": (0.5, 0.5)}
    else:
        values["trial 2"] = (0.1, 0.8)
    maker.confirm(
        [
            *(select(n, s, v, metric=metric) for n, vs in values.items() for s, v in enumerate(vs)),
            *(final("trial 5", s, v) for s, v in enumerate((0.4, 0.42))),
            *(final("none", s, v) for s, v in enumerate((0.8, 0.9))),
            *(final("kd", s, v) for s, v in enumerate((0.95, 0.97))),
        ]
    )


def test_the_winner_is_chosen_by_validation_and_never_by_test(maker):
    study = maker.study()
    three_finalists(maker)
    board = study.leaderboard()
    assert [row.name for row in board] == ["trial 5", "kd", "none", "trial 7", "trial 2"]
    assert [row.winner for row in board] == [True, False, False, False, False]
    assert (board[0].val, board[0].test) == ((0.5, 0.7), (0.4, 0.42))
    assert board[0].test_metrics == ({"test_top1": 0.4}, {"test_top1": 0.42})
    assert (board[1].val, board[1].test) == ((), (0.95, 0.97))
    assert (board[3].val, board[3].test) == ((0.55, 0.55), ())


def test_the_winner_is_compared_seed_by_seed_with_each_baseline(maker):
    study = maker.study()
    assert study.differences() == {}
    three_finalists(maker)
    found = Study.load(study.path).differences()
    assert list(found) == ["kd", "none"]  # the other finalists have no test figures
    assert found["none"].mean == pytest.approx(-0.44)  # of -0.40 and -0.48
    assert (found["none"].n, found["none"].low) == (2, None)


def test_a_failed_baseline_is_not_compared(maker):
    study = maker.study()
    maker.confirm(
        [
            select("trial 1", 0, 0.6), select("trial 1", 1, 0.6),
            final("trial 1", 0, 0.5), final("trial 1", 1, 0.6),
            final("kd", 0, 0.4), {**final("kd", 1, 0.4), "reason": "died", "test_top1": None},
            final("none", 0, 0.4), final("none", 1, 0.4),
        ]
    )  # fmt: skip
    assert list(study.differences()) == ["none"]


def test_with_a_loss_as_metric_the_least_wins(maker):
    study = maker.study(metric="val_nll")
    three_finalists(maker, metric="val_nll")
    board = study.leaderboard()
    assert board[0].winner and [row.name for row in board][3:] == ["trial 2", "trial 7"]
    assert board[0].name == study.best().name == "trial 5"


def test_what_failed_comes_last(maker):
    study = maker.study(metric="val_nll")
    maker.confirm(
        [
            {**select("trial 3", 0, None, metric="val_nll"), "reason": "diverged"},
            *(select(f"trial {n}", 0, 0.5 + n / 10, metric="val_nll") for n in (1, 2)),
        ]
    )
    assert [row.name for row in study.leaderboard()] == ["trial 1", "trial 2", "trial 3"]


def test_the_authors_values_of_an_older_study_have_the_name_of_a_newer_ones(maker):
    """Then they were a baseline by another name; `kd` had its name."""
    study = maker.study()
    maker.confirm([select("trial 1", 0, 0.5), *(final(n, 0, 0.4) for n in ("authors", "kd"))])
    assert [row.name for row in study.leaderboard()] == ["trial 1", "authors' values", "kd"]


def test_a_tie_goes_to_the_finalist_named_first(maker):
    """As in confirm, which runs the final step for the first of equals."""
    study = maker.study()
    maker.confirm([select("trial 9", 0, 0.5), select("trial 1", 0, 0.5)])
    assert study.leaderboard()[0].name == "trial 9"


def test_a_failed_finalist_cannot_win_and_a_failed_baseline_is_told(maker):
    """One seed of trial 1 diverged: its other seed, however good, does not count."""
    study = maker.study()
    maker.confirm(
        [
            select("trial 1", 1, 0.99), {**select("trial 1", 2, None), "reason": "diverged"},
            select("trial 2", 1, 0.5), select("trial 2", 2, 0.6),
            final("trial 2", 1, 0.4), final("trial 2", 2, 0.4),
            {**final("kd", 1, None), "reason": "out of memory"}, final("kd", 2, 0.9),
        ]
    )  # fmt: skip
    board = {row.name: row for row in study.leaderboard()}
    assert study.best().name == "trial 2"
    assert [run.name for run in study.confirm_runs if run.status == "failed"] == ["trial 1", "kd"]
    assert board["trial 2"].failed is None
    assert (board["trial 1"].failed, board["trial 1"].winner) == ("diverged", False)
    assert board["kd"].failed == "out of memory"


def test_best_before_confirm_is_the_best_complete_trial(maker):
    study = maker.study()
    maker.trial(0, [0.9], status="pruned")
    with pytest.raises(UserError, match=r"no trial of .* has finished"):
        study.best()
    maker.trial(1, [0.3, 0.4])
    maker.trial(2, [0.5, 0.6])
    best = Study.load(study.path).best()
    assert (best.name, best.val, best.test, best.winner) == ("trial 2", (0.6,), (), False)
    assert best.config.seed == 2


# Records


def test_a_study_is_read_once(maker, monkeypatch):
    maker.study()
    maker.trial(0, [0.1], lr=0.1)
    reads, read = [], files.read_bytes
    monkeypatch.setattr(
        files, "read_bytes", lambda path, **kw: reads.append(path.name) or read(path, **kw)
    )
    study = Study.load(maker.path)
    for _ in range(2):
        assert study.ranked().to_table() == study.trials()
        assert study.running() == [] and len(time_rows(study)) == 1
    assert reads.count(RESULT) == 1


def test_what_the_first_format_wrote_is_read(maker):
    """Trials without a stage, confirm runs without settings, and a table without numbers."""
    study = maker.study(version=1)
    row = {"epoch": 1, "val_top1": 0.5, "seconds": 2.0}
    trial = {"number": 3, "params": {"lr": 0.1}, "config": study.config.distill.to_dict(),
             "status": "complete", "reason": None, "history": [row]}  # fmt: skip
    ended = {"metrics": {**row, "test_top1": 0.4}, "precision": "float32", "seconds": 9.0,
             "environment": {}, "data_fingerprint": "f"}  # fmt: skip
    folders = [maker.path / "trials" / "0003", maker.path / "confirm" / "final-trial-3-seed-1-ab",
               maker.path / "confirm" / "final-kd-seed-1-cd"]  # fmt: skip
    for folder, content in zip(folders, (trial, ended, {"reason": "diverged"}), strict=True):
        folder.mkdir(parents=True)
        (folder / RESULT).write_text(json.dumps(content))
        (folder / "history.jsonl").write_text(json.dumps(row) + "\n")
    folder = "confirm/final-trial-3-seed-1-ab"
    maker.confirm([select("trial 3", 1, 0.5), final("trial 3", 1, 0.4, folder=folder)])
    found = Study.load(maker.path)
    assert found.best().number == 3 and found.ranked()[0].params == {"lr": 0.1}
    searched, failed, confirmed = found.runs
    assert (searched.stage, searched.name, searched.seconds) == ("search", "trial 3", 2.0)
    assert (failed.stage, failed.status, failed.reason) == ("final", "failed", "diverged")
    assert (confirmed.name, confirmed.number, confirmed.seed) == ("trial 3", 3, 1)
    assert (confirmed.status, confirmed.metrics["test_top1"]) == ("complete", 0.4)
    assert (confirmed.history, confirmed.seconds, confirmed.precision) == ([row], 9.0, "float32")


def test_a_record_comes_back_equal(maker):
    record = maker.trial(7, [0.1, 0.2], status="pruned", lr=0.5)
    assert read_record(record.folder) == record == RunRecord.from_dict(record.to_dict())


# Folders that are none


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_a_folder_without_a_study_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"x holds no study .*give the folder of a study"):
        Study.load(tmp_path / "x")


def test_a_single_run_is_called_so(tmp_path):
    (tmp_path / "config.yaml").write_text(BASE.to_yaml())
    with pytest.raises(UserError, match=r"holds no study .*a single run"):
        Study.load(tmp_path)


def test_fewer_trials_than_there_are_is_refused(maker):
    study = maker.study(distill=BASE, space=SPACE, trials=9)
    for number in range(3):
        maker.trial(number, [0.5] * 9)
    check_folder(study.path, study.config.replace(trials=3), resume=True)
    with pytest.raises(UserError, match=">= 3, got 2"):
        check_folder(study.path, study.config.replace(trials=2), resume=True)


def test_a_newer_study_is_refused(maker):
    with pytest.raises(UserError, match="version 3, and this ekd_ray reads up to 2: upgrade"):
        maker.study(version=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format_version: 1\nstudy: {trails: 3}", r"study\.yaml:2: .*Did you mean 'trials'"),
        ("format_version: 1\nstudy: {trials: 0}", r"study\.yaml:2: trials must be >= 1, got 0"),
        ("- a list", "must hold a YAML mapping"),
        ("a: [", "correct the YAML there"),
        ("format_version: newest\nstudy: {}", "study.yaml"),
    ],
)
def test_a_damaged_study_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Study.load(tmp_path)
    assert "\n" not in str(caught.value)
