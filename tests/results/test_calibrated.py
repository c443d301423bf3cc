"""A bundle's temperature and sets of classes: applied on request, measured, and left out."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ekd_ray as ekd
from ekd_ray.cli.main import run_command
from ekd_ray.data import load_dataset
from ekd_ray.engine.measure.calibration import FILE, Calibration
from ekd_ray.results import Bundle, export_bundle

TWIN = "confirm/select-trial 1-1"


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.array(load_dataset("synthetic", "test").images[:70]))


@pytest.fixture
def folder(images, tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()[:9]):
        Image.fromarray(image).save(place / f"{index}.png")
    return place


def test_the_bundle_has_that_of_the_run_of_its_seed(exported, real_study):
    fitted = Calibration.load(real_study[0].path / TWIN)
    assert exported.calibration == fitted
    assert exported.metrics["calibration"]["seed"] == real_study[1].config.seed


def test_calibrated_probabilities_are_those_at_the_temperature(exported, images):
    plain, found = exported.predict(images), exported.predict(images, calibrated=True)
    temperature = exported.calibration.temperature
    assert temperature != 1
    powers = plain.probabilities.double() ** (1 / temperature)
    expected = powers / powers.sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.uncertainty, plain.uncertainty)
    assert found.names == plain.names and found.sets is None


@pytest.mark.parametrize("calibrated", [False, True])
def test_sets_hold_the_classes_above_their_threshold(exported, images, calibrated):
    plain = exported.predict(images)
    found = exported.predict(images, coverage=0.9, calibrated=calibrated)
    bound = -exported.calibration.threshold(0.9)
    for row, top, classes in zip(plain.probabilities.log(), plain.names, found.sets, strict=True):
        order = row.argsort(descending=True).tolist()
        clear = [k for k in order if row[k] > bound + 1e-5]
        unclear = [k for k in order if abs(row[k] - bound) <= 1e-5]
        assert set(classes) >= {top, *(exported.class_names[k] for k in clear)}
        assert set(classes) <= {top, *(exported.class_names[k] for k in clear + unclear)}
        assert classes[0] == top


def test_what_the_card_says_is_what_the_sets_hold(exported):
    arrays = load_dataset("synthetic", "test")
    measured = exported.metrics["calibration"]["measured"]
    assert measured["images"] == len(arrays) == 500
    images = torch.from_numpy(np.array(arrays.images))
    card = (exported.path / "README.md").read_text()
    for share in (90, 95):
        sets = exported.predict(images, coverage=share / 100).sets
        labels = [arrays.class_names[label] for label in arrays.labels]
        inside = np.mean([label in found for label, found in zip(labels, sets, strict=True)])
        assert measured[f"set_coverage_{share}"] == pytest.approx(inside, abs=0.006)  # in float16
        size = np.mean([len(found) for found in sets])
        assert measured[f"set_size_{share}"] == pytest.approx(size, abs=0.05)
        assert f"| {share} % | {measured[f'set_coverage_{share}']:.2%} |" in card
    found = exported.evaluate(calibrated=True, set_coverages=[0.9], ood_datasets=[])
    assert found["test_set_coverage_90"] == pytest.approx(measured["set_coverage_90"], abs=0.006)
    for name in ("nll", "ece"):
        assert measured[f"{name}_calibrated"] == pytest.approx(found[f"test_{name}"], abs=2e-3)
        assert measured[name] == pytest.approx(exported.metrics["model"][f"test_{name}"], abs=2e-3)
        assert f"{measured[f'{name}_calibrated']:.4f}" in card


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_has_both_on_request(exported, folder, tmp_path, suffix):
    out = tmp_path / f"p.{suffix}"
    flags = ["--calibrated", "--set-coverage", "0.9", "--coverage", "0.5", "--quiet"]
    assert run_command([str(exported.path), str(folder), "--out", str(out), *flags], "predict") == 0
    if suffix == "csv":
        with open(out, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        table = pq.read_table(out)
        rows = table.to_pylist()
        about = json.loads(table.schema.metadata[b"ekd_ray"])
        assert about["temperature"] == exported.calibration.temperature
        assert about["set_coverage"] == 0.9 and about["coverage"] == 0.5
    expected = exported.predict(folder, calibrated=True, coverage=0.9)
    assert [tuple(json.loads(row["set"])) for row in rows] == list(expected.sets)
    assert [int(row["set_size"]) for row in rows] == [len(names) for names in expected.sets]
    best = expected.probabilities.amax(1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(best, rel=1e-4)
    plain = exported.predict_files([folder], tmp_path / "q.csv", coverage=0.5)
    abstain = [str(row["abstain"]).lower() for row in rows]
    assert abstain.count("true") == plain.abstained  # which is not what sets are about


@pytest.mark.parametrize("coverage", [0.0, 0.49, 1.0, float("nan")])
def test_a_coverage_of_sets_that_cannot_be(exported, folder, tmp_path, coverage):
    with pytest.raises(ekd.UserError, match=r"0\.5 to 0\.995"):
        exported.predict(folder, coverage=coverage)
    with pytest.raises(ekd.UserError, match=r"0\.5 to 0\.995"):
        exported.predict_files([folder], tmp_path / "p.csv", set_coverage=coverage)
    with pytest.raises(ekd.UserError, match="32 validation images"):
        exported.predict(folder, coverage=0.99)
    assert not (tmp_path / "p.csv").exists()


def test_a_bundle_of_an_older_release_predicts_without(bundle, images):
    path = bundle.path / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["calibration"]
    path.write_text(json.dumps(metrics))
    older = Bundle.load(bundle.path)
    expected = bundle.predict(images).probabilities
    assert torch.equal(older.predict(images).probabilities, expected)
    for asked in ({"calibrated": True}, {"coverage": 0.9}):
        with pytest.raises(ekd.UserError, match="has no calibration"):
            older.predict(images, **asked)
    with pytest.raises(ekd.UserError, match="has no calibration"):
        older.evaluate(calibrated=True)


@pytest.mark.parametrize(
    "damage", [[], {"temperature": 0.0}, {"set_thresholds": [1.0]}, {"measured": {"ece": "x"}}]
)
def test_a_damaged_calibration_is_refused(bundle, damage):
    path = bundle.path / "metrics.json"
    metrics = json.loads(path.read_text())
    values = {**metrics["calibration"], **damage} if damage else damage
    path.write_text(json.dumps({**metrics, "calibration": values}))
    with pytest.raises(ekd.UserError, match="is damaged"):
        Bundle.load(bundle.path)


def test_a_study_whose_runs_left_none_is_exported_without(copied_study, tmp_path):
    twin = copied_study.path / TWIN / FILE
    other = copied_study.path / "confirm" / "select-trial 1-2"
    other.mkdir()
    fitted = dataclasses.replace(Calibration.load(twin.parent), temperature=3.0)
    fitted.save(other)
    found = export_bundle(copied_study, tmp_path / "both")
    assert found.metrics["calibration"]["seed"] == 1  # that of the weights
    twin.write_text("{}")  # damaged: that of another seed serves
    found = export_bundle(copied_study, tmp_path / "one")
    assert found.metrics["calibration"]["seed"] == 2 and found.calibration == fitted
    (other / FILE).unlink()
    found = export_bundle(copied_study, tmp_path / "none")
    assert found.metrics["calibration"] is None
    assert "sets of classes" not in (found.path / "README.md").read_text()


def test_programs_are_not_calibrated(exported, images):
    """They say what `predict` says without being asked."""
    _, probabilities, _ = exported.classifier()(images.float() / 255)
    torch.testing.assert_close(
        probabilities.detach(), exported.predict(images).probabilities, rtol=1e-4, atol=1e-6
    )
