"""Weights that a student starts from: the backbone of a file, and the caches of libraries."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import MobileNet_V3_Small_Weights

from ekd_ray.errors import UserError
from ekd_ray.models import (
    build_model,
    cached_weights,
    library_normalization,
    load_backbone,
    locate_weights,
)

SMALL = "torchvision:mobilenet_v3_small"


def pickled(model: torch.nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path


def test_other_classes_leave_the_classifier_as_it_was_drawn(tmp_path: Path) -> None:
    there = build_model("resnet8", 100)
    path = pickled(there, tmp_path / "weights.pth")
    model = build_model("resnet8", 3)
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    facts = load_backbone(model, path)
    assert facts.num_classes == 100
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    head = {"fc.weight", "fc.bias"}
    for name, value in model.state_dict().items():
        expected = drawn[name] if name in head else there.state_dict()[name]
        assert torch.equal(value, expected), name
    assert any(not torch.equal(drawn[n], v) for n, v in model.state_dict().items() if n not in head)


def test_the_same_classes_keep_the_classifier(tmp_path: Path) -> None:
    there, model = build_model("resnet8", 3), build_model("resnet8", 3)
    assert load_backbone(model, pickled(there, tmp_path / "weights.pth")).num_classes == 3
    assert torch.equal(model.fc.weight, there.fc.weight)


def test_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = pickled(build_model("resnet20", 3), tmp_path / "weights.pth")
    model = build_model("resnet8", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="resnet20"):
        load_backbone(model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_torchvision_has_downloaded_is_found(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cached_weights(SMALL) is None
    with pytest.raises(UserError, match="no weights of torchvision:mobilenet_v3_small"):
        locate_weights(SMALL, "cached")
    name = MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    path = pickled(build_model(SMALL, 1000), tmp_path / "hub" / "checkpoints" / name)
    assert cached_weights(SMALL) == path and locate_weights(SMALL, "cached") == str(path)
    assert locate_weights(SMALL, "own.pth") == "own.pth"
    assert load_backbone(build_model(SMALL, 3), path).num_classes == 1000
    assert cached_weights("resnet8") is None and cached_weights("torchvision:nonsense") is None


def test_what_timm_has_downloaded_is_found(monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "timm:test_resnet"
    assert cached_weights(name) is None
    # As huggingface_hub lays its cache out: a branch, and the files of its commit.
    repository = timm.get_pretrained_cfg("test_resnet").hf_hub_id
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(build_model(name, 1000).state_dict(), path)
    assert cached_weights(name) == path


def test_libraries_say_how_their_images_are_normalised() -> None:
    assert library_normalization(SMALL) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert library_normalization("timm:test_resnet") == ((0.5,) * 3, (0.5,) * 3)
    assert library_normalization("resnet8") is None
