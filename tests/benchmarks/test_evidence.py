"""Rows of configurations under the same seeds: what is trained, kept and compared."""

import sys
from types import SimpleNamespace

import pytest
from scipy import stats

from benchmarks import evidence
from ekd_ray.config import DistillConfig
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
    given = args(table, "--evidential-teacher", "own.safetensors")
    runs = {name: evidence.configuration(given, name, seed=1) for name in given.rows}
    assert list(runs) == list(evidence.TABLES[table])
    assert len({run.fingerprint() for run in runs.values()}) == len(runs)
    assert all((run.seed, run.split_seed) == (1, 0) for run in runs.values())


def test_every_method_is_a_row(args):
    given = args("methods")
    assert {evidence.configuration(given, name, 0).method for name in given.rows} == {*METHODS}


def test_a_form_is_tried_under_either_teacher(args):
    assert not [name for name in args("forms").rows if "evidential teacher" in name]
    given = args("forms", "--evidential-teacher", "own.safetensors")
    plain, evidential = (
        evidence.configuration(given, f"softplus, second order{end}", 0)
        for end in ("", ", evidential teacher")
    )
    assert (evidential.teacher_weights, evidential.teacher_normalization) == (
        "own.safetensors", None
    )  # fmt: skip
    same = ("method", "evidence", "kd_weight", "ekd_weight", "lr", "seed")
    assert all(getattr(plain, name) == getattr(evidential, name) for name in same)
    assert plain.teacher_normalization == "imagenet" and plain.kd_weight == 0


def test_a_run_under_another_evidential_teacher_is_another(args, tmp_path):
    names = set()
    teacher = tmp_path / "own.safetensors"
    for weights in (b"one", b"two", b"two"):
        teacher.write_bytes(weights)
        given = args("forms", "--evidential-teacher", str(teacher))
        for row in ("softplus, both orders", "softplus, both orders, evidential teacher"):
            names.add(evidence.name_run(evidence.configuration(given, row, 0), given))
    assert len(names) == 3


def test_a_row_can_have_the_values_that_a_study_found(args, monkeypatch):
    best = DistillConfig(temperature=7.0, lr=0.02, ekd_weight=3.0)
    study = SimpleNamespace(
        config=SimpleNamespace(space={"temperature": {}, "lr": {}}),
        best=lambda: SimpleNamespace(config=best),
    )
    monkeypatch.setattr(evidence.Study, "load", {"runs/ekd": study}.get)
    given = args("methods", "--rows", "ekd", "--tuned", "ekd=runs/ekd")
    assert list(given.rows) == ["kd", "ekd", "ekd, tuned"]
    found, usual = (evidence.configuration(given, name, 0) for name in ("ekd, tuned", "ekd"))
    assert (found.temperature, found.lr) == (7.0, 0.02) != (usual.temperature, usual.lr)
    assert found.ekd_weight == usual.ekd_weight, "it was not searched"
    for wrong in ("edk=runs/ekd", "runs/ekd"):
        with pytest.raises(SystemExit):
            args("methods", "--tuned", wrong)


def test_the_first_row_is_there_whatever_is_chosen(args):
    assert list(args("methods", "--rows", "ekd; dkd").rows) == ["kd", "ekd", "dkd"]
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
    low, high = stats.t(2, 58, 5 / 3**0.5).interval(0.95)
    assert table[2].startswith(f"| `ekd` | 58.0 ± {(high - low) / 2:.1f}* | 58.0 ± ")
    assert table[3].startswith("| `kd` | 55.3 ± ")
