"""The functions of the package do what the commands do, and leave this process as it was."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ekd_ray as ekd
from ekd_ray.cli import distill_command, request, teacher_command, tune_command
from ekd_ray.studies import api

PAIR = {"pair": "resnet20-resnet8", "dataset": "digits"}
FLAGS = ("--dataset", "digits", "--pair", "resnet20-resnet8")
TINY = {"dataset": "digits", "train_subset": 120, "epochs": 1, "progress": False}


def parsed(command, *argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*map(str, argv)])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The configuration that `tune` would run, unchecked."""
    found = {}

    def keep(recipe, **options):
        found.update(options)
        return recipe.config

    monkeypatch.setattr(api, "prepare_study", keep)
    monkeypatch.setattr(api, "conduct_study", lambda config, out, *_, **__: found.update(
        config=config, out=out))  # fmt: skip
    monkeypatch.setattr(api.Study, "load", lambda path: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)

    def ask(*args, **keywords):
        ekd.tune(*args, progress=False, **keywords)
        return found["config"], found

    return ask


def flags(*argv):
    return request.study_request(parsed(tune_command, *argv)).studies[""].config


def test_keywords_and_flags_ask_for_the_same_study(asked, tmp_path):
    config, found = asked(
        **PAIR, student="resnet14", train_subset=500, epochs=4, seed=3, trials=5, confirm_seeds=4,
        data_root="data", teacher_weights=Path("t.safetensors"), gpus_per_trial=0.5, lr=0.1,
        warm_start=[Path("runs/a")],
    )  # fmt: skip
    assert config == flags(
        *FLAGS, "--student", "resnet14", "--train-subset", 500, "--epochs", 4, "--seed", 3,
        "--trials", 5, "--seeds", 4, "--data-root", "data", "--teacher-weights", "t.safetensors",
        "--gpus-per-trial", 0.5, "--set", "lr=0.1",
    )  # fmt: skip
    assert (config.trials, config.distill.lr, config.distill.epochs) == (5, 0.1, 4)
    assert (config.seed, config.distill.seed) == (3, 3)
    assert config.distill.teacher_weights == str(tmp_path / "t.safetensors")
    assert (config.data_root, found["warm_start"]) == (str(tmp_path / "data"), ["runs/a"])
    assert found["out"] == tmp_path / "runs" / "digits-resnet20-resnet14"


def test_warm_ups_follow_the_epochs_and_a_method_has_its_own_recipe(asked):
    config, _ = asked("resnet32x4-resnet8x4", epochs=8)
    assert (config.distill.epochs, config.authors["ekd_warmup"]) == (8, 1)
    config, _ = asked("resnet32x4-resnet8x4", method="dkd")
    assert config == flags("--pair", "resnet32x4-resnet8x4", "--method", "dkd")
    assert config.distill.method == "dkd"


def test_the_space_has_what_is_given_on_top_of_the_recipe(asked):
    space = {
        "temperature": ekd.log(1, 4), "lr": ekd.uniform(0.01, 0.1, step=0.01),
        "batch_size": ekd.integer(16, 64, step=16), "ce_weight": None,
        "evidence": ekd.choice("softplus", "exp"),
    }  # fmt: skip
    config, _ = asked(**PAIR, space=space, kd_weight=2)
    assert config.space["temperature"] == {"low": 1, "high": 4, "log": True}
    assert config.space["lr"] == {"low": 0.01, "high": 0.1, "step": 0.01}
    assert config.space["batch_size"] == {"low": 16, "high": 64, "step": 16}
    assert config.space["evidence"] == {"choices": ["softplus", "exp"]}
    assert "ce_weight" not in config.space and "ekd_weight" in config.space
    assert "kd_weight" not in config.space and config.distill.kd_weight == 2


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({**PAIR, "trails": 3}, "unknown argument of tune: 'trails'. Did you mean 'trials'"),
        ({**PAIR, "resum": True}, "Did you mean 'resume'"),
        ({**PAIR, "distill": {}}, "unknown argument of tune: 'distill'"),
        ({**PAIR, "seeds": 1}, "unknown argument of tune: 'seeds'.* give confirm_seeds="),
        ({**PAIR, "top_k": 1}, "unknown argument of tune: 'top_k'.* give confirm_top_k="),
        ({"pair": "resnet20-resnet9", "dataset": "digits"}, "Did you mean 'resnet20-resnet8'"),
        ({}, "name what to distil: pair T-S, or teacher T student S"),
        ({**PAIR, "epochs": 0}, "epochs must be >= 1, got 0"),
        ({**PAIR, "lr": "fast"}, "lr must be a number, got 'fast'"),
        ({**PAIR, "space": {"tempratur": ekd.log(1, 2)}}, "Did you mean 'temperature'"),
        ({**PAIR, "space": {"lr": ekd.log(1, 2)}, "lr": 1.0}, "lr is given a value, 1.0, and a"),
        ({**PAIR, "wait": False, "callbacks": [ekd.Callback()]}, "callbacks are called in the pr"),
        ({**PAIR, "extend": 3}, "extend=N goes together with resume=True and out"),
        ({"resume": True, "out": "nowhere"}, "holds nothing to resume .*: check out, or drop res"),
        ({**PAIR, "teacher": 3}, "teacher must be a text, a Module or a function, got 3"),
    ],
)
def test_a_mistake_is_an_exception_that_speaks_of_keywords(asked, keywords, said):
    with pytest.raises(ekd.UserError, match=said) as found:
        asked(**keywords)
    assert "--" not in str(found.value)


WRONG = [
    ("tune distill teacher", {"plugins": None}, "plugins must be a list"),
    ("tune distill teacher", {"plugins": [os]}, "plugins must be a list, each a path"),
    ("tune distill", {"pair": 5}, "pair must be a text"),
    ("tune distill teacher", {"dataset": 3}, "dataset must be a text"),
    ("tune distill", {"student": 3}, "student must be a text, a Module or a function"),
    ("teacher", {"model": 3}, "model must be a text, a Module or a function"),
    ("tune", {"space": [1]}, "space must be a mapping"),
    ("tune distill teacher", {"epochs": "3"}, "epochs must be a whole number"),
    ("tune", {"extend": "3"}, "extend must be a whole number"),
    ("tune distill teacher", {"out": 3}, "out must be a path"),
    ("tune distill", {"recipe": 3}, "recipe must be a path"),
    ("tune distill teacher", {"data_root": 3}, "data_root must be a path"),
    ("tune distill", {"teacher_zoo": 3}, "teacher_zoo must be a path"),
    ("teacher", {"seeds": 3}, "seeds must be a list, each a whole number"),
    ("distill", {"config": {"lr": 1}}, "config must be a DistillConfig or a path"),
    ("tune distill teacher", {"callbacks": print}, "callbacks must be a list"),
    ("tune distill teacher", {"callbacks": [3]}, "a callback must be an object with .* epoch"),
    ("tune distill teacher", {"callbacks": [Path()]}, "a callback must be an object with"),
    ("tune distill teacher", {"callbacks": [ekd.Callback]}, "a callback must be an object with"),
    ("evaluate", {"bundle": 3}, "bundle must be a Bundle or a path"),
    ("evaluate", {"bundle": "x", "dataset": 3}, "dataset must be a text"),
    ("study bundle run", {"path": 3}, "path must be a path"),
    ("log uniform", {"low": "1", "high": 3}, "low must be a number"),
    ("integer", {"low": 1.5, "high": 3}, "low must be a whole number"),
]
DOORS = {
    "tune": (ekd.tune, PAIR), "distill": (ekd.distill, PAIR),
    "teacher": (ekd.train_teacher, {"model": "resnet8", "dataset": "digits"}),
    "evaluate": (ekd.evaluate, {}), "study": (ekd.Study.load, {}), "bundle": (ekd.Bundle.load, {}),
    "run": (ekd.RunResult.load, {}), "log": (ekd.log, {}), "uniform": (ekd.uniform, {}),
    "integer": (ekd.integer, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("door", "wrong", "said"),
    [(door, wrong, said) for doors, wrong, said in WRONG for door in doors.split()],
)
def test_an_argument_of_another_kind_is_refused_before_anything(door, wrong, said, monkeypatch):
    for name in ("prepare_study", "planned", "load_plugin"):
        monkeypatch.setattr(api, name, None)  # not callable
    function, given = DOORS[door]
    with pytest.raises(ekd.UserError, match=f"^{said}.*, got "):
        function(**given | wrong)


def test_scalars_of_numpy_are_numbers(asked):
    one, four = np.float32(1), np.int64(4)
    space = {"temperature": ekd.log(one, four), "batch_size": ekd.choice(np.int64(16), 32)}
    config, _ = asked(**PAIR, space=space, epochs=four, lr=np.float64(0.5))
    assert config.space["temperature"] == {"low": 1, "high": 4, "log": True}
    assert config.space["batch_size"] == {"choices": [16, 32]}
    assert (config.distill.epochs, config.distill.lr) == (4, 0.5)
    for spec in (ekd.uniform(one, four, step=one), ekd.integer(four, four, step=four)):
        assert {type(value) for value in spec.values()} <= {int, float}


def test_a_folder_that_holds_something_else_is_refused_before_anything(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ekd.UserError, match="holds no study: choose another out"):
        ekd.tune(**PAIR, out=tmp_path, progress=False, teacher="resnet8",
                 teacher_training={"epochs": 1})  # fmt: skip
    assert [*os.listdir(tmp_path)] == ["file"]


def state_of_process():
    ours = ("RAY_", "TUNE_", "CUDA_", "GLIBC_")  # libraries set some of their own
    return (
        {k: v for k, v in os.environ.items() if k.startswith(ours)},
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_rng_state(),
    )  # fmt: skip


def assert_same_state(now, before):
    assert {*now[0].items()} ^ {*before[0].items()} == set()
    assert now[1:-1] == before[1:-1]
    assert torch.equal(now[-1], before[-1])


class Log(ekd.Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def stage(self, title, total, epochs):
        self.told.append((title, total, epochs))

    def epoch(self, number, row):
        self.told.append((number, row["epoch"]))


@pytest.mark.slow
def test_a_teacher_and_a_student_from_keywords_as_from_flags(launch, tmp_path, capsys):
    log, before = Log(), state_of_process()
    teacher = ekd.train_teacher(
        "resnet8", **TINY, evidential=True, out=tmp_path / "t", callbacks=[log], test=True
    )
    assert_same_state(state_of_process(), before)
    assert log.told == [("training", 1, 1), (0, 1), ("test split", 1, 0)]
    assert {"val_top1", "test_top1"} <= teacher.metrics.keys() and teacher.log_prior is not None
    assert [row["epoch"] for row in teacher.history] == [1]
    code, _, err = launch(
        "train_teacher", "--model", "resnet8", "--dataset", "digits", "--train-subset", 120,
        "--epochs", 1, "--evidential", "--test", "--quiet", "--out", tmp_path / "flags",
    )  # fmt: skip
    assert code == 0, err
    ours, theirs = load_file(teacher.weights), load_file(tmp_path / "flags/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    before = state_of_process()  # the command has set a handler of its own

    class Rows:  # no Callback: some of its methods are enough
        count = 0

        def epoch(self, number, row):
            self.count += 1

    rows = Rows()
    result = ekd.distill(
        **PAIR, teacher="resnet8", teacher_weights=teacher.weights, train_subset=120, epochs=1,
        out=tmp_path / "s", callbacks=[rows], temperature=2.0,
    )  # fmt: skip
    assert_same_state(state_of_process(), before)
    assert rows.count == 1
    assert (result.config.temperature, result.config.kd_weight) == (2.0, 4.5)
    assert "training: 100%" in capsys.readouterr().err
    assert result.model()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert "validation accuracy" in result._repr_html_()
    shown = str(result)
    assert str(result.path) in shown and "val_top1" in shown
    assert len(shown) < len(str(result.path)) + 100
    again = ekd.distill(out=tmp_path / "s", resume=True, progress=False)
    assert again.record == result.record
    from_file = ekd.distill(config=result.config, out=tmp_path / "c", progress=False, seed=0)
    assert from_file.metrics["train_loss"] == result.metrics["train_loss"]


def test_the_commands_and_the_functions_make_one_run():
    given = ("--set", "lr=0.1", "--seed", 3, "--epochs", 2)
    run = request.run_request(parsed(distill_command, *FLAGS, *given)).run
    found = []

    def keep(run, **_):
        found.append(run)
        raise KeyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "planned", keep)
        with pytest.raises(KeyError):
            ekd.distill(**PAIR, lr=0.1, seed=3, epochs=2)
        with pytest.raises(KeyError):
            ekd.train_teacher("resnet8", seeds=[3, 4], candidates=2, evidential=True)
    teacher = request.teacher_request(
        parsed(teacher_command, "--model", "resnet8", "--seeds", 3, 4, "--evidential")
    )
    assert found == [run, teacher.run]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"trials": 3}, "unknown argument of distill: 'trials'"),
        ({"config": "x.yaml"}, "config is complete by itself: drop pair and recipe"),
        ({"workers": 0}, r"workers takes N or MIN:MAX with 1 <= MIN <= MAX, got '0'"),
    ],
)
def test_mistakes_of_one_run(keywords, said, tmp_path):
    with pytest.raises(ekd.UserError, match=said):
        ekd.distill(**PAIR, **keywords, method="none", out=tmp_path / "x", progress=False)


def test_what_a_callback_raises_ends_the_run_which_can_be_continued(tmp_path):
    class Stop(ekd.Callback):
        def epoch(self, number, row):
            raise RuntimeError("enough")

    options = {**TINY, "epochs": 2, "method": "none", "student": "resnet8", "out": tmp_path / "r"}
    with pytest.raises(RuntimeError, match="enough"):
        ekd.distill(**options, callbacks=[Stop()])
    log = Log()
    ekd.distill(**options, callbacks=[log], resume=True)
    assert log.told[-1] == (0, 2)


def test_a_stop_by_the_user_is_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt), api._in_python():
        raise ekd.studies.api.Interrupted
