"""Files that must not load: malicious, damaged, or no checkpoint at all."""

import contextlib
import io
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
from ekd_ray.models import build_model, load_weights, read_metadata


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
        ({"epoch": 3, "net": {"a": torch.ones(1)}}, "its entry 'epoch' is a int and no tensor"),
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
    assert "does not exist: check the path" in refused(trained(), tmp_path / "none.pth")
    assert "does not exist" in refused(trained(), tmp_path / "two\nlines")
    assert "folder" in refused(trained(), tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_metadata(tmp_path / "none.pth")


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
WHOLE = {
    "zip": torch_bytes({"model": STATE}),
    "legacy": torch_bytes({"model": STATE}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(STATE, {"format": "pt"}),
}


@pytest.mark.parametrize("form", WHOLE)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
