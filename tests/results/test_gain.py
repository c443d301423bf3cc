"""The winner's gain over the student alone, KD and the authors' values, and --require-gain."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from report_studies import BASE, SPACE, final, select
from scipy.stats import ttest_rel

from ekd_ray.cli import tune_command
from ekd_ray.cli.main import run_command
from ekd_ray.cli.study_text import print_study
from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results.leaderboard import gain_values
from ekd_ray.results.paired import LEAST_SEEDS
from ekd_ray.results.words import describe_missed_gain, refuse_without_gain

WINNER = (0.500, 0.510, 0.526)
AHEAD = (0.400, 0.412, 0.420)
BEHIND = (0.600, 0.612, 0.620)
NEAR = (0.505, 0.500, 0.520)


def confirmed(maker, metric="val_top1", winner=WINNER, **rows):
    """A study of a winner and rows with these figures of the metric on the test split."""
    study = maker.study(distill=BASE, metric=metric, space=SPACE)
    maker.trial(1, [0.5] * 9, metric=metric)
    wins = [select("trial 1", seed, 0.5, metric=metric) for seed, _ in enumerate(winner)]
    tested = metric.replace("val_", "test_")
    for name, values in {"trial 1": winner, **rows}.items():
        for seed, value in enumerate(values):
            wins.append({**final(name, seed, 0.5), tested: value})
    maker.confirm(wins)
    return type(study).load(study.path)


@pytest.mark.parametrize(("alone", "settled", "said"), [
    (AHEAD, True, None), (BEHIND, False, "behind"), (NEAR, False, "not told apart"),
])  # fmt: skip
def test_the_verdict_is_that_of_a_paired_t_test(maker, alone, settled, said):
    board = confirmed(maker, none=alone).leaderboard()
    oracle = ttest_rel(WINNER, alone).confidence_interval(0.95)
    found = board.gain.over["none"]
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high))
    assert board.gain.settled == settled == (oracle.low > 0)
    text, refusal = describe_missed_gain(board), refuse_without_gain(board)
    assert bool(text) == bool(refusal) == (not settled)
    if said:
        assert text.startswith("No gain shown over the student alone") and "Try" in text
        assert said in text and said in refusal
        difference = 100 * (np.mean(WINNER) - np.mean(alone))
        assert f"{abs(difference):.2f}" in text
        assert repr(board).startswith("No gain shown over the student alone")
    else:
        assert not repr(board).startswith("no gain")


def test_rows_are_judged_one_by_one(maker):
    rows = {"none": AHEAD, "kd": NEAR, "authors' values": BEHIND, "defaults": BEHIND}
    gain = (board := confirmed(maker, **rows).leaderboard()).gain
    assert gain.missed() == ["kd", "authors' values"] and gain.settled
    text = describe_missed_gain(board)
    assert "not told apart from KD" in text and "behind the authors' values" in text
    assert "the student alone" not in text and "defaults" not in text
    short = describe_missed_gain(board, size=False)
    assert "not told apart from KD" in short and "behind the authors' values" in short
    assert "points" in text and "points" not in short
    values = json.loads(json.dumps(gain_values(board)))
    assert values["settled"] and values["over"]["kd"]["n"] == 3


def test_where_less_is_better_the_sign_is_turned(maker):
    lower, higher = (0.9, 0.91, 0.93), (1.2, 1.22, 1.21)
    board = confirmed(maker, "val_nll", winner=lower, none=higher).leaderboard()
    assert board.gain.metric == "test_nll" and board.gain.settled
    assert board.gain.over["none"].mean == pytest.approx(np.mean(higher) - np.mean(lower))


def test_a_metric_that_was_not_recorded_on_the_test_split_gives_way_to_accuracy(maker):
    study = confirmed(maker, none=AHEAD)
    other = study.config.replace(metric="val_ood_auroc")
    board = type(study.leaderboard())(study.leaderboard(), other)
    assert board.gain.metric == "test_top1" and board.gain.settled


def test_two_seeds_settle_nothing_and_say_so(real_study):
    board = real_study[0].leaderboard()
    assert not board.gain.settled and f"at least {LEAST_SEEDS} seeds" in describe_missed_gain(board)


def test_without_its_row_there_is_no_gain_to_speak_of(maker):
    board = confirmed(maker, defaults=BEHIND).leaderboard()
    assert board.gain is None and describe_missed_gain(board) == ""
    assert "student alone" in refuse_without_gain(board)


def test_a_row_that_failed_is_said_and_settles_nothing(maker):
    study = maker.study(distill=BASE, space=SPACE)
    maker.trial(1, [0.5] * 9)
    failed = {**select("none", 0, 0.5), "stage": "final", "reason": "loss became nan"}
    finals = [final("trial 1", 0, 0.5), {**failed, "val_top1": None}]
    maker.confirm([select("trial 1", 0, 0.5), *finals])
    board = type(study).load(study.path).leaderboard()
    assert board.missed() == ["none"] and board.gain is None
    text = describe_missed_gain(board)
    assert text.startswith("No gain shown over the student alone") and "failed" in text
    assert "nan" in refuse_without_gain(board)
    assert repr(board).startswith("No gain shown over the student alone")


def test_the_first_line_says_it_at_the_end_of_tune_and_on_the_card(real_study, exported, capsys):
    print_study(real_study[0], exported)
    assert capsys.readouterr().out.startswith("No gain shown over the student alone")
    card = (exported.path / "README.md").read_text(encoding="utf-8")
    _, _, body = card.partition("\n# ")
    assert body.splitlines()[2].startswith("**No gain shown over the student alone")
    assert exported.metrics["gain"]["settled"] is False


@pytest.mark.parametrize(("alone", "code"), [(AHEAD, 0), (NEAR, 1)])
def test_a_finished_study_is_judged_again_by_its_resumption(
    maker, monkeypatch, capsys, alone, code
):
    study = confirmed(maker, none=alone)
    bundle = SimpleNamespace(path=study.path / "best", metrics={"gain": {}})
    monkeypatch.setattr(tune_command, "_run_study", lambda *_, **__: bundle)
    argv = ["--resume", "--out", str(study.path), "--json"]
    assert run_command(argv, "tune") == 0
    capsys.readouterr()
    assert run_command([*argv, "--require-gain"], "tune") == code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["study"] == str(study.path)
    assert ("not told apart" in printed.err) == bool(code)


@pytest.mark.parametrize(("settings", "word"), [
    ({"baselines": ["kd"]}, "baselines"), ({"confirm_seeds": LEAST_SEEDS - 1}, "--seeds"),
])  # fmt: skip
def test_what_can_never_settle_is_refused_before_compute(settings, word):
    config = StudyConfig(**settings)
    with pytest.raises(UserError, match=word):
        tune_command._check_gain_can_settle(
            config, SimpleNamespace(require_gain=True, resume=False)
        )
    tune_command._check_gain_can_settle(config, SimpleNamespace(require_gain=False))


def test_a_study_of_too_few_seeds_is_not_told_to_change_them():
    config, request = StudyConfig(confirm_seeds=2), SimpleNamespace(require_gain=True, resume=True)
    with pytest.raises(UserError, match="another study with --seeds 3"):
        tune_command._check_gain_can_settle(config, request)


def test_export_writes_nothing_without_a_gain(real_study, tmp_path, capsys):
    out = tmp_path / "best"
    argv = [str(real_study[0].path), "--out", str(out), "--require-gain", "--json"]
    assert run_command(argv, "export") == 1 and not out.exists()
    printed = capsys.readouterr()
    assert "not told apart" in printed.err and json.loads(printed.out)["ok"] is False
