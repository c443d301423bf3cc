"""Weights that must load: own files, synthetic foreign checkpoints, and the real published ones."""

import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ekd_ray.errors import UserError
from ekd_ray.models import (
    WeightsMetadata,
    build_model,
    checkpoints_kept,
    load_model,
    load_weights,
    read_metadata,
    save_weights,
)

DATA = os.environ.get("EKD_DATA_ROOT")
needs_data = pytest.mark.skipif(not DATA, reason="EKD_DATA_ROOT is not set")
FACTS = {
    "model_name": "resnet8",
    "num_classes": 10,
    "mean": (0.1, 0.2, 1 / 3),
    "std": [0.25, 0.5, 0.75],
    "log_prior": -1.2199999,
    "dataset": "cifar10",
    "extra": {"epoch": 3, "note": "übung\n"},
}


def trained(name="resnet8", classes=10, seed=0):
    """A model whose every tensor, statistics and counters too, differs from a fresh one."""
    torch.manual_seed(seed)
    model = build_model(name, classes)
    model(torch.randn(4, 3, 32, 32))
    return model


def assert_equal(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


def test_round_trip_is_bit_equal(tmp_path):
    model = trained()
    path = tmp_path / "deep" / "model.safetensors"
    save_weights(model, path, **FACTS)
    other = trained(seed=1)
    metadata = load_weights(other, path)
    assert_equal(other, model.state_dict())
    assert metadata == WeightsMetadata(
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        layout="ekd_ray",
        model="resnet8",
        num_classes=10,
        mean=(0.1, 0.2, 1 / 3),
        std=(0.25, 0.5, 0.75),
        log_prior=-1.2199999,
        dataset="cifar10",
        extra={"epoch": 3, "note": "übung\n"},
    )
    assert read_metadata(str(path)) == metadata
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


@pytest.mark.slow
def test_equal_content_gives_equal_bytes(tmp_path):
    model = trained()
    save_weights(model, tmp_path / "a", **FACTS)
    model.to(memory_format=torch.channels_last)
    reordered = {**FACTS, "extra": dict(reversed(FACTS["extra"].items()))}
    save_weights(model, tmp_path / "b", **reordered)
    script = (
        "import torch, pathlib, sys; sys.path.insert(0, 'tests/models')\n"
        "from test_weights import *\n"
        f"save_weights(trained(), {str(tmp_path / 'c')!r}, **FACTS)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=120)
    first = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == first
    assert (tmp_path / "c").read_bytes() == first
    save_weights(model, tmp_path / "d", **{**FACTS, "log_prior": -1.0})
    assert (tmp_path / "d").read_bytes() != first


def test_other_dtypes_are_kept_and_converted(tmp_path):
    half = trained().half()
    save_weights(half, tmp_path / "m", **FACTS)
    target = trained(seed=1)
    load_weights(target, tmp_path / "m")
    assert_equal(target, half.float().state_dict())


def test_memory_format_and_wrappers_of_the_model_survive(tmp_path):
    source = trained()
    save_weights(source, tmp_path / "m", **FACTS)
    target = trained(seed=1).to(memory_format=torch.channels_last)
    wrapped = torch.compile(target, backend="eager")  # the wrapper alone: nothing is compiled
    load_weights(wrapped, tmp_path / "m")
    assert_equal(target, source.state_dict())
    assert target.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    save_weights(wrapped, tmp_path / "n", **FACTS)
    assert (tmp_path / "n").read_bytes() == (tmp_path / "m").read_bytes()


@pytest.mark.parametrize(
    "bad",
    [{"log_prior": float("nan")}, {"mean": ["x"]}, {"extra": {"x": object()}}, {"std": [None]}],
)
def test_metadata_that_is_no_json_is_refused_and_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="metadata"):
        save_weights(trained(), path, **{**FACTS, **bad})
    assert path.read_bytes() == b"old"


def as_mdistiller(state):
    return {"model": OrderedDict(state)}


def as_akamaster(state):
    renamed = {f"module.{k.replace('fc.', 'linear.')}": v for k, v in state.items()}
    return {"state_dict": renamed, "best_prec1": 93.62}


def as_parameters(state):
    return {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "wrap", "layout"),
    [
        ("resnet8", as_mdistiller, "mdistiller"),
        ("wrn_16_1", as_mdistiller, "mdistiller"),
        ("resnet20a", as_akamaster, "akamaster"),
        ("resnet8", dict, "plain"),
        ("resnet8", as_parameters, "plain"),
        ("resnet8", lambda state: {"state_dict": state, "epoch": 3}, "plain"),
        ("resnet8", lambda state: {f"module.{k}": v for k, v in state.items()}, "plain"),
        ("resnet8", lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}, "plain"),
    ],
)
def test_foreign_pickles(tmp_path, name, wrap, layout, zipped):
    source, target = trained(name, 13), trained(name, 13, seed=1)
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    metadata = load_weights(target, path)
    assert_equal(target, source.state_dict())
    assert (metadata.layout, metadata.model, metadata.num_classes) == (layout, name, 13)
    assert (metadata.mean, metadata.log_prior, metadata.extra) == (None, None, {})
    assert read_metadata(path) == metadata


def test_plain_safetensors_of_a_library(tmp_path):
    name = "torchvision:mobilenet_v3_small"
    source, target = build_model(name, 6), build_model(name, 6)
    path = tmp_path / "tv.safetensors"
    safetensors.torch.save_file(source.state_dict(), path, {"format": "pt"})
    metadata = load_weights(target, path)
    assert_equal(target, source.state_dict())
    assert (metadata.layout, metadata.model, metadata.num_classes) == ("plain", name, 6)
    found = read_metadata(path)  # the last of two classifier layers; not an own model
    assert (found.model, found.num_classes) == (None, 6)


def test_the_last_classifier_layer_counts(tmp_path):
    sizes = {"classifier.10": 6, "classifier.2": 50, "features.11": 70, "classifier.9": 40}
    state = {f"{key}.weight": torch.ones(rows, 3) for key, rows in sizes.items()}
    torch.save(state, tmp_path / "m")
    assert read_metadata(tmp_path / "m").num_classes == 6


def test_old_checkpoints_without_counters(tmp_path):
    source, target = trained(), trained(seed=1)
    target.bn1.num_batches_tracked.fill_(7)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "m")
    load_weights(target, tmp_path / "m")
    assert torch.equal(target.bn1.running_var, source.bn1.running_var)
    assert target.bn1.num_batches_tracked == 7


def test_random_numbers_of_the_caller_are_untouched(tmp_path):
    torch.save(trained(classes=11).state_dict(), tmp_path / "m")
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    read_metadata(tmp_path / "m")
    assert torch.equal(torch.randn(3), expected)


@needs_data
@pytest.mark.parametrize(
    ("file", "layout", "name", "classes"),
    [
        ("cifar10_resnet20_akamaster.th", "akamaster", "resnet20a", 10),
        ("cifar10_resnet56_akamaster.th", "akamaster", "resnet56a", 10),
        ("cifar10_resnet56a_jpeg.th", "akamaster", "resnet56a", 10),
        ("cifar100_resnet56_evidential_ekd.pth", "mdistiller", "resnet56", 100),
    ],
)
def test_real_teachers_load(file, layout, name, classes):
    path = Path(DATA, "teachers", file)
    metadata = load_weights(build_model(name, classes), path)
    assert (metadata.layout, metadata.model, metadata.num_classes) == (layout, name, classes)
    assert read_metadata(path) == metadata


def test_a_foreign_file_is_unpickled_once_while_it_stays_as_it_is(tmp_path, monkeypatch):
    path, read, load = tmp_path / "t.pth", [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: (read.append(1), load(*args, **kw))[1])
    torch.save(trained().state_dict(), path)
    with checkpoints_kept():
        facts = read_metadata(path)
        model = load_model("resnet8", 10, path)
        assert read_metadata(path, whole_classifier=False) == facts
        assert len(read) == 1
        torch.save(trained(seed=1).state_dict(), path)
        os.utime(path, ns=(0, 1))  # a new one within the clock's step is of another time
        other = load_model("resnet8", 10, path)
        assert len(read) == 2 and read_metadata(path).sha256 != facts.sha256
    assert not torch.equal(model.fc.weight, other.fc.weight)
    assert read_metadata(path).num_classes == 10 and len(read) == 2
    load_model("resnet8", 10, path)
    assert len(read) == 3  # nothing keeps the tensors any longer
