"""Readable files whose weights must not load: metadata, architecture, values."""

import json

import pytest
import safetensors.torch
import torch

from ekd_ray.errors import UserError
from ekd_ray.models import build_model, load_weights, read_metadata, save_weights


def trained(name="resnet8", classes=10, seed=0):
    torch.manual_seed(seed)
    return build_model(name, classes)


def own_bytes(tmp_path, model=None, **changes):
    facts = {"model_name": "resnet8", "num_classes": 10, "mean": None, "std": None, **changes}
    save_weights(model or trained(), tmp_path / "own", **facts)
    return (tmp_path / "own").read_bytes()


def with_header(tmp_path, text):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(trained().state_dict(), path, {"ekd_ray": text})
    return path


def test_newer_format(refused, tmp_path):
    path = with_header(tmp_path, json.dumps({"format_version": 2, "new": "fields"}))
    assert "format version 2" in refused(trained(), path)
    with pytest.raises(UserError, match="reads up to 1: upgrade ekd_ray"):
        read_metadata(path)


GOOD = {
    "format_version": 1,
    "model": "resnet8",
    "num_classes": 10,
    "mean": None,
    "std": None,
    "log_prior": None,
    "dataset": None,
    "extra": {},
}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format_version": "1"}',
        '{"format_version": 1}',
        json.dumps(GOOD | {"num_classes": "ten"}),
        json.dumps(GOOD | {"log_prior": float("nan")}),
        json.dumps(GOOD | {"std": [1, "x"]}),
    ],
)
def test_broken_metadata(refused, tmp_path, text):
    path = with_header(tmp_path, text)
    refused(trained(), path)
    with pytest.raises(UserError):
        read_metadata(path)
    load_weights(trained(), with_header(tmp_path, json.dumps(GOOD)))


def test_own_file_of_another_architecture(refused, tmp_path):
    own_bytes(tmp_path)
    message = refused(trained("resnet14"), tmp_path / "own")
    assert "holds a 'resnet8', the model is a 'resnet14'" in message


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_another_class_count(refused, tmp_path, own, name):
    source = trained(name, 100)
    if own:
        own_bytes(tmp_path, source, model_name=name, num_classes=100)
    else:
        torch.save({"model": source.state_dict()}, tmp_path / "own")
    assert "has 100 classes, the model 10:" in refused(trained(name, 10), tmp_path / "own")


@pytest.mark.parametrize(
    ("weights", "model", "words"),
    [
        (
            "resnet20a",
            "resnet20",
            "lacks 10 of the model's tensors (first: 'layer2.0.downsample.0.weight'): "
            "use 'resnet20a' with 10 classes",
        ),
        (
            "wrn_16_2",
            "wrn_16_4",
            "has 'block1.layer.0.conv1.weight' with shape [32, 16, 3, 3], the model "
            "[64, 16, 3, 3]: use 'wrn_16_2'",
        ),
    ],
)
def test_another_architecture(refused, tmp_path, weights, model, words):
    torch.save({"model": trained(weights).state_dict()}, tmp_path / "m")
    assert words in refused(trained(model), tmp_path / "m")


def test_missing_and_surplus_tensors(refused, tmp_path):
    state = trained().state_dict()
    del state["layer1.0.bn1.bias"], state["fc.bias"]
    state["extra\nline"] = torch.ones(1)
    torch.save(state, tmp_path / "m")
    message = refused(trained(), tmp_path / "m")
    assert "lacks 2 of the model's tensors (first: 'layer1.0.bn1.bias')" in message
    assert "has 1 that the model lacks (first: 'extra\\nline')" in message
    assert "build the model that the weights were made for" in message


def test_no_classifier_to_count(tmp_path):
    torch.save({"features.0.weight": torch.ones(3, 3)}, tmp_path / "m")
    with pytest.raises(UserError, match="no classifier under a known name"):
        read_metadata(tmp_path / "m")


def changed(key, value):
    return {**trained().state_dict(), key: value}


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fc.bias", torch.ones(10, dtype=torch.int64), "torch.int64"),
        ("fc.bias", torch.ones(10, dtype=torch.complex64), "torch.complex64"),
        ("fc.bias", torch.ones(10).to_sparse(), "sparse"),
        ("fc.bias", torch.ones(10, device="meta"), "not an ordinary"),
        ("fc.bias", torch.full((10,), float("nan")), "NaN or infinite values in 'fc.bias'"),
        ("bn1.running_var", torch.full((16,), float("inf")), "NaN or infinite"),
        ("fc.bias", torch.full((10,), 1e300, dtype=torch.float64), "NaN or infinite"),
        ("bn1.num_batches_tracked", torch.tensor(float("nan")), "NaN or infinite"),
    ],
)
def test_values_that_are_no_weights(refused, tmp_path, key, value, words):
    torch.save({"model": changed(key, value)}, tmp_path / "m")
    message = refused(trained(seed=1), tmp_path / "m")
    assert words in message
    assert repr(key) in message
