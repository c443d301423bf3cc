"""Importance, comparison, tables, progress and costs of studies, on figures made by hand."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from report_studies import final, select
from scipy import stats

from ekd_ray.config import DistillConfig
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.errors import UserError
from ekd_ray.files import write_json
from ekd_ray.results import Study
from ekd_ray.results.progress import _drawn_views, progress, savings, time_table
from ekd_ray.results.records import LOCK
from ekd_ray.studies.comparison import compare_studies
from ekd_ray.studies.pipeline import lock_folder

SPACE = {"lr": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 1.0}}


def search(maker, score, *, count=40, epochs=9, space=SPACE, **settings):
    study = maker.study(space=space, **settings)
    draw = np.random.default_rng(0)
    for number in range(count):
        point = {"lr": float(10 ** draw.uniform(-4, 0)), "momentum": float(draw.uniform())}
        maker.trial(number, [score(point)] * epochs, **point)
    return study


def shares(table, column):
    return dict(zip(table["parameter"].to_pylist(), table[column].to_pylist(), strict=True))


def test_what_decides_the_score_is_important_by_both(maker):
    study = search(maker, lambda p: p["momentum"])
    table = study.importance()
    assert table["parameter"].to_pylist() == ["momentum", "lr"]
    for column in ("fanova", "ped_anova"):
        found = shares(table, column)
        assert found["momentum"] > 0.85 and sum(found.values()) == pytest.approx(1)
    assert table.to_pandas()["trials"].tolist() == [40, 40]


def test_a_logarithmic_parameter_is_judged_along_its_logarithm(maker):
    """Half of the variance comes of each; along lr itself its upper tenth would be nearly all."""
    study = search(maker, lambda p: (np.log10(p["lr"]) + 4) / 4 + p["momentum"], count=80)
    assert shares(study.importance(), "fanova")["lr"] == pytest.approx(0.5, abs=0.15)


def test_less_is_better_where_the_metric_says_so(maker):
    """All of the best tenth by the loss have the same choice; none of the worst."""
    study = maker.study(space={"optimizer": {"choices": ["sgd", "adamw"]}, **SPACE},
                        metric="val_nll")  # fmt: skip
    draw = np.random.default_rng(1)
    for number in range(40):
        good = number % 8 == 0
        point = {"optimizer": "adamw" if good else "sgd", "lr": float(10 ** draw.uniform(-4, 0)),
                 "momentum": float(draw.uniform())}  # fmt: skip
        loss = 0.1 if good else 1 + 0.01 * draw.uniform()
        maker.trial(number, [loss] * 9, metric="val_nll", **point)
    found = shares(study.importance(), "ped_anova")
    assert max(found, key=found.get) == "optimizer"


def test_trials_of_full_length_judge_and_an_epoch_is_asked_for(maker):
    study = maker.study(space=SPACE, rungs=[1, 3])
    for number in range(30):
        epochs = 9 if number < 8 else 3 if number < 22 else 1
        status = "complete" if epochs == 9 else "pruned"
        maker.trial(number, [0.1 * number / 30] * epochs, status=status, lr=0.01 + number / 99,
                    momentum=number / 30)  # fmt: skip
    assert set(study.importance()["trials"].to_pylist()) == {8}
    assert set(study.importance(epoch=3)["trials"].to_pylist()) == {22}
    assert study.importance(epoch=3)["epoch"].to_pylist() == [3, 3]
    assert study.importance("parameters").num_rows == 0


def test_a_parameter_that_only_some_trials_have_is_left_to_ped_anova(maker):
    study = maker.study(space=SPACE)
    for number in range(30):
        more = {"momentum": number / 30} if number % 2 else {}
        maker.trial(number, [number / 30] * 9, lr=0.001 * (number + 1), **more)
    found = shares(study.importance(), "fanova")
    assert found["lr"] == pytest.approx(1) and found["momentum"] is None


def test_too_little_is_no_importance_and_an_unknown_metric_is_named(maker):
    study = maker.study(space=SPACE)
    assert study.importance().num_rows == 0
    for number in range(7):
        maker.trial(number, [number / 9] * 9, lr=0.1, momentum=number / 7)
    assert Study.load(study.path).importance().num_rows == 0
    for figure in ("importance", "parallel", "contour"):
        with pytest.raises(UserError, match=f"{figure} yet: 7 trials .*at least 8 are needed"):
            getattr(Study.load(study.path).plot, figure)()
    maker.trial(7, [0.9] * 9, lr=0.1, momentum=0.99)
    assert Study.load(study.path).plot.importance().data
    assert Study.load(study.path).importance().num_rows == 2
    with pytest.raises(UserError, match=r"must be one of .* got 'top1'"):
        study.importance("top1")


# Tables and comparison


def confirmed(maker, path, scores, **settings):
    maker.path = path
    study = maker.study(space=SPACE, **settings)
    maker.trial(4, [0.5] * 9, lr=0.1, momentum=0.5)
    maker.confirm(
        [select("trial 4", s, v - 0.1) for s, v in enumerate(scores)]
        + [{**final("trial 4", s, v), "test_nll": 1.0 + v} for s, v in enumerate(scores)]
        + [{**final("none", s, v - 0.2), "test_nll": 2.0} for s, v in enumerate(scores)]
    )
    return study


def test_the_leaderboard_as_a_table_has_mean_sd_and_n(maker, tmp_path):
    study = confirmed(maker, tmp_path / "a", (0.5, 0.6, 0.8))
    table = study.leaderboard().to_table()
    first = table.to_pylist()[0]
    assert table["name"].to_pylist() == ["trial 4", "none"]
    assert table["role"].to_pylist() == ["winner", "baseline"]
    assert (first["winner"], first["failed"], first["param_lr"]) == (True, None, 0.05)
    assert first["test_top1_mean"] == pytest.approx(np.mean([0.5, 0.6, 0.8]))
    assert first["test_top1_sd"] == pytest.approx(np.std([0.5, 0.6, 0.8], ddof=1))
    assert (first["test_nll_n"], first["test_ece_n"], first["test_ece_mean"]) == (3, 0, None)
    assert table.to_pylist()[1]["val_top1_n"] == 0


def test_what_is_printed_is_short(maker, tmp_path):
    study = confirmed(maker, tmp_path / "a", (0.5, 0.6, 0.8))
    missed, head, *rows = str(study.leaderboard()).splitlines()
    assert missed.endswith("none"), "differences without a spread show nothing"
    assert head.split() == ["name", "role", "val_top1", "test_top1"]
    won = "trial 4 winner 0.5333 ± 0.1528 (n = 3) 0.6333 ± 0.1528 (n = 3)"
    assert rows[0].split() == won.split()
    assert rows[1].split() == ["none", "baseline", "0.4333", "±", "0.1528", "(n", "=", "3)"]
    assert rows[1].index("0.43") == head.index("test_top1")
    shown = str(study)
    first, second = shown.splitlines()
    assert str(study.path) in first and "trial 4" in second and "63.33" in second
    assert "1 of" in shown and "val_top1 50.00 %" in shown
    assert "runs" not in vars(study)  # to print it reads nothing for good
    shutil.rmtree(study.path)
    assert str(study.path) in str(study)


def test_a_leaderboard_before_the_end_is_printed(maker):
    study = maker.study(space=SPACE)
    assert len(str(study.leaderboard()).splitlines()) == 1
    maker.confirm(
        [
            select("trial 1", 0, 0.5), final("trial 1", 0, 0.25),
            {**final("kd", 0, 0.4), "reason": "died", "test_top1": None},
        ]
    )  # fmt: skip
    missed, _, *rows = str(Study.load(study.path).leaderboard()).splitlines()
    assert missed.endswith("kd"), "nothing is known of a gain over what failed"
    assert "0.5000 (n = 1)" in rows[0] and "0.2500 (n = 1)" in rows[0]
    assert rows[1].split() == ["kd", "baseline", "failed"]


def test_two_studies_are_compared_by_welchs_interval(maker, tmp_path):
    ours, theirs = (0.5, 0.6, 0.8), (0.5, 0.52, 0.51, 0.49)
    one = confirmed(maker, tmp_path / "a", ours)
    other = confirmed(maker, tmp_path / "b", theirs, sampler="random")
    table = compare_studies(one, other).to_pylist()
    row = next(r for r in table if (r["name"], r["figure"]) == ("winner", "test_top1"))
    a, b = np.array(ours), np.array(theirs)
    u, v = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    reach = stats.t.ppf(0.975, (u + v) ** 2 / (u**2 / 2 + v**2 / 3)) * (u + v) ** 0.5
    assert row["difference"] == pytest.approx(a.mean() - b.mean())
    assert row["high"] - row["difference"] == pytest.approx(reach)
    assert (row["this_n"], row["other_n"]) == (3, 4)
    settings = {r["name"]: (r["this_value"], r["other_value"]) for r in table
                if r["kind"] == "setting"}  # fmt: skip
    assert settings == {"sampler": ('"auto"', '"random"')}
    costs = {r["figure"]: r["this"] for r in table if r["kind"] == "cost"}
    assert costs == {"trials": 1, "epochs": 9, "hours": pytest.approx(4.5 / 3600)}


def test_studies_of_other_data_are_not_compared(maker, tmp_path):
    one = maker.study()
    maker.path = tmp_path / "b"
    other = maker.study(distill=one.config.distill.replace(dataset="digits"))
    with pytest.raises(UserError, match=r"is of synthetic and .* of digits: compare studies of"):
        compare_studies(one, other)


# Progress, time


def test_progress_of_a_running_study(maker):
    study = maker.study(space=SPACE)
    assert progress(study).stage == "teacher" and progress(study).quiet_seconds is None
    maker.trial(0, [0.5] * 9, lr=0.1)
    folder = maker.path / "trials" / "0001"
    folder.mkdir()
    (folder / "config.yaml").write_text(study.config.distill.replace(lr=0.2).to_yaml())
    (folder / "history.jsonl").write_text(json.dumps({"epoch": 1, "val_top1": 0.2}) + "\n")
    study = Study.load(study.path)
    found = progress(study)
    assert (found.stage, found.trials) == ("search", {"complete": 1, "running": 1})
    assert 0 <= found.quiet_seconds <= time.time()
    (trial,) = study.running()
    assert (trial.number, trial.params["lr"], trial.last["val_top1"]) == (1, 0.2, 0.2)


def test_progress_of_an_extension_is_not_that_of_the_study_before(maker, tmp_path):
    study = maker.study(space=SPACE, trials=2)
    maker.trial(0, [0.5] * 9, lr=0.1)
    (maker.path / "best").mkdir()
    (maker.path / "best" / "MANIFEST").touch()
    (maker.path / "confirm").mkdir()
    (maker.path / "confirm" / "select-0").mkdir()
    assert progress(study).stage == "finished" and progress(study).driven is None
    extended = replace(study, header={**study.header, EXTENDED_FROM: 1})
    with lock_folder(maker.path):
        assert (progress(extended).stage, progress(extended).driven) == ("search", True)
    (maker.path / LOCK).touch()
    assert progress(extended).driven is False
    with lock_folder(maker.path):
        pass
    maker.trial(1, [0.5] * 9, lr=0.2)
    again = replace(Study.load(study.path), header=extended.header)
    assert progress(again).stage == "confirm"


def test_time_is_that_of_all_epochs_and_stops_save_the_rest(maker):
    study = maker.study(space=SPACE)
    maker.trial(0, [0.5] * 9, lr=0.1)
    maker.trial(1, [0.5] * 3, status="pruned", lr=0.2)
    rows = {row["stage"]: row for row in time_table(study).to_pylist()}
    assert rows["search: trials of full length"]["hours"] == pytest.approx(4.5 / 3600)
    assert rows["search: stopped early"]["epochs"] == 3
    saved = savings(study)
    assert (saved.stopped_epochs, saved.cache_hours) == (6, None)
    assert saved.stopped_hours == pytest.approx(6 * 0.5 / 3600)


def test_the_cache_saves_what_the_network_was_not_asked(maker, winner_config):
    """80 images, 40 % of them for validation: 3 steps of 16 an epoch."""
    study = maker.study(space=SPACE)
    record = maker.trial(0, [0.5] * 9, lr=0.1)
    replace(record, config=winner_config.replace(epochs=9).to_dict()).write()
    write_json(maker.path / "cache.json", {"rows": 100, "timed_rows": 10, "seconds": 5.0})
    saved = savings(Study.load(study.path))
    assert (saved.views, saved.asked) == (9 * 48, 100)
    assert saved.cache_hours == pytest.approx((9 * 48 - 100) * 0.5 / 3600)


def test_views_are_counted_with_the_rounding_of_the_split():
    # round(25 * 0.9) is 22, but the split holds out round(2.5) = 2 and trains on 23.
    config = DistillConfig(method="kd", batch_size=23, validation_fraction=0.1)
    assert _drawn_views(config, 25) == 23


def test_the_importance_of_the_report_is_shown_while_it_is_of_these_trials(maker, launch):
    study = search(maker, lambda p: p["momentum"])
    assert "ekd-ray report" in launch("show", study.path)[1]
    assert json.loads(launch("show", study.path, "--json")[1])["importance"] is None
    assert launch("report", study.path)[0] == 0
    shown = json.loads(launch("show", study.path, "--json")[1])["importance"]
    assert shown == study.importance().to_pylist() and "fANOVA" in launch("show", study.path)[1]
    maker.trial(40, [0.5] * 9, lr=0.1, momentum=0.5)  # one more: it is of other trials now
    assert json.loads(launch("show", study.path, "--json")[1])["importance"] is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"of": 1}',
        '{"of": "MARK", "rows": [{"trials": "x"}]}',
        '{"of": "MARK", "rows": [3]}',
        '{"of": "MARK"}',
    ],
)
def test_a_kept_importance_that_is_damaged_is_none(maker, launch, text):
    study = search(maker, lambda p: p["momentum"], count=9)
    assert launch("report", study.path)[0] == 0
    path = study.path / "importance.json"
    path.write_text(text.replace("MARK", json.loads(path.read_text())["of"]))
    code, out, _ = launch("show", study.path)
    assert code == 0 and "ekd-ray report" in out
