"""The teacher's own figures, wherever a study is shown."""

from __future__ import annotations

import json
from dataclasses import replace

from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.results import Study, export_bundle
from ekd_ray.results.report import write_report

FIGURES = TeacherFigures(
    model="vgg13", sha256="f" * 64, candidates=3, images=1234,
    metrics={"val_top1": 0.98761, "val_nll": 0.04321, "val_ece": 0.01234, "val_aurc": 0.001},
    log_prior=-0.6012,
)  # fmt: skip
PARTS = ("Teacher vgg13 (the best of 3 ", "1,234 validation images", "accuracy 98.76 %",
         "likelihood 0.043", "(ECE) 0.012", "log prior -0.6012")  # fmt: skip


def test_they_stand_in_show_and_in_the_reports_head(maker, launch):
    study = maker.study()
    assert "Teacher " not in launch("show", study.path)[1]
    assert json.loads(launch("show", study.path, "--json")[1])["teacher"] is None
    assert "Teacher vgg13" not in write_report(study).read_text(encoding="utf-8")
    FIGURES.write(study.path)
    shown = launch("show", study.path)[1]
    found = json.loads(launch("show", study.path, "--json")[1])["teacher"]
    assert TeacherFigures(**found) == FIGURES
    head = write_report(study).read_text(encoding="utf-8").partition("</header>")[0]
    for words in PARTS:
        assert words in shown and words in head, words


def test_its_warnings_stand_among_those_of_the_study(maker, launch):
    study = maker.study()
    replace(FIGURES, warnings=("near <chance>",)).write(study.path)
    said = "The teacher: near <chance>."
    assert said in Study.load(study.path).warnings()
    shown = launch("show", study.path)[1]
    # Before the headline, and once.
    assert shown.count(said) == 1 and shown.index(said) < shown.index("Teacher vgg13")
    page = write_report(study).read_text(encoding="utf-8")
    assert page.count('<p class="warning">The teacher: near &lt;chance&gt;.</p>') == 1


def test_they_stand_in_the_bundle_and_its_card(copied_study, tmp_path):
    without = export_bundle(copied_study, tmp_path / "without")
    assert without.metrics["teacher"] is None
    assert "Teacher " not in (without.path / "README.md").read_text()
    FIGURES.write(copied_study.path)
    bundle = export_bundle(Study.load(copied_study.path), tmp_path / "with")
    assert bundle.verify().ok
    assert TeacherFigures(**bundle.metrics["teacher"]) == FIGURES
    card = (bundle.path / "README.md").read_text()
    assert all(words in card for words in PARTS)
