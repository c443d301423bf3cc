"""Several teachers' files as one: what they say together, the runs that it teaches, mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from engine_runs import CPU, assert_same_run, state

import ekd_ray.engine.teacher.source as teachers
from ekd_ray.engine.distill import distill
from ekd_ray.engine.measure.teacher_pass import look_at_teacher
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.joining import join_teachers
from ekd_ray.engine.teacher.source import live_teacher
from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_model, read_metadata, save_weights

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_teacher(path, name="resnet8", seed=0, *, classes=10, stated=HALF, **facts):
    torch.manual_seed(seed)
    model = build_model(name, classes)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))  # gives its batch norms statistics
        model.fc.weight.mul_(3.0)  # certain of something
    mean, std = stated or (None, None)
    save_weights(model, path, model_name=name, num_classes=classes, mean=mean, std=std, **facts)
    return path


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A softmax and an evidential teacher, of two architectures and two normalisations."""
    folder = tmp_path_factory.mktemp("members")
    return [
        write_teacher(folder / "a.safetensors"),
        write_teacher(folder / "b.safetensors", "resnet14", 1, stated=IMAGENET, log_prior=-0.4),
    ]


@pytest.fixture(scope="module")
def joined(members):
    return join_teachers(members, members[0].with_name("joined.safetensors"))


@pytest.fixture(scope="module")
def taught(tiny, joined):
    """Builds a configuration under the ensemble."""
    named = {"teacher": joined.model, "teacher_weights": str(joined.path)}
    return lambda method, **values: with_method(
        tiny(), method, **{"augment": "none", **named, **values}
    )


def test_its_answer_has_the_moments_of_its_members(taught, members, joined):
    assert joined.model == "ensemble:resnet8,resnet14" and joined.num_classes == 10
    config = resolve(taught("ekd"))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = live_teacher(config, 10, precision="float32", device=CPU)(images).double()
    logits = []
    for path, name, (mean, std) in zip(
        members, ("resnet8", "resnet14"), (HALF, IMAGENET), strict=True
    ):
        inputs = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            logits.append(load_model(name, 10, path)(inputs).double().numpy())
    softmax = np.exp(logits[0]) / np.exp(logits[0]).sum(1, keepdims=True)
    a = np.exp(logits[1]) + math.exp(-0.4)
    p = np.stack([softmax, a / a.sum(1, keepdims=True)])
    own = (p[1] * (1 - p[1])).sum(1) / (a.sum(1) + 1) / 2
    mean = p.mean(0)
    a0 = (mean * (1 - mean)).sum(1) / (p.var(0).sum(1) + own) - 1
    expected = torch.from_numpy(np.log(a0)[:, None] + np.log(mean))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["ekd", "kd", pytest.param("mlkd+ekd", marks=pytest.mark.slow)])
def test_a_warm_run_needs_none_of_its_members(method, taught, own_cache, monkeypatch):
    config = taught(method, view_pool=3) if method == "mlkd+ekd" else taught(method)
    expected = distill(config.replace(teacher_cache="off"), threads=1)
    weights = state(expected)
    assert all(map(math.isfinite, expected.history[-1].values()))
    assert_same_run(distill(config.replace(teacher_cache="on"), threads=1), expected, weights)
    assert len(list(list_tables())) == (2 if method == "mlkd+ekd" else 1)
    teachers._network.cache_clear()
    monkeypatch.setattr(teachers, "load_model", None)
    assert_same_run(distill(config.replace(teacher_cache="on"), threads=1), expected, weights)


def test_methods_of_both_kinds_share_its_table(taught, own_cache):
    for method in ("ekd", "kd"):
        distill(taught(method, teacher_cache="on", epochs=1), threads=1)
    assert len(list(list_tables())) == 1


def test_its_figures_are_those_of_the_mean(taught):
    found = [look_at_teacher(resolve(taught(method)), None, 1) for method in ("ekd", "kd")]
    assert found[0].metrics == found[1].metrics
    assert found[0].log_prior is None and found[0].sha256


def test_its_file_says_what_it_is_made_of_and_is_written_alike(members, tmp_path):
    paths = [join_teachers(members, tmp_path / name).path for name in ("one", "two")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    facts = read_metadata(paths[0])
    assert [member["model"] for member in facts.extra["members"]] == ["resnet8", "resnet14"]
    assert [member["sha256"] for member in facts.extra["members"]] == [
        read_metadata(path).sha256 for path in members
    ]


def test_a_file_that_says_little_is_read_as_its_user_says(members, tmp_path):
    bare = tmp_path / "bare.safetensors"
    torch.manual_seed(5)
    state_of = build_model("resnet20", 10).state_dict()
    safetensors.torch.save_file({f"net.{k}": v for k, v in state_of.items()}, bare)
    with pytest.raises(UserError, match="--teacher-normalization"):
        join_teachers([members[0], bare], tmp_path / "out", model="resnet20")
    found = join_teachers(
        [members[0], bare], tmp_path / "out", model="resnet20", normalization="cifar10"
    )
    assert found.model == "ensemble:resnet8,resnet20"
    assert build_model(found.model, 10).std.shape == (2, 3)
    ensemble = load_model(found.model, 10, found.path)
    assert ensemble.mean[1].tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
    assert torch.equal(ensemble.mean[0], torch.full((3,), 0.5))


def one_class_more(folder: Path) -> Path:
    return write_teacher(folder / "eleven.safetensors", classes=11)


def copied(folder: Path) -> Path:
    """The same weights in another file: its bytes differ."""
    return write_teacher(folder / "again.safetensors", dataset="synthetic")


def of_other_data(folder: Path) -> Path:
    return write_teacher(folder / "other.safetensors", seed=3, dataset="cifar10")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (one_class_more, ("10", "11", "leave one out")),
        (copied, ("same teacher", "again.safetensors")),
        (of_other_data, ("digits", "cifar10")),
    ],
)
def test_members_that_do_not_fit_are_refused(make, words, tmp_path):
    first = write_teacher(
        tmp_path / "first.safetensors", dataset="digits" if make is of_other_data else None
    )
    with pytest.raises(UserError) as raised:
        join_teachers([first, make(tmp_path)], tmp_path / "out.safetensors")
    assert all(word in str(raised.value) for word in words)
    assert not (tmp_path / "out.safetensors").exists()


def test_one_file_an_ensemble_again_and_a_file_that_is_there_are_refused(members, joined, tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        join_teachers(members[:1], tmp_path / "out")
    with pytest.raises(UserError, match="an ensemble already"):
        join_teachers([members[0], joined.path], tmp_path / "out")
    with pytest.raises(UserError, match="there already"):
        join_teachers(members, joined.path)
    with pytest.raises(UserError, match="cannot write"):
        join_teachers(members, joined.path / "out")  # below a file
    with pytest.raises(UserError, match="at least 2 members"):
        build_model("ensemble:resnet8", 10)
    with pytest.raises(UserError, match="resnet9"):
        build_model("ensemble:resnet8,resnet9", 10)


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("ekd", {"teacher_normalization": "cifar10"}, ("teacher_normalization", "own")),
        ("ekd", {"teacher_log_prior": 0.3}, ("teacher_log_prior", "0.3")),
        ("wkd", {}, ("linear layer", "another method")),
        ("kd", {"teacher": "resnet14"}, ("ensemble:resnet8,resnet14",)),
        ("kd", {"teacher": "ensemble:resnet8"}, ("at least 2 members",)),
        ("kd", {"student": "ensemble:resnet8,resnet8"}, ("student must be one network",)),
        ("kd", {"dataset": "cifar100"}, ("classes",)),
    ],
)
def test_what_an_ensemble_cannot_have_is_refused_before_compute(
    method, values, words, taught, monkeypatch
):
    if "dataset" in values:
        monkeypatch.setattr("ekd_ray.engine.resolve.check_dataset", lambda *args, **kwargs: None)
    with pytest.raises(UserError) as raised:
        resolve(taught(method, **values))
    assert all(word in str(raised.value) for word in words)
