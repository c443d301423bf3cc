"""Folders of studies of which a stranger has changed anything are shown, or refused in one
sentence."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from mutations import Data, changed_file
from report_studies import Maker, finished

from ekd_ray.cli import study_text
from ekd_ray.cli.console import Console
from ekd_ray.results import Study, model_figures, surrogate
from ekd_ray.results.report import measures, write_report
from ekd_ray.studies.comparison import compare_studies

USES = ["show"] * 8 + ["values"] * 4 + ["compare"] * 4 + ["report"]


@st.composite
def changed_folders(draw: Any, files: dict[str, Data]) -> tuple[dict[str, Data], list[str], str]:
    """(changed files by name, those that are gone, how the study is used)."""
    kinds = sorted({Path(name).name for name in files})
    kind = draw(st.sampled_from(kinds))
    names = sorted(name for name in files if Path(name).name == kind)
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    changed = {name: draw(changed_file(Path(name).suffix, files[name])) for name in chosen}
    gone = draw(st.lists(st.sampled_from(sorted(files)), max_size=1))
    return changed, gone if draw(st.integers(0, 5)) == 0 else [], draw(st.sampled_from(USES))


def use_study(study: Study, how: str, untouched: Study) -> None:
    if how == "show":
        study_text.print_progress(study, None, "")
    elif how == "values":
        study_text.progress_values(study, None)
        _ = repr(study), repr(study.leaderboard()), study._repr_html_()
        study.trials(), study.rungs(), study.leaderboard().to_table(), study.best()
    elif how == "compare":
        study_text.print_progress(study, compare_studies(study, untouched), "another")
    else:
        write_report(study)


@pytest.fixture
def quiet(monkeypatch):
    """What is printed goes nowhere, but through everything that shows it; little is computed."""
    monkeypatch.setattr(
        study_text, "Console", lambda **given: Console(file=io.StringIO(), **{"width": 100} | given)
    )
    monkeypatch.setattr(measures, "TSNE_STEPS", 250)
    monkeypatch.setattr(surrogate, "STEPS", 2)
    monkeypatch.setattr(model_figures, "DRAWN", 16)


def test_study_folders(tmp_path, fuzzer, quiet):
    whole = finished(Maker(tmp_path / "whole"))
    paths = [path for path in whole.path.rglob("*") if path.is_file()]
    files = {str(p.relative_to(whole.path)): Data(p.read_bytes()) for p in paths}
    folder = tmp_path / "run"
    for how in sorted({*USES}):
        use_study(Study.load(whole.path), how, whole)

    def use(given: tuple[dict[str, Data], list[str], str]) -> None:
        changed, gone, how = given
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole.path, folder)
        for name, data in changed.items():
            (folder / name).write_bytes(data)
        for name in gone:
            (folder / name).unlink()
        use_study(Study.load(folder), how, whole)

    fuzzer.run("study folders", changed_folders(files), use)
