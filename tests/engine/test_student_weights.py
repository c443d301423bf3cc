"""A student that starts from weights: found, hashed, checked, normalised and trained on."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill, start_run
from ekd_ray.engine.final import save_student
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.train_teacher import teacher_config
from ekd_ray.errors import UserError
from ekd_ray.models import build_model, read_metadata, save_weights

RUN = DistillConfig(
    dataset="digits", student="resnet8", method="none", epochs=1, batch_size=16, train_subset=60,
    validation_fraction=0.5, precision="float32",
)  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """A resnet8 of 5 classes, whose images had another normalisation than the digits'."""
    torch.manual_seed(1)
    model, path = build_model("resnet8", 5), tmp_path / "weights.safetensors"
    save_weights(
        model, path, model_name="resnet8", num_classes=5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    return path, model


def test_weights_are_part_of_the_run_and_their_place_is_not(weights, tmp_path) -> None:
    path, _ = weights
    found = resolve(RUN.replace(student_weights=str(path)))
    assert found.student_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.student_normalization == "0.1,0.2,0.3/0.4,0.5,0.6"
    assert resolve(found) == found
    moved = shutil.copy(path, tmp_path / "elsewhere.safetensors")
    again = resolve(RUN.replace(student_weights=str(moved)))
    drawn = resolve(RUN)
    assert again.fingerprint() == found.fingerprint() != drawn.fingerprint()
    assert "student_sha256" not in drawn.identity()
    shown = found.without_places()
    assert shown.student_weights is None and shown.student_sha256 == found.student_sha256


def test_other_weights_than_those_of_the_run_are_refused(weights, tmp_path) -> None:
    path, model = weights
    found = resolve(RUN.replace(student_weights=str(path)))
    with pytest.raises(UserError, match=r"give --student-weights"):
        resolve(found.replace(student_weights=None))
    other = tmp_path / "other.safetensors"
    save_weights(model, other, model_name="resnet8", num_classes=5, mean=None, std=None)
    with pytest.raises(UserError, match=f"must be {found.student_sha256}"):
        resolve(found.replace(student_weights=str(other)))
    with pytest.raises(UserError, match="student_normalization"):
        resolve(RUN.replace(student_normalization="imagenot"))


def test_a_run_begins_with_the_weights_and_their_normalisation(weights, tmp_path) -> None:
    path, model = weights
    run = start_run(RUN.replace(student_weights=str(path)), None)
    begun, drawn = run.learner.student, start_run(RUN, None).learner.student
    there = model.state_dict()
    for name, value in begun.state_dict().items():
        expected = drawn.state_dict() if name.startswith("fc.") else there
        assert torch.equal(value, expected[name]), name
    assert (run.data.mean, run.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    result = distill(RUN.replace(student_weights=str(path)))
    save_student(result, tmp_path / "student.safetensors", data_root=None)
    facts = read_metadata(tmp_path / "student.safetensors")
    assert (facts.mean, facts.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_teacher_that_is_trained_does_not_start_from_the_students_weights(weights) -> None:
    base = resolve(RUN.replace(student_weights=str(weights[0])))
    teacher = teacher_config(base, "resnet14", {})
    assert teacher.student_weights is None and teacher.student_normalization is None
    own = teacher_config(base, "resnet14", {"student_weights": "own.pth"})
    assert own.student_weights == "own.pth" and own.student_sha256 is None
