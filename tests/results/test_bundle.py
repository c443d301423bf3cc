"""Bundle: what it holds, exported whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from report_studies import select

import ekd_ray.results.bundle_export as bundle_export
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.data_pin import pin_data
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.history import HISTORY
from ekd_ray.errors import UserError
from ekd_ray.losses.dirichlet import log_expectation
from ekd_ray.models import read_metadata
from ekd_ray.results import Bundle, export_bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.records import MANIFEST

# What it holds


def test_the_stored_weights_give_the_stated_accuracy_to_the_last_digit(exported, real_study):
    """Against a plain evaluation, too: one forward pass over the test split, no engine."""
    found = Bundle.load(exported.path).verify(evaluate=True)
    assert found.ok and found.problems == ()
    stated = exported.metrics["model"]["test_top1"]
    assert found.metrics["test_top1"] == stated
    assert found.metrics["test_nll"] == pytest.approx(exported.metrics["model"]["test_nll"])
    arrays, info = load_dataset("synthetic", "test"), dataset_info("synthetic")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    images, target = (torch.from_numpy(part.copy()) for part in (arrays.images, arrays.labels))
    with torch.no_grad():
        logits = exported.model()((images / 255 - mean) / std)
    assert float((logits.argmax(1) == target).double().mean()) == stated
    prior = read_metadata(exported.path / WEIGHTS).log_prior
    nll = -log_expectation(logits, 1.0, prior).gather(1, target[:, None]).mean()
    assert float(nll) == pytest.approx(found.metrics["test_nll"], rel=1e-4)


def test_the_weights_are_those_of_the_first_seed(exported, real_study):
    expected = real_study[1].model.state_dict()
    found = exported.model().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert not exported.model().training


def test_the_configuration_is_that_of_the_run_that_made_the_weights(exported, real_study):
    """Trained on all training images: `distill.yaml` must reproduce these weights."""
    run = real_study[1]
    fixed = {
        "precision": run.precision, "compile": "off", "data_fingerprint": run.data_fingerprint,
    }  # fmt: skip
    assert exported.config == run.config.replace(teacher_weights=None, **fixed)
    assert exported.config.validation_fraction == 0.0
    assert exported.config.seed == 1
    assert exported.config.log_prior == -0.75


def test_the_teacher_is_named_by_its_hash_only(exported, winner_config):
    assert exported.config.teacher_sha256 == winner_config.teacher_sha256
    texts = [(exported.path / name).read_text() for name in FILES if name != WEIGHTS]
    assert not [text for text in texts if winner_config.teacher_weights in text]


def test_the_evidence_is_the_leaderboard(exported, real_study):
    metrics = exported.metrics
    assert [entry["name"] for entry in metrics["leaderboard"]] == ["trial 1", "none", "trial 0"]
    first = metrics["leaderboard"][0]
    assert first["winner"] is True
    assert (first["val"]["values"], first["val"]["n"]) == ([0.45, 0.55], 2)
    assert first["val"]["mean"] == pytest.approx(0.5)
    assert first["val"]["sd"] == pytest.approx(0.0707106781)
    assert first["test_top1"]["values"] == [metrics["model"]["test_top1"], 0.25]
    assert "test_top1" not in metrics["leaderboard"][2]
    difference = metrics["differences"]["none"]
    other = metrics["leaderboard"][1]["test_top1"]["values"]
    pairs = zip(first["test_top1"]["values"], other, strict=True)
    assert difference["mean"] == pytest.approx(sum(a - b for a, b in pairs) / 2)
    assert (difference["n"], difference["low"], difference["high"]) == (2, None, None)
    assert metrics["seeds"] == [1, 2]
    assert metrics["study"] == real_study[0].config.fingerprint()
    assert exported.class_names == load_dataset("synthetic", "test").class_names
    assert not [name for name in metrics["model"] if name.startswith("val_")]


def test_the_winner_is_told_from_search_to_test(exported, real_study):
    """Mean, deviation and n of every figure, and the epochs of the run that made the weights."""
    stated = exported.metrics
    assert stated["validation"]["val_top1"] == pytest.approx(
        {"mean": 0.5, "sd": 0.0707106781, "n": 2}
    )
    assert stated["test"]["test_nll"] == pytest.approx({"mean": 2.25, "sd": 0.353553391, "n": 2})
    assert stated["search"] == {}, "its trials have no record here"
    assert stated["log_prior"] == -0.75
    assert exported.history() == real_study[1].history
    assert exported.environment()["threads"] == 1


def test_the_search_score_is_that_of_the_winners_trial(copied_study, maker, tmp_path):
    for number, value in ((0, 0.1), (1, 0.7)):
        dataclasses.replace(maker, path=copied_study.path).trial(number, [0.2, value])
    assert export_bundle(copied_study, tmp_path / "b").metrics["search"] == {"val_top1": 0.7}


def test_two_exports_are_equal_byte_for_byte(exported, real_study, tmp_path):
    other = export_bundle(real_study[0], tmp_path / "again")
    for name in (*FILES, MANIFEST):
        assert (other.path / name).read_bytes() == (exported.path / name).read_bytes()
    assert other.path.stat().st_mode & 0o777 == 0o755


# Export


def test_export_refuses_other_data(real_study, tmp_path):
    study = real_study[0]
    pinned = pin_data(study.config.distill, None)
    other = {**pinned, "train": {**pinned["train"], "fingerprint": "0" * 16}}
    changed = dataclasses.replace(study, header={**study.header, "data": other})
    with pytest.raises(UserError, match=r"train images .*0000' there .*as many images"):
        export_bundle(changed, tmp_path / "best")
    assert not (tmp_path / "best").exists()
    same = dataclasses.replace(study, header={**study.header, "data": pinned})
    assert export_bundle(same, tmp_path / "best").metrics["data"] == pinned


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.write_text("mine")])
def test_export_refuses_a_folder_that_is_no_bundle(real_study, tmp_path, make):
    out = tmp_path / "mine"
    make(out)
    if out.is_dir():
        (out / "thesis.tex").write_text("years of work")
    before = [(p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(UserError, match="mine exists and is not a bundle: choose another --out"):
        export_bundle(real_study[0], out)
    assert [(p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()] == before


@pytest.mark.parametrize("before", ["nothing", "empty folder", "deep"])
def test_export_makes_the_folder(real_study, tmp_path, before):
    out = tmp_path / ("a/b/best" if before == "deep" else "best")
    if before == "empty folder":
        out.mkdir()
    assert export_bundle(real_study[0], out).verify().ok
    assert [p.name for p in out.parent.iterdir()] == ["best"]


def test_export_replaces_an_old_bundle(bundle, real_study):
    (bundle.path / "README.md").write_text("old")
    (bundle.path / "left over").write_text("")
    with pytest.raises(UserError, match=r"holds left over beside its bundle: .*--force"):
        export_bundle(real_study[0], bundle.path)
    assert (bundle.path / "left over").exists()
    (bundle.path / "left over").rename(bundle.path / ".git")
    with pytest.raises(UserError, match=r"holds \.git beside its bundle: .*--force"):
        export_bundle(real_study[0], bundle.path)
    fresh = export_bundle(real_study[0], bundle.path, force=True)
    assert fresh.verify().ok
    assert sorted(p.name for p in fresh.path.iterdir()) == sorted([*FILES, MANIFEST])
    assert [p.name for p in bundle.path.parent.iterdir()] == ["best"]


def test_export_does_not_replace_the_bundle_of_another_study(bundle, real_study, launch):
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    other = replace(real_study[0], config=real_study[0].config.replace(confirm_top_k=7))
    with pytest.raises(UserError, match=r"best holds the bundle of another study: .*--force"):
        other.export(bundle.path)
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before
    longer = replace(real_study[0], config=real_study[0].config.replace(trials=77))
    assert longer.export(bundle.path).verify().ok, "the same study, extended"
    metrics = json.loads((bundle.path / "metrics.json").read_text())
    (bundle.path / "metrics.json").write_text(json.dumps({**metrics, "study": "0"}))
    flags = (real_study[0].path, "--out", bundle.path)
    for more, expected in (("--dry-run", 2), ("--quiet", 2), ("--force", 0)):
        code, _, err = launch("export", *flags, more)
        assert code == expected and ("another study" in err) == (expected == 2)


@pytest.mark.parametrize("name", ["copyfile", "write_json", "write_text", "write_manifest"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_export_leaves_nothing_half_written(
    real_study, exported, tmp_path, monkeypatch, name, there
):
    out = tmp_path / "best"
    if there:
        shutil.copytree(exported.path, out)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil if name == "copyfile" else bundle_export, name, full)
    with pytest.raises(OSError, match="no space"):
        export_bundle(real_study[0], out)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["best"] if there else [])
    assert not there or Bundle.load(out).verify().ok


def test_a_failed_swap_puts_the_old_bundle_back(bundle, real_study, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if Path(target) == bundle.path and (self / "MANIFEST").read_text() != old:
            raise OSError("the disk went away")
        return rename(self, target)

    (bundle.path / "README.md").write_text("old")
    write_manifest(bundle.path, FILES)
    old = (bundle.path / MANIFEST).read_text()
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk went away"):
        export_bundle(real_study[0], bundle.path)
    assert (bundle.path / "README.md").read_text() == "old"
    assert [p.name for p in bundle.path.parent.iterdir()] == ["best"]


def test_export_works_after_one_that_was_killed_in_its_swap(bundle, real_study):
    """Such a kill leaves the old bundle beside the new one under a hidden name."""
    shutil.copytree(bundle.path, bundle.path.parent / ".best.old")
    assert export_bundle(real_study[0], bundle.path).verify().ok


def test_a_study_without_a_winner_has_nothing_to_export(maker, tmp_path):
    study = maker.study()
    maker.trial(0, [0.5])
    for _ in range(2):  # before confirm, then with its first step only
        with pytest.raises(
            UserError,
            match=r"no confirmed winner yet: finish it with `ekd-ray tune --resume --out \S*run`",
        ):
            export_bundle(study, tmp_path / "best")
        maker.confirm([select("trial 0", 1, 0.5)])
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("name", [WEIGHTS, HISTORY, "result.json"])
def test_a_study_that_lost_its_winners_files_is_one_sentence(copied_study, tmp_path, name):
    (found,) = copied_study.path.glob(f"confirm/final-*/{name}")
    found.unlink()
    with pytest.raises(UserError, match=name) as caught:
        export_bundle(copied_study, tmp_path / "best")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "best").exists()
