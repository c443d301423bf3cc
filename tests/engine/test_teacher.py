"""The teacher: what its checkpoint carries, and what a student hears from it."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
import torch
from engine_runs import CPU, by_hand
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ekd_ray.engine.teacher.source as teachers
from ekd_ray.data import dataset_info
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.distill import distill
from ekd_ray.engine.precision import resolve_precision
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.source import LiveTeacher, load_teacher
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_weights, read_metadata

IDS = np.arange(8)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture
def load(run_data):
    """The teacher of a resolved run, asked live."""

    def made(config, precision="float32"):
        config = config.replace(teacher_cache="off")
        return load_teacher(config, run_data(config), precision=precision, device=CPU)

    return made


@pytest.fixture(scope="module")
def student(tiny, with_teacher):
    """A resolved EKD run under the shared teacher."""
    return resolve(with_method(tiny(), "ekd", **with_teacher))


# What the checkpoint carries


def test_the_checkpoint_says_how_to_use_the_teacher(teacher_run):
    path, result = teacher_run
    found, info = read_metadata(path), dataset_info("synthetic")
    assert (found.model, found.num_classes, found.dataset) == ("resnet8", 10, "synthetic")
    assert (found.mean, found.std) == (info.mean, info.std)
    assert found.log_prior == result.log_prior == result.metrics["log_prior"]
    assert found.extra["config"] == result.config.without_places().to_dict()
    assert found.extra["precision"] == "float32"


def test_an_ended_training_leaves_history_and_no_checkpoint(teacher_run):
    path, result = teacher_run
    lines = (path.parent / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert not (path.parent / CHECKPOINT).exists()
    events = EventAccumulator(str(path.parent)).Reload()
    assert len(events.Scalars("val/top1")) == len(result.history)


@pytest.mark.parametrize(
    ("settings", "method", "learned"),
    [
        ({}, "evidential", True),
        ({"learn_log_prior": False, "log_prior": -1.0}, "evidential", False),
        ({"method": "none"}, "none", False),
    ],
)
def test_teacher_config(student, settings, method, learned):
    found = teacher_config(student, "resnet14", {"epochs": 7, **settings})
    assert (found.student, found.method, found.learn_log_prior) == ("resnet14", method, learned)
    assert (found.epochs, found.dataset, found.split_seed) == (7, "synthetic", student.split_seed)
    assert found.teacher is None and found.teacher_weights is None and found.teacher_sha256 is None
    assert found.kd_weight is None and found.ekd_weight is None
    assert resolve(found).method == method


# What a student takes from it


def test_the_student_trains_with_that_prior(student, teacher_run):
    result = distill(student.replace(epochs=1), threads=1)
    assert result.log_prior == pytest.approx(teacher_run[1].log_prior, rel=1e-6)
    assert result.metrics["log_prior"] == result.log_prior
    assert 0 < result.metrics["val_vacuity"] < 1
    assert {"loss_ce", "loss_kd", "loss_ekd"} <= result.metrics.keys()


def test_logits_are_a_plain_forward_with_the_teachers_own_statistics(
    images, teacher_run, student, load
):
    mean, std = (0.1, 0.5, 0.7), (0.3, 0.2, 0.9)  # neither the data set's nor a student's
    text = "/".join(",".join(map(str, part)) for part in (mean, std))
    found = load(student.replace(teacher_normalization=text)).logits(images, IDS, IDS)
    model = build_model("resnet8", 10)
    load_weights(model, teacher_run[0])
    with torch.no_grad():
        expected = model.eval()(by_hand(images, mean, std))
    assert (found.dtype, found.shape) == (torch.float32, (8, 10))
    # Half a unit in the last place of float16, and the arithmetic's own error.
    torch.testing.assert_close(found, expected, rtol=2**-11 + 1e-4, atol=1e-4)
    assert torch.equal(found.half().float(), found)
    own = load(student).logits(images, IDS, IDS)
    assert not torch.allclose(found, own, atol=1e-2)


def test_the_teacher_is_frozen(images, student, load):
    teacher = load(student)
    logits = teacher.logits(images, IDS, IDS)
    model = teacher._network().model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not logits.requires_grad
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()), "folded"
    distill(student.replace(epochs=1, teacher_cache="off"), threads=1)
    after = model.state_dict()
    assert teacher._network().model is model
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(teacher.logits(images, IDS, IDS), logits)


def test_the_head_computes_in_float32_under_bfloat16(images, teacher_run):
    model = build_model("resnet8", 10)
    load_weights(model, teacher_run[0])
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = LiveTeacher(model, "half", precision="bfloat16", channels_last=True)(images)
    (features,) = seen
    assert features.dtype == torch.bfloat16, "the body is not"
    head = model.fc.double()
    expected = features.double() @ head.weight.T + head.bias
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_its_convolutions_do_not_depend_on_the_run_that_asks(images, student, load):
    network = load(student)._network()
    seen, cudnn = [], torch.backends.cudnn
    with arithmetic(deterministic=False):
        hook = network.model.register_forward_pre_hook(
            lambda *_: seen.append((cudnn.deterministic, cudnn.benchmark))
        )
        network(images)
        hook.remove()
    assert seen == [(True, False)]


@pytest.mark.parametrize("kept", [True, False])
def test_a_gpu_computes_rows_of_a_table_in_batches_of_one_size(kept, monkeypatch):
    """Without a table nobody reads a row again, and a run has batches of one size as it is."""
    monkeypatch.setattr(teachers, "ROWS_ON_GPU", 32)
    seen = []

    def network(images):
        seen.append(len(images))
        return images.flatten(1)[:, :3].float()

    teacher = teachers.Teacher(lambda: network, None, mock.sentinel.table if kept else None)
    for count in (1, 32, 33, 70):
        images = torch.empty(count, 3, 4, 4, dtype=torch.uint8, device="meta")
        assert teacher._asked(images).shape == (count, 3)
    assert seen == ([32, 32, 32, 32, 32, 32, 32] if kept else [16, 32, 48, 80])


def test_one_copy_serves_all_trials_of_a_process(student, load):
    first = load(student)._network()
    assert load(student.replace(seed=7, lr=0.2, kd_weight=1.0))._network() is first
    assert load(student.replace(channels_last=False))._network() is not first


def test_a_teacher_file_that_changed_is_loaded_again(tiny, tmp_path, images, load):
    """A reused process must not serve the old weights of a path that was written again."""
    path, found = tmp_path / "teacher.safetensors", []
    for seed in (0, 1):
        config = teacher_config(tiny(epochs=1, seed=seed), "resnet8", {})
        train_teacher(config, path, threads=1)
        run = resolve(with_method(tiny(), "kd", teacher="resnet8", teacher_weights=str(path)))
        found.append(load(run).logits(images, IDS, IDS))
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_precision_is_kept_and_auto_is_one_of_them(name):
    assert resolve_precision(name, CPU) == name
    assert resolve_precision("auto", CPU) in ("float32", "bfloat16")
