"""An interrupted run continues bit for bit as if it had not been; from a bad checkpoint
it begins again."""

from __future__ import annotations

import contextlib
import io
import json
import zlib

import pytest
import torch
from engine_runs import Killed, kill_at_step, state, untimed

import ekd_ray.engine.checkpoint as checkpoints
import ekd_ray.engine.distill as engine
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import read_history
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path
from ekd_ray.losses.methods import with_method


def kill_after_epoch(epoch):
    def on_epoch(row):
        if row["epoch"] == epoch:
            raise Killed

    return on_epoch


def killed_run(config, folder, epoch):
    """Checkpointed at the end of every epoch, killed after epoch `epoch`."""
    distill(config, out=folder, on_epoch=kill_after_epoch(epoch), threads=1, checkpoint_seconds=0)


SOLVERS = {
    "sgd": {},
    "nesterov": {"nesterov": True, "channels_last": False},
    "adamw": {"optimizer": "adamw", "lr": 0.005, "schedule": "cosine", "lr_warmup": 1},
    "learned prior": {"method": "evidential", "learn_log_prior": True},
}


@pytest.fixture(scope="module")
def straight(tiny):
    """Uninterrupted three-epoch runs by solver, made on demand: (config, history, weights)."""
    made = {}

    def run(name):
        if name not in made:
            values = dict(SOLVERS[name])
            config = tiny(epochs=3)
            config = with_method(config, values.pop("method", "none"), **values)
            result = distill(config, threads=1)
            made[name] = (config, result.history, state(result), result.log_prior)
        return made[name]

    return run


def assert_equal_run(result, reference):
    _, history, weights, log_prior = reference
    assert untimed(result.history) == untimed(history)
    found = state(result)
    assert [key for key in weights if not torch.equal(weights[key], found[key])] == []
    assert result.log_prior == log_prior


@pytest.mark.parametrize("solver", SOLVERS)
def test_resume_between_epochs_is_exact(solver, straight, tmp_path):
    reference = straight(solver)
    config = reference[0]
    with pytest.raises(Killed):
        killed_run(config, tmp_path, 1)
    torch.manual_seed(5)
    seen = []
    result = distill(config, out=tmp_path, on_epoch=seen.append, threads=1)
    assert [row["epoch"] for row in seen] == [2, 3]
    assert_equal_run(result, reference)
    assert read_history(tmp_path) == result.history


@pytest.mark.parametrize("solver", ["sgd", "adamw", "learned prior"])
def test_resume_inside_an_epoch_is_exact(solver, straight, tmp_path, monkeypatch):
    """Killed at step 6 (the last of epoch 2), resumed from the checkpoint after step 5."""
    reference = straight(solver)
    config = reference[0]
    with monkeypatch.context() as patch:
        kill_at_step(patch, 6)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    assert progress(tmp_path)["epoch"] == 2
    assert progress(tmp_path)["step"] == 2
    result = distill(config, out=tmp_path, threads=1)
    assert_equal_run(result, reference)
    assert read_history(tmp_path) == result.history


def test_resume_from_a_checkpoint_older_than_the_history(straight, tmp_path, monkeypatch):
    """Epoch 2 was logged, its checkpoint was not due: it is trained again and logged once."""
    reference = straight("sgd")
    config = reference[0]
    save = engine._save
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_save", lambda run, p: save(run, p) if run.epoch == 2 else None)
        with pytest.raises(Killed):
            killed_run(config, tmp_path, 2)
    assert [row["epoch"] for row in read_history(tmp_path)] == [1, 2]
    result = distill(config, out=tmp_path, threads=1)
    assert_equal_run(result, reference)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_finished_run_returns_at_once(straight, tmp_path, monkeypatch):
    reference = straight("sgd")
    distill(reference[0], out=tmp_path, threads=1)
    monkeypatch.setattr(engine, "_train_step", None)
    assert_equal_run(distill(reference[0], out=tmp_path, threads=1), reference)
    assert [row["epoch"] for row in read_history(tmp_path)] == [1, 2, 3]


def test_checkpoints_are_rare_unless_asked_for(tiny, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(engine, "_save", lambda run, path: saved.append((run.epoch, run.step)))
    distill(tiny(), out=tmp_path / "rare", threads=1, checkpoint_seconds=3600)
    assert saved == [(3, 0)]  # the finished run only
    saved.clear()
    distill(tiny(), out=tmp_path / "often", threads=1, checkpoint_seconds=0, checkpoint_steps=2)
    assert saved == [(1, 2), (2, 0), (2, 2), (3, 0)]


# Checkpoints that cannot be continued


def progress(folder):
    return checkpoints._read(folder / CHECKPOINT)["progress"]


@pytest.fixture(scope="module")
def checkpoint_bytes(tiny, tmp_path_factory):
    """A sound checkpoint after epoch 1 of 2 of the tiny configuration."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.raises(Killed):
        killed_run(tiny(), folder, 1)
    return (folder / CHECKPOINT).read_bytes()


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def sealed(content):
    """Foreign content with a good checksum."""
    return checkpoints._MAGIC + content + zlib.crc32(content).to_bytes(4, "big")


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-100],
    "header only": lambda data: data[:20],
    "garbage": lambda data: b"\xff" * 500,
    "foreign": lambda data: saved({"x": torch.zeros(2)}),
    "no checksum": lambda data: data[:-4],
    "a flipped bit": lambda data: flipped(data, len(data) // 2),
    "a flipped bit of the checksum": lambda data: flipped(data, len(data) - 3),
    "code in place of tensors": lambda data: sealed(saved(print)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_a_damaged_checkpoint_the_run_begins_again(damage, tiny, tmp_path, checkpoint_bytes):
    path = tmp_path / CHECKPOINT
    path.write_bytes(DAMAGES[damage](checkpoint_bytes))
    assert path.read_bytes() != checkpoint_bytes
    with pytest.raises(UserError, match="damaged or not ours"):
        checkpoints._read(path)
    seen = []
    with pytest.warns(UserWarning, match="damaged or not ours.*begun again from its start"):
        distill(tiny(), out=tmp_path, on_epoch=seen.append, threads=1)
    assert [row["epoch"] for row in seen] == [1, 2]
    assert read_history(tmp_path) == seen
    assert progress(tmp_path)["epoch"] == 3, "the checkpoint is good again"


def test_a_newer_checkpoint_is_refused(tiny, tmp_path, checkpoint_bytes, monkeypatch):
    (tmp_path / CHECKPOINT).write_bytes(checkpoint_bytes)
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 1)
    with pytest.raises(UserError, match="has format version 2, and this ekd_ray reads up to 1"):
        distill(tiny(), out=tmp_path, threads=1)


def test_from_an_older_checkpoint_the_run_begins_again(
    tiny, tmp_path, checkpoint_bytes, monkeypatch
):
    (tmp_path / CHECKPOINT).write_bytes(checkpoint_bytes)
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 3)
    with pytest.warns(UserWarning, match="written by an older ekd_ray. It is begun again"):
        distill(tiny(), out=tmp_path, threads=1)
    assert [row["epoch"] for row in read_history(tmp_path)] == [1, 2]


@pytest.mark.parametrize("change", [{"lr": 0.04}, {"seed": 1}, {"epochs": 3}, {"momentum": 0.8}])
def test_a_checkpoint_of_another_configuration_is_refused(change, tiny, tmp_path, checkpoint_bytes):
    path = tmp_path / CHECKPOINT
    path.write_bytes(checkpoint_bytes)
    with pytest.raises(UserError, match=r"belongs to another configuration .* another --out"):
        distill(tiny(**change), out=tmp_path, threads=1)
    assert path.read_bytes() == checkpoint_bytes


def test_a_failed_write_leaves_the_checkpoint_before(tiny, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        with atomic_path(path) as temporary:
            yield temporary
            raise OSError("no space left on device")

    with pytest.raises(Killed):
        killed_run(tiny(), tmp_path, 1)
    before = (tmp_path / CHECKPOINT).read_bytes()
    monkeypatch.setattr(checkpoints, "atomic_path", full)
    with pytest.raises(OSError, match="no space"):
        distill(tiny(), out=tmp_path, threads=1)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp")) == []
