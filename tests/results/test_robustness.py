"""A bundle under corruptions: the figures, their file, and the report that shows them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from report_studies import EVIL, finished
from sklearn.metrics import accuracy_score, log_loss

from ekd_ray.cli.main import run_command
from ekd_ray.data import load_dataset
from ekd_ray.data.corruptions import corrupt
from ekd_ray.engine import corrupted
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.measure.inheritance import FILE as INHERITED
from ekd_ray.engine.measure.inheritance import Inheritance
from ekd_ray.engine.measure.shift import FILE, METRICS, Shift, ShiftRow
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.results import robustness
from ekd_ray.results.report import winner_figures, write_report
from ekd_ray.results.report.content import gather
from ekd_ray.results.robustness import measure_corruptions


def shift_of(top1, *, names=("fog", "snow"), seed=0, images=7, weights=None):
    """Every corruption and severity has its own accuracy: `top1` less steps of a hundredth."""
    splits = [("", 0), *((name, severity) for name in names for severity in range(1, 6))]
    rows = [
        ShiftRow(corruption=name, severity=severity, top1=top1 - 0.01 * n, nll=1.0 + n, ece=0.1,
                 aurc=0.2)
        for n, (name, severity) in enumerate(splits)
    ]  # fmt: skip
    return Shift(rows=tuple(rows), images=images, seed=seed, weights=weights)


def test_the_mean_error_is_that_of_all_corruptions_and_severities():
    found = shift_of(0.9)
    errors = 1 - (0.9 - 0.01 * np.arange(1, 11))
    assert found.mean_corruption_error == pytest.approx(errors.mean())
    assert found.corruption_errors == pytest.approx(
        {"fog": errors[:5].mean(), "snow": errors[5:].mean()}
    )
    by_severity = found.by_severity("top1")
    assert by_severity == pytest.approx([0.9, *(1 - errors.reshape(2, 5).mean(0))])


def test_it_is_read_as_it_was_written_and_damage_is_refused(tmp_path):
    shift_of(0.9, weights="ab").save(tmp_path / FILE)
    assert Shift.load(tmp_path / FILE) == shift_of(0.9, weights="ab")
    whole = json.loads((tmp_path / FILE).read_text())
    broken = [
        {},
        {**whole, "rows": whole["rows"][:4]},
        {**whole, "images": "7"},
        {**whole, "weights": 7},
        {**whole, "more": 7},
        {**whole, "rows": [{**row, "ece": None} for row in whole["rows"]]},
        {**whole, "rows": [{**row, "more": 1} for row in whole["rows"]]},
    ]
    for values in broken:
        (tmp_path / FILE).write_text(json.dumps(values))
        with pytest.raises(UserError, match="is damaged"):
            Shift.load(tmp_path / FILE)


def test_figures_are_those_of_pictures_that_were_spoiled_by_hand(bundle):
    if bundle.config.dataset != "synthetic":
        pytest.skip("the bundle is of other pictures")
    some = ("contrast", "gaussian_noise")
    seen = []
    found = measure_corruptions(
        bundle, images=40, seed=3, corruptions=some, on_progress=lambda *of: seen.append(of)
    )
    assert seen == [(n, 11) for n in range(12)]
    assert [(row.corruption, row.severity) for row in found.rows] == [
        ("", 0), *((name, severity) for name in some for severity in range(1, 6))
    ]  # fmt: skip
    arrays = load_dataset("synthetic", "test")
    ids = np.arange(40) * len(arrays.labels) // 40
    images, labels = torch.from_numpy(arrays.images[ids]), arrays.labels[ids]
    for row in found.rows:
        spoiled = images
        if row.severity:
            spoiled = corrupt(images, row.corruption, row.severity, seed=3, sample_ids=ids)
        p = bundle.predict(spoiled).probabilities.double().numpy()
        assert row.top1 == pytest.approx(accuracy_score(labels, p.argmax(1)), abs=0.051)
        every = range(len(bundle.class_names))
        assert row.nll == pytest.approx(log_loss(labels, p, labels=every), rel=0.02)
    assert not (bundle.path.parent / FILE).exists()  # in no study


def test_published_files_take_the_place_of_what_is_made(bundle, tmp_path):
    if bundle.config.dataset != "synthetic":
        pytest.skip("the bundle is of other pictures")
    arrays = load_dataset("synthetic", "test")
    count = 30
    for name in ("fog", "snow"):
        images = np.tile(arrays.images[:count].transpose(0, 2, 3, 1), (5, 1, 1, 1))
        if name == "snow":
            images[count:] = 0  # but the first severity
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(arrays.labels[:count], 5).astype(np.uint8))
    with pytest.raises(UserError, match=r"gaussian_noise\.npy"):
        measure_corruptions(bundle, published=tmp_path, images=20)
    found = measure_corruptions(bundle, published=tmp_path, images=20, corruptions=("fog", "snow"))
    assert found.seed is None
    by_split = {(row.corruption, row.severity): row.top1 for row in found.rows}
    ids = np.arange(20) * count // 20  # as those of the clean pictures are chosen
    expected = bundle.predict(torch.from_numpy(arrays.images[ids])).labels.numpy()
    clean = accuracy_score(arrays.labels[ids], expected)
    assert {by_split["fog", severity] for severity in range(1, 6)} == {clean}
    assert by_split["snow", 1] == clean
    black = arrays.labels[ids] == bundle.predict(torch.zeros(1, 3, 32, 32)).labels[0].item()
    assert by_split["snow", 5] == pytest.approx(black.mean())
    # More would be taken from the next severity.
    with pytest.raises(UserError, match=f"{count} pictures a severity"):
        measure_corruptions(bundle, published=tmp_path, images=count + 1, corruptions=("fog",))


def test_published_files_of_other_classes_are_refused(bundle, tmp_path):
    if bundle.config.dataset != "synthetic":
        pytest.skip("the bundle is of other pictures")
    labels = load_dataset("synthetic", "test").labels
    np.save(tmp_path / "fog.npy", np.zeros((5 * len(labels), 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(5 * len(labels), np.uint8))
    with pytest.raises(UserError, match="other numbers of each class"):
        measure_corruptions(bundle, published=tmp_path, images=20, corruptions=("fog",))
    np.save(tmp_path / "labels.npy", np.tile(labels[::-1], 5))
    measure_corruptions(bundle, published=tmp_path, images=20, corruptions=("fog",))


def test_an_unknown_corruption_is_refused_before_compute(bundle, monkeypatch):
    monkeypatch.setattr(corrupted, "predict", None)
    with pytest.raises(UserError, match="Did you mean 'fog'"):
        measure_corruptions(bundle, corruptions=("snow", "fogg"))


@pytest.mark.parametrize("images", [0, 10**6])
def test_as_many_pictures_as_there_are_can_be_taken(bundle, images):
    with pytest.raises(UserError, match=f"images must be 1 to .* got {images}"):
        measure_corruptions(bundle, images=images)


def test_the_report_shows_them_and_leaves_damage_out(maker):
    study = finished(maker)
    name = study.leaderboard()[0].name
    run = next(r for r in study.confirm_runs if r.stage == "final" and r.name == name)
    (run.folder / WEIGHTS).write_bytes(b"weights")
    evil = shift_of(0.9, names=(EVIL, "snow"), weights=sha256_file(run.folder / WEIGHTS))
    evil.save(study.path / FILE)
    page = write_report(study).read_text()
    assert "Under corruptions" in page and EVIL not in page
    (chart,) = winner_figures.draw_shift(gather(study, study.importance()))
    assert list(chart.figure.data[0].y) == evil.by_severity("top1")
    assert [row[0] for row in chart.rows] == [0, 1, 2, 3, 4, 5]
    assert len(chart.rows[0]) == 1 + len(METRICS)
    (study.path / FILE).write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        assert "Under corruptions" not in write_report(study).read_text()
    shift_of(0.9, weights="those of a winner before").save(study.path / FILE)
    assert "Under corruptions" not in write_report(study).read_text()


def test_more_pictures_of_the_same_weights_are_not_replaced_by_fewer(tmp_path):
    path = tmp_path / FILE
    many, few = (shift_of(0.9, images=n, weights="a") for n in (9, 5))
    for found in (few, many):
        robustness._keep(found, path)
        assert Shift.load(path) == found
    with pytest.warns(UserWarning, match="of 9 pictures"):
        robustness._keep(few, path)
    assert Shift.load(path) == many
    for other in (shift_of(0.9, images=5, weights="b"), shift_of(0.9, names=("a", "b"), images=4,
                                                                 weights="b")):  # fmt: skip
        robustness._keep(other, path)
        assert Shift.load(path) == other, "another student, or other corruptions"


def test_the_report_shows_what_the_student_inherits(maker):
    study = finished(maker)
    name = study.leaderboard()[0].name
    run = next(r for r in study.confirm_runs if r.stage == "final" and r.name == name)
    pairs = {kind: (torch.randn(60, 5), torch.randn(60, 5)) for kind in ("test", EVIL, "noise")}
    kept = Inheritance.of(pairs, log_prior=None, teacher_log_prior=None)
    kept.save(run.folder / INHERITED)
    page = write_report(study).read_text()
    assert "What the student inherits" in page and EVIL not in page
    (chart,) = winner_figures.draw_inherited(gather(study, study.importance()))
    assert [len(trace.x) for trace in chart.figure.data] == [60, 60, 60]
    assert chart.figure.data[0].name == "test"
    drawn = next(trace for trace in chart.figure.data if trace.name == "noise")
    teacher, student = pairs["noise"][1], pairs["noise"][0]
    np.testing.assert_allclose(drawn.x, -teacher.logsumexp(1), atol=1e-3)
    np.testing.assert_allclose(drawn.y, -student.logsumexp(1), atol=1e-3)
    correlation = kept.figures["test"]["vacuity_corr"]
    assert chart.rows[0][:2] == ["test", f"{correlation:.3f}"]
    (run.folder / INHERITED).write_text("[]")
    with pytest.warns(UserWarning, match=r"inherited\.json"):
        assert "What the student inherits" not in write_report(study).read_text()


def test_the_command_prints_a_row_for_each_and_refuses_other_flags(bundle, capsys, monkeypatch):
    asked = []

    def measured(of, **options):
        asked.append(options)
        return shift_of(0.9)

    monkeypatch.setattr("ekd_ray.results.robustness.measure_corruptions", measured)
    command = ["evaluate", str(bundle.path)]
    assert run_command([*command, "--corruptions", "--images", "9", "--seed", "4"], None) == 0
    printed = capsys.readouterr().out
    assert "89.00%" in printed and "15.50%" in printed and "snow" in printed  # 0.9 - 0.01 * 5.5
    assert "…" not in printed  # a figure is whole, on a narrow terminal too
    assert run_command([*command, "--corruptions", "folder", "--json"], None) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mean_corruption_error"] == pytest.approx(0.155) and len(said["rows"]) == 11
    assert [options["images"] for options in asked] == [9, None]
    assert [options["published"] for options in asked] == [None, "folder"]
    assert asked[0]["seed"] == 4
    others = (["--score", "all"], ["--resamples", "9"])
    for flags in (["--images", "9"], *([*other, "--corruptions"] for other in others)):
        with pytest.raises(UserError, match=flags[0]):
            run_command([*command, *flags], None)
