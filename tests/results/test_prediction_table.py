"""Predictions of picture files: the table, what abstains, what cannot be read or written."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launchers_run import command
from PIL import Image

from ekd_ray.cli.main import run_command
from ekd_ray.data import load_dataset
from ekd_ray.engine.measure.uncertainty import dissonance, entropies, uncertainty
from ekd_ray.errors import UserError
from ekd_ray.results import Bundle
from ekd_ray.results.prediction_table import COVERAGES, list_pictures

COUNT = 70  # more than a batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of the test split in two folders, and what is no picture beside them."""
    root = tmp_path_factory.mktemp("pictures")
    images = load_dataset("synthetic", "test").images[:COUNT].transpose(0, 2, 3, 1)
    for index, image in enumerate(np.ascontiguousarray(images)):
        place = root / ("even" if index % 2 == 0 else "odd")
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{index:03d}.PNG")
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_text("no picture")
    return root


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_has_what_predict_gives_in_the_order_of_names(exported, folder, tmp_path):
    seen = []
    done = exported.predict_files(
        [folder], tmp_path / "new" / "p.parquet", progress=lambda *at: seen.append(at)
    )
    paths = [*sorted((folder / "even").iterdir()), *sorted((folder / "odd").iterdir())]
    table = pq.read_table(done.path)
    assert table["path"].to_pylist() == [str(path) for path in paths] and done.rows == COUNT
    assert seen[-1] == (COUNT, COUNT) and len(seen) > 1 and "abstain" not in table.column_names
    expected = exported.predict(paths)
    assert table["predicted"].to_pylist() == list(expected.names)
    every = np.stack([table[f"p_{name}"].to_numpy() for name in exported.class_names], axis=1)
    np.testing.assert_allclose(every, expected.probabilities.numpy(), atol=1e-6)
    np.testing.assert_array_equal(table["probability"], every.max(axis=1))
    np.testing.assert_allclose(table["uncertainty"], expected.uncertainty, atol=1e-6)
    with torch.no_grad():
        from ekd_ray.results.inference import pixels

        images = torch.from_numpy(np.stack(pixels(paths, exported.config))).float() / 255
        logits = exported.classifier()(images)[0]
    prior = exported.metrics["log_prior"]
    for name, values in zip(("aleatoric_entropy", "epistemic_entropy"), entropies(logits, prior),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(table[name], values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(table["dissonance"], dissonance(logits, prior), rtol=1e-3, atol=1e-6)


def test_as_many_abstain_as_the_test_split_says(real_study, exported, folder, tmp_path):
    """The test split itself: the share that is kept is the coverage, and those the most certain."""
    arrays = load_dataset("synthetic", "test")
    paths = []
    for index, image in enumerate(np.ascontiguousarray(arrays.images.transpose(0, 2, 3, 1))):
        paths.append(tmp_path / f"{index:04d}.png")
        Image.fromarray(image).save(paths[-1])
    out = tmp_path / "p.csv"
    done = exported.predict_files(paths, out, coverage=0.75)
    rows = read_csv(out)
    abstain = np.array([row["abstain"] == "true" for row in rows])
    scores = np.array([float(row["uncertainty"]) for row in rows])
    assert done.abstained == abstain.sum()
    assert abs(abstain.mean() - 0.25) <= 1.5 / len(paths)
    assert scores[abstain].min() >= scores[~abstain].max()
    whole = exported.predict_files(paths, tmp_path / "all.csv", coverage=1)
    assert whole.abstained <= 1  # the last one, by rounding


def test_no_cell_of_a_csv_file_is_a_formula(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("=cmd.png", "+1.png", "-2.png", "@x.png", "plain=.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    exported.predict_files(names, tmp_path / "p.csv")
    cells = {row["path"] for row in read_csv(tmp_path / "p.csv")}
    assert cells == {"'=cmd.png", "'+1.png", "'-2.png", "'@x.png", "plain=.png"}
    exported.predict_files(names, tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet")["path"].to_pylist() == names


def test_a_table_without_a_name_replaces_none(exported, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command([str(exported.path), str(folder)], "predict") == 0
    assert len(read_csv(tmp_path / "predictions.csv")) == COUNT
    with pytest.raises(UserError, match="--out"):
        run_command([str(exported.path), str(folder)], "predict")


@pytest.mark.parametrize("coverage", [0, -0.1, 1.01, float("nan")])
def test_a_coverage_is_a_share(exported, folder, tmp_path, coverage):
    with pytest.raises(UserError, match="coverage must be above 0 and at most 1"):
        exported.predict_files([folder], tmp_path / "p.csv", coverage=coverage)
    assert not list(tmp_path.iterdir())


def test_thresholds_are_those_of_the_final_evaluation(real_study, exported):
    """Of the very network, on the test split, by numpy's order statistics."""
    result = real_study[1]
    images = load_dataset("synthetic", "test").images
    logits = exported.classifier()(torch.from_numpy(images).float() / 255)[0].detach()
    scores = uncertainty(logits, result.log_prior).sort().values
    found = exported.metrics["coverage_thresholds"]
    assert len(found) == len(COVERAGES) and found == sorted(found)
    for at in (0, 25, 50, 100):
        place = at / 100 * (len(scores) - 1)
        low, high = scores[int(np.floor(place))], scores[int(np.ceil(place))]
        assert low - 1e-3 <= found[at] <= high + 1e-3


def test_a_bundle_without_thresholds_predicts_and_says_why_it_does_not_abstain(
    bundle, folder, tmp_path
):
    path = bundle.path / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "coverage_thresholds": None}))
    older = Bundle.load(bundle.path)
    with pytest.raises(UserError, match="no thresholds by coverage: export it again"):
        older.predict_files([folder], tmp_path / "p.csv", coverage=0.5)
    assert older.predict_files([folder], tmp_path / "p.csv").rows == COUNT
    path.write_text(json.dumps({**metrics, "coverage_thresholds": [1.0, "x"]}))
    with pytest.raises(UserError, match=r"metrics\.json"):
        Bundle.load(bundle.path)


@pytest.mark.slow
def test_a_damaged_picture_is_named_and_the_others_are_predicted(
    exported, folder, tmp_path, capsys
):
    copy = tmp_path / "pictures"
    shutil.copytree(folder, copy)
    (copy / "even" / "000.PNG").write_bytes(b"\x89PNG torn")
    (copy / "odd" / "071.png").symlink_to("nowhere")
    out = tmp_path / "p.csv"
    done = command("predict", exported.path, copy, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(read_csv(out)) == COUNT - 1
    assert (
        "000.PNG" in done.stderr and "071.png" in done.stderr and "2 cannot be read" in done.stdout
    )
    found = exported.predict_files([copy], out)
    assert found.rows == COUNT - 1 and len(found.damaged) == 2


def test_nothing_is_left_where_no_picture_can_be_read(exported, tmp_path):
    (tmp_path / "a.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"a\.png is not a readable"):
        exported.predict_files([tmp_path], tmp_path / "out" / "p.parquet")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_left_of_a_table_that_was_interrupted(exported, folder, tmp_path):
    out = tmp_path / "p.parquet"
    out.write_text("older")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported.predict_files([folder], out, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]
    assert out.read_text() == "older"


def test_what_cannot_be_written_or_is_not_there_is_refused_before_compute(
    exported, folder, tmp_path, monkeypatch
):
    def never(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(Bundle, "classifier", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    for out, words in {
        "p.txt": r"must end with \.parquet or \.csv",
        "folder.csv": "is a folder",
        "file/p.csv": "cannot write",
    }.items():
        with pytest.raises(UserError, match=words):
            exported.predict_files([folder], tmp_path / out)
    with pytest.raises(UserError, match=r"there is no picture or folder .*gone"):
        exported.predict_files([folder / "gone"], tmp_path / "p.csv")
    with pytest.raises(UserError, match="holds no picture"):
        exported.predict_files([tmp_path], tmp_path / "p.csv")


def test_a_name_of_any_bytes_is_a_row(exported, folder, tmp_path):
    source = folder / "even" / "000.PNG"
    name = bytes(tmp_path) + b"/caf\xe9.png"
    shutil.copyfile(source, name)
    (loop := tmp_path / "loop").mkdir()
    shutil.copyfile(source, loop / "b.png")
    assert len(list_pictures([tmp_path])) == 2
    exported.predict_files([tmp_path], tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet")["path"][0].as_py().endswith(r"caf\xe9.png")
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    found = exported.predict_files([tmp_path], tmp_path / "p.parquet")
    assert found.rows == 2 and "itself.png" in found.damaged[0]
    (loop / "again").symlink_to(loop)
    with pytest.raises(UserError, match="link"):
        list_pictures([tmp_path])
