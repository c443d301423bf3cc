"""The two launchers that show a study: in the terminal, as JSON, as a page."""

from __future__ import annotations

import json

import pytest
from report_studies import EVIL, searched


def test_a_finished_study_in_the_terminal(reported, launch):
    study = reported[0]
    code, out, err = launch("show", study.path)
    assert (code, err) == (0, "")
    best = study.best().name
    for words in (
        f"{best.capitalize()} wins with 61.2", "stage: finished", "8 stopped early, 1 failed",
        "trial 5 failed: loss became nan", "defaults failed", f"{best} (winner)",
        "winner - authors' values: +0.67 points of val_top1", "Settled: 3 seeds tell",
        "95 % interval", "winner: lr=", "fANOVA", "search: stopped early", "early stops saved 48",
    ):  # fmt: skip
        assert words in out, words


def test_json_has_all_of_it(reported, launch):
    study = reported[0]
    code, out, err = launch("show", study.path, "--json", "--compare", study.path)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["best"]["name"] == study.best().name and found["best"]["confirmed"]
    assert found["leaderboard"] == study.leaderboard().to_table().to_pylist()
    assert found["importance"] == study.importance().to_pylist()
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
    assert "search: trials 24.0000 1.0000 +23.0000" in shown
    assert "settings that differ" in shown and "space.momentum" in shown


def test_a_running_study_in_the_terminal(maker, launch):
    study = searched(maker)
    code, out, _ = launch("show", study.path)
    assert code == 0
    assert "stage: search" in out and "best complete trials of the search" in out
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
