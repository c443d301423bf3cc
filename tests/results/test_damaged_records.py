"""What a run folder holds besides what we write is left out, counted and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from report_studies import final, searched, select

from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import Damaged, UserError
from ekd_ray.results import Study
from ekd_ray.results.records import (
    CONFIG,
    JOURNAL,
    RESULT,
    RunRecord,
    read_or_put_aside,
    read_record,
    read_whole,
)
from ekd_ray.results.report import write_report
from ekd_ray.results.study_reader import read_parquet, write_parquet
from ekd_ray.scale.storage import Journal, drop_unknown_trials


def row(record: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The record with one epoch, in which some figures are others."""
    return {**record, "history": [{**record["history"][0], **changed}]}


# Of a record, what a stranger or an accident makes of it.
CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda r: {**r, "surprise": 1},
    "an unknown setting": lambda r: {**r, "config": {**r["config"], "surprise": 1}},
    "a setting of another type": lambda r: {**r, "config": {**r["config"], "lr": [1]}},
    "a list": lambda r: [r],
    "a number": lambda r: 7,
    "an odd status": lambda r: {**r, "status": "odd"},
    "a status that is a list": lambda r: {**r, "status": ["complete"]},
    "an odd stage": lambda r: {**r, "stage": "odd"},
    "another's number": lambda r: {**r, "number": 9999},
    "no number": lambda r: {**r, "number": "3"},
    "a history of words": lambda r: {**r, "history": ["a"]},
    "a history without epochs": lambda r: {**r, "history": [{"val_top1": 0.5}]},
    "an epoch twice": lambda r: {**r, "history": [r["history"][0]] * 2},
    "a metric that is a text": lambda r: {**r, "history": [{**r["history"][0], "val_top1": "x"}]},
    "a metric too large": lambda r: {**r, "history": [{**r["history"][0], "val_top1": 10**400}]},
    "params that are none": lambda r: {**r, "params": None},
    "params that hold a list": lambda r: {**r, "params": {"lr": [0.05]}},
    "params of another kind": lambda r: {**r, "params": {"lr": "0.05"}},
    "a setting out of bounds": lambda r: {
        **r, "config": {**r["config"], "lr": -1.0}, "params": {"lr": -1.0}
    },
    "a reason that is a number": lambda r: {**r, "status": "failed", "reason": 5},
    "a history of nothing": lambda r: {**r, "history": []},
    "a history without the metric": lambda r: {**r, "history": [{"epoch": 1, "val_nll": 1.0}]},
    "no accuracy": lambda r: row(r, val_top1=None),
    "an accuracy of seven": lambda r: row(r, val_top1=7.0),
    "an accuracy below none": lambda r: row(r, val_top1=-0.5),
    "a loss beyond all": lambda r: row(r, val_nll=1e308),
    "a negative size": lambda r: row(r, parameters=-5),
    "an epoch before the first": lambda r: row(r, epoch=-3),
    "an epoch beyond all": lambda r: row(r, epoch=10**9),
    "an epoch that no float holds": lambda r: row(r, epoch=10**400),
    "an epoch of no time": lambda r: row(r, seconds=None),
    "an epoch of negative time": lambda r: row(r, seconds=-1e9),
    "a negative time": lambda r: {**r, "seconds": -1.0},
    "a time beyond all": lambda r: {**r, "seconds": 1e308},
    "a prior beyond all": lambda r: {**r, "log_prior": -1e308},
    "half a sign": lambda r: {**r, "name": "\ud800"},
    "half a sign as a key": lambda r: row(r, **{"\ud800": 1}),
    "half a sign in its environment": lambda r: {**r, "environment": {"gpus": ["\udfff"]}},
    "a reason without end": lambda r: {**r, "status": "failed", "reason": "x" * 10**6},
    "params beyond all": lambda r: {**r, "params": {"lr": 1e308}},
    "params that no float holds": lambda r: {**r, "params": {"lr": 10**400}},
    "params of half a sign": lambda r: {**r, "params": {"lr": "\ud800"}},
    "an odd version": lambda r: {**r, "format_version": "two"},
}  # fmt: skip
TEXTS = {
    "nothing": "", "half": '{"format_version": 2, "stat', "bytes": "\x00\x01", "deep": "[" * 10**5,
    "NaN": None, "infinity": None,
}  # fmt: skip


def spoil(path: Path, kind: str) -> None:
    values = json.loads(path.read_text())
    if kind in CONTENTS:
        path.write_text(json.dumps(CONTENTS[kind](values)))
    elif TEXTS[kind] is not None:
        path.write_text(TEXTS[kind])
    else:
        word = {"NaN": "NaN", "infinity": "1e999"}[kind]
        path.write_text(path.read_text().replace('"val_top1": ', f'"val_top1": {word}, "x": ', 1))


@pytest.mark.parametrize("kind", [*CONTENTS, *TEXTS])
def test_a_record_that_no_run_writes_is_left_out(kind: str, maker) -> None:
    maker.study(space={"lr": {"low": 0.01, "high": 0.1}})
    spoilt, whole = (maker.trial(number, [0.5, 0.6], lr=0.05) for number in (0, 1))
    spoil(spoilt.folder / RESULT, kind)
    study = Study.load(maker.path)
    assert [run.number for run in study.runs] == [whole.number]
    (sentence,) = study.damaged()
    assert str(spoilt.folder) in sentence and len(sentence) < 300 + len(str(spoilt.folder))
    if "setting" not in kind:  # a record without its plugins has settings that are not known
        needed = study.config.all_objectives
        assert read_whole(spoilt.folder, needed=needed) is None
        with pytest.raises(Damaged):
            read_record(spoilt.folder, needed=needed)


@pytest.mark.parametrize("name", ["1", "00001", "٣", "000٣", "²", "00x", "12345678901234567890x"])
def test_a_folder_of_another_name_is_no_trial(name: str, maker) -> None:
    maker.study()
    trial = maker.trial(1, [0.5])
    shutil.copytree(trial.folder, trial.folder.with_name(name))
    study = Study.load(maker.path)
    assert ([run.folder for run in study.runs], study.damaged()) == ([trial.folder], [])
    Journal(maker.path / JOURNAL)  # knows no trial
    for file in trial.folder.iterdir():
        file.unlink()
    assert drop_unknown_trials(maker.path) == ["trials/0001"], "nothing tells of it"
    assert trial.folder.with_name(name).is_dir(), "not ours"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with two records, a row, and the files beside them damaged."""
    from report_studies import Maker

    maker = Maker(tmp_path_factory.mktemp("damaged") / "run")
    searched(maker)
    rows = [select("trial 3", s, 0.6) for s in (1, 2)]
    rows += [final(n, s, 0.5) for n in ("trial 3", "none") for s in (1, 2)]
    rows[-1]["test_top1"] = float("nan")
    maker.confirm(rows)
    spoil(maker.path / "trials" / "0003" / RESULT, "a list")
    spoil(maker.path / "trials" / "0007" / RESULT, "an odd status")
    (maker.path / "teacher.json").write_text('{"model": 1}')
    (maker.path / "cache.json").write_text("[]")
    return maker.path


NAMED = ("trials/0003/result.json", "trials/0007/result.json", "'none'", "teacher.json")


def test_show_counts_and_names_what_is_left_out(damaged: Path, launch) -> None:
    code, out, err = launch("show", damaged)
    assert (code, err) == (0, "") and "4 files" in out
    assert all(name in out.replace("\n", "") for name in NAMED)
    code, out, _ = launch("show", damaged, "--json", "--compare", damaged)
    assert code == 0 and len(json.loads(out)["damaged"]) == 4


def test_report_compare_and_leaderboard_name_it_too(damaged: Path, launch, tmp_path) -> None:
    study = Study.load(damaged)
    page = write_report(study, tmp_path / "page.html").read_text()
    assert all(name.strip("'") in page for name in NAMED) and "4 files" in page
    code, _, err = launch("compare", damaged)
    assert code == 0 and "Traceback" not in err and all(name in err for name in NAMED)
    board = Study.load(damaged).leaderboard()
    assert [len(row.test) for row in board] == [1, 1], "they are compared under the same seeds"
    assert "'none'" in repr(board)


def test_a_table_that_is_none_costs_the_leaderboard_only(maker) -> None:
    maker.study()
    maker.trial(0, [0.5] * 9)
    (maker.path / "confirm.parquet").write_bytes(b"PAR1 and no more")
    study = Study.load(maker.path)
    assert study.leaderboard() == [] and study.best().number == 0
    assert "confirm.parquet" in study.damaged()[0]
    with pytest.raises(UserError, match="no Parquet table of ours"):
        study.confirmed()


@pytest.mark.parametrize("folder", ["a" * 5_000, "a" * 300, "a\0b"])
def test_a_row_in_a_folder_that_cannot_be_costs_its_seed_only(folder: str, maker) -> None:
    maker.study()
    maker.trial(0, [0.5] * 9)
    (maker.path / "confirm").mkdir()
    maker.confirm([select(name, seed, 0.6) for name in ("trial 0", "none") for seed in (1, 2)])
    table = read_parquet(maker.path / "confirm.parquet")
    rows = table.to_pylist()
    write_parquet(maker.path / "confirm.parquet", pa.Table.from_pylist(
        [{**rows[0], "folder": folder}, *rows[1:]], schema=table.schema))  # fmt: skip
    study = Study.load(maker.path)
    assert {run.seed for run in study.confirm_runs} == {2}
    assert len(study.damaged()) == 1 and len(study.damaged()[0]) < 1_000


@pytest.mark.parametrize("text", ["", "study: [", "[1]", "study: {trials: x}", "study: 5"])
def test_a_study_file_that_is_none_is_one_sentence(text: str, maker, launch) -> None:
    maker.study()
    (maker.path / "study.yaml").write_text(text)
    for command in ("show", "report"):
        code, _, err = launch(command, maker.path)
        assert code == 0 if text == "" and not err else code == 2 and "study.yaml" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("line", ["[1]", "7", '{"epoch": "x"}', '{"epoch": 2, "val_top1": NaN}'])
def test_the_history_of_a_running_trial_ends_where_it_is_no_history(line: str, maker) -> None:
    maker.study()
    folder = maker.path / "trials" / "0000"
    folder.mkdir(parents=True)
    rows = ['{"epoch": 1, "val_top1": 0.5}', line, '{"epoch": 3, "val_top1": 0.5}']
    (folder / "history.jsonl").write_text("\n".join(rows))
    (run,) = Study.load(maker.path).running()
    assert [row["epoch"] for row in run.history] == [1]


def test_a_run_whose_record_is_damaged_goes_on(maker) -> None:
    maker.study()
    record = maker.trial(0, [0.5])
    record.write_config()
    spoil(record.folder / RESULT, "a list")
    with pytest.warns(UserWarning, match=r"put aside.*is run again"):
        again = read_or_put_aside(record.folder)
    assert again is not None and again.status == "running" and again.config == record.config
    assert not (record.folder / RESULT).exists()
    (left,) = record.folder.glob("*.damaged")
    assert left.name == f"{RESULT}.damaged", "config.yaml is sound, and stays"
    (record.folder / CONFIG).write_text("- a list")
    (record.folder / CHECKPOINT).touch()
    with pytest.warns(UserWarning, match=r"put aside.*goes on"):
        assert read_or_put_aside(record.folder) is None


def test_settings_of_a_form_are_checked_once_and_another_form_again(maker) -> None:
    """As many as there are trials: to check each by its values would take longer than all else."""
    maker.study()
    runs: list[RunRecord] = [maker.trial(number, [0.5]) for number in range(3)]
    spoil(runs[2].folder / RESULT, "a setting of another type")
    found = Study.load(maker.path)
    assert [run.number for run in found.records()] == [0, 1]
    assert {run.stage for run in found.runs} == {RunStage.SEARCH}
