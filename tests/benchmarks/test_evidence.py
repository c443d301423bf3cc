"""Rows of configurations under the same seeds: what is trained, kept and compared."""

import sys

import pytest
from scipy import stats

from benchmarks import evidence
from ekd_ray.losses import METHODS
from ekd_ray.results.paired import Paired


@pytest.fixture
def args(tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.pth"
    teacher.touch()

    def parsed(*words):
        monkeypatch.setattr(sys, "argv", ["evidence", *words, "--teacher-weights", str(teacher)])
        return evidence.parse()

    return parsed


@pytest.mark.parametrize("table", evidence.TABLES)
def test_every_row_is_a_run_and_no_two_are_the_same(args, table):
    given = args(table)
    rows = evidence.TABLES[table]
    runs = {name: evidence.configuration(given, row, seed=1) for name, row in rows.items()}
    assert len({run.fingerprint() for run in runs.values()}) == len(rows)
    assert all((run.seed, run.split_seed) == (1, 0) for run in runs.values())


def test_every_method_is_a_row(args):
    rows = evidence.TABLES["methods"].values()
    given = args("methods")
    assert {evidence.configuration(given, row, 0).method for row in rows} == {*METHODS}


def test_the_first_row_is_there_whatever_is_chosen(args):
    assert args("methods", "--rows", "ekd,dkd").rows == ["kd", "ekd", "dkd"]
    with pytest.raises(SystemExit):
        args("methods", "--rows", "edk")
    with pytest.raises(SystemExit):
        args("methods", "--seeds", "2")


def test_a_run_is_trained_once(args, tmp_path, monkeypatch):
    """Also after a kill in the middle of a line."""
    trained = []

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, settings, root):
            trained.append(settings["seed"])
            return Done(dict.fromkeys(evidence.FIGURES, settings["seed"] + 0.5))

    class Done:
        def __init__(self, figures):
            self.result = lambda: figures

    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(evidence, "as_completed", list)
    keep = tmp_path / "kept.jsonl"
    given = args("methods", "--rows", "ekd", "--seeds", "3", "--keep", str(keep))
    found = evidence.measure(given)
    assert sorted(trained) == [0, 0, 1, 1, 2, 2] and list(found) == ["kd", "ekd"]
    keep.write_text(keep.read_text()[:-30])
    assert evidence.measure(given) == found and len(trained) == 7


def test_differences_are_paired_with_the_first_row():
    values = {"kd": [0.50, 0.61, 0.55], "ekd": [0.53, 0.63, 0.58]}
    rows = evidence.summarize({
        name: [dict.fromkeys(evidence.FIGURES, value) for value in numbers]
        for name, numbers in values.items()
    })  # fmt: skip
    test = stats.ttest_rel(values["ekd"], values["kd"]).confidence_interval(0.95)
    found = Paired(**rows["ekd"]["test_top1"]["difference"])
    assert (found.low, found.high) == pytest.approx((test.low, test.high))
    table = evidence.write_table(rows).splitlines()
    assert table[2].startswith("| ekd | 58.0* [") and table[3].startswith("| kd | 55.3 [")
