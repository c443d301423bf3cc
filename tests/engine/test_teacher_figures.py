"""A teacher's own figures, against a computation from the network's logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ekd_ray.data import load_dataset
from ekd_ray.engine import rundata
from ekd_ray.engine.measure import teacher_pass
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.measure.teacher_pass import measure_teacher
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import split_ids
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_weights, save_weights


@pytest.fixture
def student(tiny, with_teacher):
    return resolve(with_method(tiny(teacher_cache="off"), "ekd", **with_teacher))


def figures(path, config, prior=None):
    """Accuracy, NLL and ECE of the validation images, in float64 and NumPy.

    `prior`: of a file without one.
    """
    arrays = load_dataset("synthetic", "train")
    ids = split_ids(config, arrays.labels)[1]
    model = build_model("resnet8", arrays.num_classes).eval()
    known = load_weights(model, path)
    images = torch.from_numpy(np.asarray(arrays.images[ids])).float() / 255
    images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (known.mean, known.std))
    with torch.no_grad():
        z = model((images - mean) / std).double().numpy()
    # The mean of a Dirichlet with the concentrations exp(z) + exp(prior), or a softmax.
    prior = prior if known.log_prior is None else known.log_prior
    mass = np.exp(z) + (0.0 if prior is None else np.exp(prior))
    p, labels = mass / mass.sum(1, keepdims=True), arrays.labels[ids]
    right, confidence = p.argmax(1) == labels, p.max(1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(15)]
    nll = -np.log(p[np.arange(len(p)), labels]).mean()
    return len(ids), {
        "val_top1": right.mean(), "val_nll": nll, "val_ece": sum(gaps) / len(p)
    }  # fmt: skip


def test_they_are_those_of_its_logits(student, with_teacher, tmp_path, monkeypatch):
    splits = []

    def load(name, split, **options):
        splits.append(split)
        return load_dataset(name, split, **options)

    monkeypatch.setattr(rundata, "load_dataset", load)
    found = measure_teacher(student, candidates=1, data_root=None, threads=1)
    count, expected = figures(with_teacher["teacher_weights"], student)
    assert found.images == count == 32
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-5), name
    assert set(splits) == {"train"}, "the test split has no part in a teacher"
    found.write(tmp_path)
    assert TeacherFigures.read(tmp_path) == found
    assert TeacherFigures.read(tmp_path / "older") is None


@pytest.mark.parametrize(
    ("method", "priors", "prior"),
    [
        ("kd", {}, None),
        ("ekd", {"log_prior": 0.75}, 0.75),
        ("ekd", {"log_prior": 0.75, "teacher_log_prior": -0.5}, -0.5),
    ],
)
def test_a_teacher_without_a_prior_is_read_as_the_method_reads_it(
    tiny, tmp_path, method, priors, prior
):
    path = tmp_path / "plain.safetensors"
    torch.manual_seed(1)
    save_weights(
        build_model("resnet8", 10), path, model_name="resnet8", num_classes=10,
        mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    shared = with_method(tiny(), method, teacher="resnet8", teacher_weights=str(path), **priors)
    found = measure_teacher(resolve(shared), candidates=0, data_root=None, threads=1)
    assert found.log_prior is None
    expected = figures(path, shared, prior)[1]["val_nll"]
    assert found.metrics["val_nll"] == pytest.approx(expected, abs=1e-5)


def test_of_many_images_evenly_spaced_ones_are_taken(student, monkeypatch):
    monkeypatch.setattr(teacher_pass, "MOST_IMAGES", 10)
    asked = []

    def ask(network, data, ids):
        asked.extend(np.searchsorted(data.validation_ids, ids).tolist())
        return torch.full((len(ids), 10), float("nan"))

    monkeypatch.setattr(teacher_pass, "_logits", ask)
    found = measure_teacher(student, candidates=0, data_root=None, threads=1)
    assert found.images == 10 and asked == [0, 3, 6, 9, 12, 16, 19, 22, 25, 28]
    assert "val_nll" not in found.metrics, "JSON has no NaN"
