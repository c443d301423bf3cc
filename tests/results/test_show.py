"""The two launchers that show a study: in the terminal, as JSON, as a page."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from report_studies import BASE, EVIL, final, searched, select

from ekd_ray.cli import study_text
from ekd_ray.results import Study


def test_a_finished_study_in_the_terminal(reported, launch):
    study = reported[0]
    code, out, err = launch("show", study.path)
    assert (code, err) == (0, "")
    best = study.best().name
    for words in (
        f"No gain shown over KD: {best}", "stage: finished", "8 stopped early, 1 failed",
        "trial 5 failed: loss became nan", "defaults failed", f"{best} (winner)",
        "winner - authors' values: +0.67 points of val_top1", "pictures: 3 seeds tell",
        "95 % interval", "winner: lr=", "mattered most", "search: stopped early",
        "early stops saved 48",
    ):  # fmt: skip
        assert words in out, words


@pytest.mark.parametrize(("held", "first"), [(7, True), (100, False), (None, False)])
def test_few_validation_pictures_are_said_first(maker, launch, held, first):
    study = searched(maker)
    path = study.path / "study.yaml"
    header = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**header, "validation_images": held}))
    code, out, _ = launch("show", study.path)
    assert code == 0
    assert ("7 pictures" in out.splitlines()[0]) == first == ("37 points" in out)


def test_json_has_all_of_it(reported, launch):
    study = reported[0]
    code, out, err = launch("show", study.path, "--json", "--compare", study.path)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["best"]["name"] == study.best().name and found["best"]["confirmed"]
    assert found["leaderboard"] == study.leaderboard().to_table().to_pylist()
    assert [e["parameter"] for e in found["model"]["effects"]] == (
        study.importance()["parameter"].to_pylist()
    )
    assert found["progress"]["trials"] == {"complete": 15, "pruned": 8, "failed": 1}
    assert found["failures"] == [
        {"trial": 5, "reason": f"loss became nan {EVIL}", "params": study.records()[5].params}
    ]
    assert {row["difference"] for row in found["comparison"]} == {0.0}


def test_two_studies_in_the_terminal_are_compared_whole(reported, maker, launch):
    """However long a setting, no figure is cut."""
    other = maker.study(space={"lr": {"choices": [0.1 + n / 1000 for n in range(40)]}})
    maker.trial(0, [0.5] * 9, lr=0.1)
    code, out, _ = launch("show", reported[0].path, "--compare", other.path)
    assert code == 0 and "…" not in out
    shown = " ".join(out.split())
    assert "what this other difference 95 % interval" in shown
    assert "search: trials 24 1 +23" in shown
    assert "settings that differ" in shown and "space.momentum" in shown


def test_a_running_study_in_the_terminal(maker, launch):
    study = searched(maker)
    code, out, _ = launch("show", study.path)
    assert code == 0
    assert "in its search stage" in out and "stage: search" not in out
    assert "best complete trials of the search" in out
    assert json.loads(launch("show", study.path, "--json")[1])["best"]["confirmed"] is False


@pytest.mark.parametrize("extra", [(), ("--json",), ("--quiet",)])
def test_the_report_goes_where_it_is_told(maker, launch, tmp_path, extra):
    study = maker.study()
    code, out, err = launch("report", study.path, "--out", tmp_path / "x" / "page.html", *extra)
    assert (code, err) == (0, "")
    assert (tmp_path / "x" / "page.html").read_text().startswith("<!doctype html>")
    path = str(tmp_path / "x" / "page.html")
    expected = {(): f"report: {path}\n", ("--quiet",): ""}
    assert json.loads(out) == {"report": path} if extra == ("--json",) else out == expected[extra]


@pytest.mark.parametrize(
    ("better", "said"),
    [
        ("none", "the student alone is above it"),
        ("authors' values", "the authors' values are above"),
    ],
)
def test_the_end_of_a_study_names_what_is_better_on_the_test_split(better, said, maker, capsys):
    study = maker.study()
    maker.confirm(
        [select("trial 1", seed, 0.5) for seed in (1, 2)]
        + [
            {**final(name, seed, value), "test_nll": 1.0, "test_ece": 0.1}
            for name, value in {"trial 1": 0.5, better: 0.61, "kd": 0.4}.items()
            for seed in (1, 2)
        ]
    )
    bundle = SimpleNamespace(path=study.path / "best")
    study_text.print_study(study, bundle)
    printed = capsys.readouterr().out
    assert f"not the best by test: {said}" in printed
    assert printed.count("11.00") == 1, "the difference stands once"
    assert "--trust-plugins" not in printed
    # A study with parts of the user's says how to look at it again.
    own = BASE.replace(plugins=("mine@" + "0" * 64,))
    own_study = Study(path=study.path, config=study.config.replace(distill=own), header={})
    study_text.print_study(own_study, bundle)
    assert f"ekd-ray show {study.path} --trust-plugins" in capsys.readouterr().out


def test_differences_stand_once_in_the_end_of_a_study(maker, capsys):
    study = maker.study()
    maker.confirm(
        [select("trial 1", seed, 0.5) for seed in (1, 2, 3)]
        + [
            {**final(name, seed, value + seed / 1000), "test_nll": 1.0, "test_ece": 0.1}
            for name, value in {"trial 1": 0.5, "none": 0.6125}.items()
            for seed in (1, 2, 3)
        ]
    )
    study_text.print_study(study, SimpleNamespace(path=study.path / "best"))
    said = capsys.readouterr().out
    assert said.count("-11.25") == 1 and "No gain shown" in said and "--seeds" in said
