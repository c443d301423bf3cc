"""Files that must not load: malicious, damaged or no checkpoint, and readable ones whose
metadata, architecture or values do not serve."""

import contextlib
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekd_ray.errors import UserError
from ekd_ray.models import build_model, load_weights, read_metadata, save_weights


def trained(name="resnet8", classes=10, seed=0):
    torch.manual_seed(seed)
    return build_model(name, classes)


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Payload:
    """A pickle that creates a file when it is executed."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol0", "protocol2", "protocol5", "tensor"])
def test_malicious_pickles_are_not_executed(refused, tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    evil = {"model": Payload(marker)}
    if form == "tensor":
        evil = {"model": {**trained().state_dict(), "fc.bias": Payload(marker)}}
    if form.startswith("protocol"):
        data = pickle.dumps(evil, protocol=int(form[-1]))
    else:
        data = torch_bytes(evil, _use_new_zipfile_serialization=form != "legacy")
    path.write_bytes(data)
    message = refused(trained(), path)
    with pytest.raises(UserError):
        read_metadata(path)
    assert not marker.exists()
    if form in ("zip", "legacy", "protocol2", "tensor"):
        assert "refused and not executed" in message
        assert "more than tensors (posix.system)" in message
    with contextlib.suppress(Exception):  # the payload is a real one: unsafe loading runs it
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list and no state_dict"),
        ({"model": {}}, "holds a dict and no state_dict"),
        ({0: torch.ones(1)}, "its entry '0' is named by a int and no text"),
        ({"epoch": 3, "fc.bias": torch.ones(1)}, "its entry 'epoch' is a int and no tensor"),
        ({"state_dict": {"fc.weight": [1.0]}}, "its entry 'fc.weight' is a list"),
        ({"model": {3: torch.ones(1)}}, "its entry '3'"),
    ],
)
def test_pickles_without_a_state_dict(refused, tmp_path, content, words):
    torch.save(content, tmp_path / "m")
    assert words in refused(trained(), tmp_path / "m")


def zip_of_text():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no checkpoint"),
        (b"<!DOCTYPE html>\n<html>not found</html>", "no checkpoint"),
        (zip_of_text(), "no checkpoint"),
        (b"\x80\x02", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{not json at all", "damaged"),
        (random.Random(0).randbytes(300), "weights"),
    ],
)
def test_files_that_are_no_checkpoint(refused, tmp_path, data, words):
    path = tmp_path / "m.pth"
    path.write_bytes(data)
    assert words in refused(trained(), path)
    with pytest.raises(UserError):
        read_metadata(path)


def test_missing_file_folder_and_odd_name(refused, tmp_path):
    assert "No such file or directory; check the path" in refused(trained(), tmp_path / "none.pth")
    assert "No such file" in refused(trained(), tmp_path / "two\nlines")
    assert "folder" in refused(trained(), tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_metadata(tmp_path / "none.pth")


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
WHOLE = {
    "zip": torch_bytes({"model": STATE}),
    "legacy": torch_bytes({"model": STATE}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(STATE, {"format": "pt"}),
}


forty_examples = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("form", WHOLE)
@forty_examples
@given(data=st.data())
def test_truncated_at_any_length(refused, tmp_path, form, data):
    whole = WHOLE[form]
    length = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "m"
    path.write_bytes(whole[:length])
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})
    refused(model, path)
    path.write_bytes(whole)
    load_weights(model, path)  # the whole file is good
    assert torch.equal(model["a"].weight, STATE["a.weight"])


@pytest.mark.parametrize("form", WHOLE)
@forty_examples
@given(data=st.data())
def test_flipped_bytes_never_give_another_error(tmp_path, form, data):
    """Damage may go unnoticed inside the numbers; it must never be anything but a UserError."""
    damaged = bytearray(WHOLE[form])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m"
    path.write_bytes(damaged)
    with contextlib.suppress(UserError):
        load_weights(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)}), path)


# Readable files


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
