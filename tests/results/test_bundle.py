"""Bundle: exported whole or not at all, and it tells when anything in it was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ekd_ray.results.bundle as bundles
from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.losses.dirichlet import log_expectation
from ekd_ray.models import read_metadata
from ekd_ray.results import Bundle, export_bundle
from ekd_ray.results.bundle import FILES, MANIFEST, WEIGHTS


@pytest.fixture(scope="session")
def exported(real_study, tmp_path_factory):
    """A bundle that no test may change."""
    return export_bundle(real_study[0], tmp_path_factory.mktemp("bundle") / "best")


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(exported.path, tmp_path / "best")
    return Bundle.load(tmp_path / "best")


def restate(path, name):
    """Make the manifest agree with a changed file, as a forger would."""
    lines = (path / MANIFEST).read_text().splitlines()
    kept = [line for line in lines if not line.endswith(f"  {name}")]
    (path / MANIFEST).write_text("\n".join([*kept, f"{sha256_file(path / name)}  {name}"]) + "\n")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


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
    fixed = {"precision": run.precision, "data_fingerprint": run.data_fingerprint}
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


def test_the_card_states_the_figures(exported):
    card = (exported.path / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"**{exported.metrics['model']['test_top1']:.2%}**" in card
    assert "| none | 85.00% | 7.07% | 2 |" in card
    assert "resnet8 distilled from resnet8" in card


def test_the_folder_holds_the_documented_files_only(exported):
    assert sorted(p.name for p in exported.path.iterdir()) == sorted([*FILES, MANIFEST])
    assert exported.path.stat().st_mode & 0o777 == 0o755


def test_two_exports_are_equal_byte_for_byte(exported, real_study, tmp_path):
    other = export_bundle(real_study[0], tmp_path / "again")
    for name in (*FILES, MANIFEST):
        assert (other.path / name).read_bytes() == (exported.path / name).read_bytes()


# What it notices


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(bundle, name):
    with open(bundle.path / name, "ab") as file:
        file.write(b"\n")
    found = bundle.verify(evaluate=True)
    assert not found.ok
    assert found.problems == (f"{name} was changed: its SHA-256 is not the one in {MANIFEST}.",)


def test_a_flipped_bit_in_the_weights_is_noticed(bundle):
    data = bytearray((bundle.path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle.path / WEIGHTS).write_bytes(data)
    assert [p.split()[0] for p in bundle.verify().problems] == [WEIGHTS]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, name):
    (bundle.path / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}: export it again"):
        Bundle.load(bundle.path)
    problems = bundle.verify().problems  # opened before the file went
    assert len(problems) == 1
    assert name in problems[0]


def test_truncated_weights_are_noticed_even_if_the_manifest_was_forged(bundle):
    path = bundle.path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-500])
    assert not bundle.verify().ok
    restate(bundle.path, WEIGHTS)
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        bundle.verify(evaluate=True)
    assert "\n" not in str(caught.value)


def test_an_embellished_accuracy_is_noticed_even_if_the_manifest_was_forged(bundle):
    model = {**bundle.metrics["model"], "test_top1": 0.99}
    change_json(bundle.path / "metrics.json", model=model)
    restate(bundle.path, "metrics.json")
    opened = Bundle.load(bundle.path)
    assert opened.verify().ok  # only evaluation can tell
    found = opened.verify(evaluate=True)
    assert [p for p in found.problems if "metrics.json says 0.99" in p]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../model.safetensors", ""])
def test_a_manifest_that_names_foreign_files_is_a_problem(bundle, name):
    """Nothing outside the bundle is read or vouched for."""
    (bundle.path.parent / "x").write_text("secret")
    with open(bundle.path / MANIFEST, "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    found = bundle.verify(evaluate=True)
    assert found.problems == (f"{MANIFEST} lists {name!r}, which is no file of a bundle.",)


def test_a_manifest_that_leaves_a_file_out_is_a_problem(bundle):
    lines = (bundle.path / MANIFEST).read_text().splitlines(keepends=True)
    (bundle.path / MANIFEST).write_text("".join(lines[1:]))
    assert bundle.verify().problems == (f"{MANIFEST} does not list {WEIGHTS}.",)
    (bundle.path / MANIFEST).write_text("")
    assert len(bundle.verify().problems) == len(FILES)


def test_a_binary_manifest_is_a_problem_not_a_crash(bundle):
    (bundle.path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert not bundle.verify().ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2}', "format version 2, this ekd_ray reads <= 1: upgrade"),
        ("{", "metrics.json is damaged"),
        ("[]", "metrics.json is damaged"),
        ("{}", "metrics.json is damaged"),
        ('{"format_version": "new"}', "metrics.json is damaged"),
    ],
)
def test_newer_or_damaged_metrics_are_refused(bundle, text, message):
    (bundle.path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Bundle.load(bundle.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["lr: -1", "learning_rate: 1", "[,"])
def test_a_bad_configuration_is_refused(bundle, text):
    (bundle.path / "distill.yaml").write_text(text)
    with pytest.raises(UserError, match=r"distill\.yaml:1: "):
        Bundle.load(bundle.path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_what_is_no_bundle_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"x holds no bundle \(no MANIFEST\)"):
        Bundle.load(tmp_path / "x")


# Export


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.write_text("mine")])
def test_export_refuses_a_folder_that_is_no_bundle(real_study, tmp_path, make):
    out = tmp_path / "mine"
    make(out)
    if out.is_dir():
        (out / "thesis.tex").write_text("years of work")
    before = [(p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(UserError, match="mine exists and is no bundle: choose another --out"):
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
    fresh = export_bundle(real_study[0], bundle.path)
    assert fresh.verify().ok
    assert sorted(p.name for p in fresh.path.iterdir()) == sorted([*FILES, MANIFEST])
    assert [p.name for p in bundle.path.parent.iterdir()] == ["best"]


@pytest.mark.parametrize("name", ["copyfile", "write_json", "write_text", "sha256_file"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_export_leaves_nothing_half_written(
    real_study, exported, tmp_path, monkeypatch, name, there
):
    out = tmp_path / "best"
    if there:
        shutil.copytree(exported.path, out)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil if name == "copyfile" else bundles, name, full)
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
    restate(bundle.path, "README.md")
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


def test_a_study_without_a_winner_has_nothing_to_export(maker, rows, tmp_path):
    study = maker.study()
    maker.trial(0, [0.5])
    for _ in range(2):  # before confirm, then with its first step only
        with pytest.raises(UserError, match="no confirmed winner yet: finish it with --resume"):
            export_bundle(study, tmp_path / "best")
        maker.confirm([rows[0]("trial 0", 1, 0.5)])
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("name", [WEIGHTS, "result.json"])
def test_a_study_that_lost_its_winners_files_is_one_sentence(copied_study, tmp_path, name):
    (found,) = copied_study.path.glob(f"confirm/final-*/{name}")
    found.unlink()
    with pytest.raises(UserError, match=name) as caught:
        export_bundle(copied_study, tmp_path / "best")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "best").exists()


def test_a_bundle_may_be_moved(bundle, tmp_path):
    moved = bundle.path.rename(tmp_path / "elsewhere")
    assert Bundle.load(str(moved)).verify().ok
    assert DistillConfig.from_yaml(moved / "distill.yaml") == bundle.config
