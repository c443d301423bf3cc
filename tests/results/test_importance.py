"""Importance, comparison, tables, progress and costs of studies, on figures made by hand."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from report_studies import BASE, final, select
from scipy import stats

from ekd_ray.config import DistillConfig
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.errors import UserError
from ekd_ray.files import write_json
from ekd_ray.results import Study
from ekd_ray.results.importance import describe_error, read_importance, write_importance
from ekd_ray.results.model_figures import find_effects, fit_study_model
from ekd_ray.results.progress import _drawn_views, progress, savings, time_rows
from ekd_ray.results.records import LOCK
from ekd_ray.studies.comparison import compare_studies
from ekd_ray.studies.pipeline import lock_folder

SPACE = {"lr": {"low": 1e-4, "high": 1.0, "log": True}, "momentum": {"low": 0.0, "high": 1.0}}


def search(maker, score, *, count=40, epochs=9, space=SPACE, **settings):
    study = maker.study(space=space, **settings)
    draw = np.random.default_rng(0)
    for number in range(count):
        point = {"lr": float(10 ** draw.uniform(-4, 0)), "momentum": float(draw.uniform())}
        metric = study.config.metric
        maker.trial(number, [score(point)] * epochs, metric=metric, **point)
    return study


def shares(table, column):
    return dict(zip(table["parameter"].to_pylist(), table[column].to_pylist(), strict=True))


def test_what_decides_the_score_is_important(maker):
    study = search(maker, lambda p: p["momentum"])
    table = study.importance()
    assert table["parameter"].to_pylist() == ["momentum", "lr"]
    assert shares(table, "main")["momentum"] > 0.9 > 0.1 > shares(table, "total")["lr"]
    assert table.to_pandas()["trials"].tolist() == [40, 40]
    (row, _) = table.to_pylist()
    assert row["error"] < 0.2 * row["spread"] and row["metric"] == "val_top1"


def test_the_effects_of_a_known_function_are_its_sobol_indices():
    """Of Ishigami's function (1990) over a cube, whose variances are known in closed form."""
    numbers = ("momentum", "kd_weight", "ce_weight")
    space = {name: {"low": -math.pi, "high": math.pi} for name in numbers}

    def score(points):
        x, y, z = np.array([[point[name] for name in numbers] for point in points]).T
        return np.sin(x) + 7 * np.sin(y) ** 2 + 0.1 * z**4 * np.sin(x)

    found = {effect.parameter: effect for effect in find_effects(score, space)}
    alone, whole = (0.3139, 0.4424, 0.0), (0.5576, 0.4424, 0.2437)
    for name, main, total in zip(numbers, alone, whole, strict=True):
        assert found[name].main == pytest.approx(main, abs=0.05)
        assert found[name].total == pytest.approx(total, abs=0.05)


def test_a_setting_counts_where_its_condition_holds():
    """Of half of the space dkd_beta is the square of its place, of the other half it is not there:
    the variance and the part that the choice alone explains are known."""
    space = {
        "method": {"choices": ["kd", "dkd"]},
        "dkd_beta": {"low": 0.0, "high": 8.0, "when": {"method": ["dkd"]}},
        "batch_size": {"low": 1, "high": 4},
    }

    def score(points):
        assert all(("dkd_beta" in p) == (p["method"] == "dkd") for p in points)
        assert {p["batch_size"] for p in points} == {1, 2, 3, 4}
        return np.array([(p.get("dkd_beta", 0) / 8) ** 2 for p in points])

    found = {effect.parameter: effect for effect in find_effects(score, space)}
    variance = 1 / 10 - 1 / 36  # of the half with dkd_beta: E = 1/3, E of the square = 1/5
    assert found["method"].main == pytest.approx(1 / 36 / variance, abs=0.04)
    assert found["method"].total == pytest.approx(1 / 20 / variance, abs=0.04)
    assert found["dkd_beta"].main == pytest.approx(1 / 4 * (4 / 45) / variance, abs=0.04)
    assert found["dkd_beta"].total == pytest.approx(1 / 2 * (4 / 45) / variance, abs=0.04)
    assert found["batch_size"].total == 0


def test_a_logarithmic_parameter_is_judged_along_its_logarithm(maker):
    """Half of the variance comes of each; along lr itself its upper tenth would be nearly all."""
    study = search(maker, lambda p: (np.log10(p["lr"]) + 4) / 4 + p["momentum"], count=30)
    assert shares(study.importance(), "main")["lr"] == pytest.approx(0.5, abs=0.1)


def test_trials_that_were_stopped_say_something_too(maker):
    """Eight of full length differ by momentum alone, the others by lr, which decides more."""
    study = maker.study(space=SPACE, rungs=[3])
    draw = np.random.default_rng(0)
    for number in range(40):
        whole = number < 8
        lr = 0.01 if whole else float(10 ** draw.uniform(-4, 0))
        momentum = float(draw.uniform())
        score = 0.9 + 0.1 * momentum + 0.2 * np.log10(lr)
        maker.trial(number, [score] * (9 if whole else 3), lr=lr, momentum=momentum,
                    status="complete" if whole else "pruned")  # fmt: skip
    table = study.importance()
    assert table["parameter"].to_pylist()[0] == "lr" and table["trials"].to_pylist() == [8, 8]
    assert study.importance("parameters").num_rows == 0


def found_of(study):
    return fit_study_model(study.records(), study.config).find(study.ranked()[0])


def test_what_is_expected_of_the_best_trial_is_in_the_unit_of_the_metric(maker):
    """A loss, of which less is better: its best is at lr .01, and was tried nearly."""
    study = search(
        maker, lambda p: 1.0 + (np.log10(p["lr"]) + 2) ** 2 / 4 + p["momentum"],
        count=30, metric="val_nll",
    )  # fmt: skip
    ranked, model = study.ranked(), fit_study_model(study.records(), study.config)
    good, bad = model.find(ranked[0]), model.find(ranked[15])
    for found, record in ((good, ranked[0]), (bad, ranked[15])):
        assert found.expected == pytest.approx(record.last["val_nll"], abs=0.05)
        assert found.low < found.expected < found.high and found.best == record.number
        least = record.last["val_nll"] - 1.0  # the loss of the best point is 1
        assert found.regret == pytest.approx(least, abs=0.1)
    assert good.error < good.spread == bad.spread and good.coverage >= 0.8


def test_noise_is_not_told_as_knowledge(maker, launch):
    noise = np.random.default_rng(3)
    study = search(maker, lambda p: 0.5 + 0.05 * noise.standard_normal(), count=25)
    found = found_of(study)
    assert found.error > 0.95 * found.spread and found.trials == 25
    dull = replace(found, error=found.spread)
    assert "no more than the mean" in describe_error(dull) and not dull.informed
    write_importance(dull, study.records(), study.config, study.path)
    out = " ".join(launch("show", study.path)[1].split())
    assert (
        "no more than the mean" in out and "knows too little" in out and "mattered most:" not in out
    )
    sure = replace(found, error=found.spread / 2)
    assert "no more" not in describe_error(sure) and "rough" not in describe_error(sure)
    assert "rough" in describe_error(replace(sure, trials=9))


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
    assert missed.endswith("student alone"), "differences without a spread show nothing"
    assert head.split() == ["name", "role", "val_top1", "test_top1"]
    won = "trial 4 winner 0.5333 ± 0.1528 (n = 3) 0.6333 ± 0.1528 (n = 3)"
    assert rows[0].split() == won.split()
    assert rows[1].split() == [
        "student",
        "alone",
        "baseline",
        "0.4333",
        "±",
        "0.1528",
        "(n",
        "=",
        "3)",
    ]
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
    assert missed.endswith("KD"), "nothing is known of a gain over what failed"
    assert "0.5000 (n = 1)" in rows[0] and "0.2500 (n = 1)" in rows[0]
    assert rows[1].split() == ["KD", "baseline", "failed"]


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


def test_what_a_study_left_open_is_compared_as_its_runs_had_it(maker, tmp_path):
    """One study names its augmentation, the other's is resolved to the same."""
    found = []
    for place, named in (("a", "flip_crop"), ("b", None)):
        maker.path = tmp_path / place
        study = maker.study(distill=BASE.replace(augment=named), space=SPACE)
        record = maker.trial(0, [0.5] * 9, lr=0.1)
        replace(record, config={**record.config, "augment": "flip_crop"}).write()
        found.append(type(study).load(study.path))
    settings = [r["name"] for r in compare_studies(*found).to_pylist() if r["kind"] == "setting"]
    assert settings == []


def test_studies_of_other_data_are_not_compared(maker, tmp_path):
    one = maker.study()
    maker.path = tmp_path / "b"
    other = maker.study(distill=one.config.distill.replace(dataset="digits"))
    with pytest.raises(UserError, match=r"is of synthetic and .* of digits: compare studies of"):
        compare_studies(one, other)


# Progress, time


def test_progress_of_a_running_study(maker):
    study = maker.study(space=SPACE)
    assert progress(study).stage == "search" and progress(study).quiet_seconds is None
    shared = study.config.distill.replace(method="kd", teacher="resnet14")
    taught = Study(path=study.path, config=study.config.replace(distill=shared), header={})
    assert progress(taught).stage == "teacher"
    (study.path / "teacher.json").write_text("{}")  # once its figures are known
    assert progress(taught).stage == "search"
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
    rows = {row["stage"]: row for row in time_rows(study)}
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


def test_what_the_report_found_is_shown_while_it_is_of_these_trials(maker, launch):
    study = search(maker, lambda p: p["momentum"], count=12)

    def shown():
        return json.loads(launch("show", study.path, "--json")[1])["model"]

    assert "ekd-ray report" in launch("show", study.path)[1] and shown() is None
    assert launch("report", study.path)[0] == 0
    assert shown() == asdict(found_of(study))
    assert shown()["effects"][0]["main"] == study.importance()["main"][0].as_py()
    out = " ".join(launch("show", study.path)[1].split())
    assert "momentum mattered most" in out and "better. The model's error" in out
    best = study.ranked()[0].number
    assert f"Of trial {best} the model expects" in out
    maker.trial(40, [0.5] * 9, lr=0.1, momentum=0.5)  # one more: it is of other trials now
    assert shown() is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"found": {', '"found": [{'),
        ('"error": 0.', '"error": 1e999'),
        ('"trials": 9', '"trials": "9"'),
        ('"metric": "val_top1"', '"metric": "val_nll"'),
        ('"parameter": "lr"', '"parameter": "epochs"'),
        ('"main": 0.', '"main": 7.'),
        ('"low": 0.', '"low": null, "lower": 0.'),
        ('"best": ', '"best": null, "then": '),
        ('"of": "', '"of": "0'),
    ],
)
def test_what_is_damaged_of_it_is_left_out(maker, launch, old, new):
    study = search(maker, lambda p: p["momentum"], count=9)
    write_importance(found_of(study), study.records(), study.config, study.path)
    assert read_importance(study.records(), study.config, study.path) == found_of(study)
    path = study.path / "importance.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    code, out, _ = launch("show", study.path)
    assert code == 0 and "ekd-ray report" in out
