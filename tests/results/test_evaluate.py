"""`evaluate`: other data sets by the names of their classes, sets from outside, what it prints."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ekd_ray as ekd
from ekd_ray.cli.main import run_command
from ekd_ray.data import check_outside, load_dataset
from ekd_ray.engine.measure.uncertainty import SCORES


def test_the_own_split_is_what_the_bundle_states(exported):
    found = ekd.evaluate(exported.path)
    assert found == exported.evaluate() == ekd.evaluate(exported, dataset=exported.config.dataset)


@pytest.fixture
def folder(tmp_path):
    """Pictures of 48 pixels of two of the classes, the later first, in folders by name."""
    arrays = load_dataset("synthetic", "test")
    for split in ("train", "test"):
        for label, name in ((7, "pattern7"), (2, "pattern2")):
            for index in np.flatnonzero(arrays.labels == label)[:9]:
                path = tmp_path / "pictures" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(arrays.images[index].transpose(1, 2, 0))
                image.resize((48, 48)).save(path)
    return tmp_path / "pictures"


def test_another_data_set_is_judged_by_the_names_of_its_classes(exported, folder):
    if exported.config.dataset != "synthetic":
        pytest.skip("the bundle is of other classes")
    found = ekd.evaluate(exported, dataset=f"folder:{folder}")
    paths = sorted(folder.glob("test/*/*.png"))
    names = exported.predict(paths).names
    right = [name == path.parent.name for name, path in zip(names, paths, strict=True)]
    assert found["test_top1"] == pytest.approx(np.mean(right))


def test_a_class_that_the_student_does_not_know_is_refused(exported, folder):
    for split in ("train", "test"):
        (folder / split / "pattern2").rename(folder / split / "stripes")
    with pytest.raises(ekd.UserError, match=r"unknown class of folder:.* 'stripes'"):
        ekd.evaluate(exported, dataset=f"folder:{folder}")


def test_everything_is_what_the_bundle_predicts(exported):
    """The ranking figures of the command, from `predict` and scikit-learn."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = ekd.evaluate(exported, ood_datasets=["digits", "constant"], scores=["entropy"])
    own, other = (load_dataset(name, "test") for name in ("synthetic", "digits"))
    known, strange = (exported.predict(torch.from_numpy(np.array(a.images))) for a in (own, other))
    foreign = np.repeat([0, 1], [len(own), len(other)])

    def check(prefix, scores):
        assert found[f"{prefix}ood_digits_auroc"] == pytest.approx(
            roc_auc_score(foreign, scores), abs=2e-3
        )
        assert found[f"{prefix}ood_digits_aupr_out"] == pytest.approx(
            average_precision_score(foreign, scores), abs=2e-3
        )

    check("test_", torch.cat((known.uncertainty, strange.uncertainty)).numpy())
    p = torch.cat((known.probabilities, strange.probabilities)).double()
    check("test_entropy_", torch.special.entr(p).sum(1).numpy())
    assert found["test_top1"] == exported.metrics["model"]["test_top1"]
    onehot = torch.nn.functional.one_hot(torch.from_numpy(np.array(own.labels)), 10)
    brier = (known.probabilities.double() - onehot).square().sum(1).mean()
    assert found["test_brier"] == pytest.approx(float(brier), abs=2e-3)
    assert "test_ood_constant_fpr95" in found and "test_ood_noise_auroc" not in found


def test_the_bundle_states_what_its_final_evaluation_has_measured(exported):
    stated = exported.metrics["model"]
    names = {"test_eaurc", "test_brier", "test_ece_adaptive", "test_ece_classwise"}
    names |= {f"test_top1_at_{share}" for share in (50, 80, 90, 95)}
    names |= {f"test_ood_{kind}_fpr95" for kind in ("noise", "constant")}
    assert names <= stated.keys()
    assert exported.evaluate() == {n: v for n, v in stated.items() if n.startswith("test_")}


def test_pictures_without_classes_are_seen_as_predict_sees_them(exported, tmp_path):
    """Of any size and form: the bundle's own rule cuts them."""
    from ekd_ray.engine.measure.ranking import separate

    draw = np.random.default_rng(0)
    for index in range(9):
        pixels = draw.integers(0, 256, (20 + 5 * index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    found = exported.evaluate(ood_datasets=[f"folder:{tmp_path}/"], resamples=20)
    name = f"test_ood_{re.sub(r'[^0-9A-Za-z_]+', '-', tmp_path.name)}"
    own = exported.predict(torch.from_numpy(np.array(load_dataset("synthetic", "test").images)))
    expected = separate(own.uncertainty, exported.predict(tmp_path).uncertainty)
    for figure, value in expected.items():
        assert found[f"{name}_{figure}"] == pytest.approx(value, abs=0.02)
    assert found[f"{name}_auroc_low"] <= found[f"{name}_auroc"] <= found[f"{name}_auroc_high"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ood_datasets": ["synthetic"]}, "own data"),
        ({"ood_datasets": ["digits", "digits"]}, "differ by name"),
        ({"ood_datasets": ["digit"]}, "digits"),
        ({"ood_datasets": ["folder:nowhere"]}, "no folder"),
        ({"scores": ["entropi"]}, "entropy"),
        ({"coverages": [0.0]}, "above 0"),
        ({"coverages": [float("nan")]}, "above 0"),
        ({"resamples": -1}, "resamples"),
    ],
)
def test_options_that_cannot_be_are_refused_before_compute(exported, options, words, monkeypatch):
    monkeypatch.setattr("ekd_ray.results.bundle.assess_model", None)
    with pytest.raises(ekd.UserError, match=words) as refused:
        exported.evaluate(**options)
    assert "\n" not in str(refused.value)


def test_a_set_of_the_same_classes_is_refused_by_their_names(exported, folder, tmp_path):
    with pytest.raises(ekd.UserError, match=r"shares classes .*pattern2, pattern7"):
        exported.evaluate(ood_datasets=[f"folder:{folder}"])
    place = tmp_path / "mixed" / "Pattern3"
    place.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(place / "a.png")
    with pytest.raises(ekd.UserError, match=r"shares classes .*Pattern3"):
        exported.evaluate(ood_datasets=[f"folder:{place.parent}"])


@pytest.mark.parametrize(
    ("there", "here", "refused"),
    [
        (["0", "1", "2"], ["0", "1"], False),  # names of classes that have none
        (["0", "1"], ["1", "0"], True),
        (["cat", "7"], ["7", "dog"], False),
        (["Cat"], ["cat", "dog"], True),
        (["pickup_truck"], ["truck"], False),
    ],
)
def test_which_classes_are_the_same(there, here, refused):
    with pytest.raises(ekd.UserError) if refused else contextlib.nullcontext():
        check_outside("other", there, here)


def test_the_command_prints_figures_with_intervals(exported, capsys):
    assert run_command([str(exported.path), "--ood-dataset", "noise", "--score", "all",
                        "--coverage", "0.7", "--resamples", "10"], "evaluate") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "…" not in shown and "noise: AUROC" in shown and "accuracy at coverage 0.7" in shown
    for name in SCORES:
        assert name in shown
    accuracy = next(line for line in shown.splitlines() if line.strip().startswith("accuracy "))
    value, low, high = map(float, re.findall(r"(\d+\.\d\d)%", accuracy))
    assert low <= value <= high
    assert run_command([str(exported.path), "--resamples", "0", "--json"], "evaluate") == 0
    assert json.loads(capsys.readouterr().out) == exported.evaluate()
