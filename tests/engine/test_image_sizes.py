"""Students that see larger or smaller images than their teacher, and models that refuse a size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_runs import by_hand, slow_view, watch_steps, watch_student

from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.evaluate import EVAL_BATCH, evaluate_model, student_inputs
from ekd_ray.engine.final import evaluate_test
from ekd_ray.engine.resolve import check_model, resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import split_ids
from ekd_ray.engine.teacher.source import LiveTeacher
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method


def cubic(distance):
    """The kernel of Keys, 1981, with a = -3/4, as torch has it."""
    a, x = -0.75, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(size, target):
    """Interpolation matrix [target, size] with half-pixel centres and repeated borders."""
    matrix = np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(tap, 0), size - 1)] += cubic(tap - centre)
    return torch.from_numpy(matrix)


def enlarged(images, size):
    """Normalised images [B, 3, 32, 32] -> [B, 3, size, size], in float64."""
    weights = bicubic(images.shape[-1], size)
    return weights @ images.double() @ weights.T


def normalized(images):
    info = dataset_info("synthetic")
    return by_hand(images, info.mean, info.std)


@pytest.fixture(scope="module")
def large(tiny, with_teacher):
    """A student at 64 below the shared teacher at 32; 24 images train and 16 validate."""
    values = {"train_subset": 40, "batch_size": 8, "epochs": 1, "student_image_size": 64}
    return with_method(tiny(**values), "kd", **with_teacher)


# What each sees


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_students_views_are_enlarged_and_the_teachers_are_not(
    channels_last, large, monkeypatch
):
    asked, batches = [], []
    call = LiveTeacher.__call__

    def recorded(self, images):
        asked.append(images.clone())
        return call(self, images)

    monkeypatch.setattr(LiveTeacher, "__call__", recorded)
    watch_steps(monkeypatch, lambda _, run, batch: batches.append(batch))
    seen = watch_student(monkeypatch)
    distill(large.replace(channels_last=channels_last, teacher_cache="off"), threads=1)
    arrays = load_dataset("synthetic", "train")
    assert (len(batches), len(seen)) == (3, 4)
    for batch, inputs, images in zip(batches, seen, asked, strict=False):
        views = torch.stack(
            [
                slow_view(torch.from_numpy(arrays.images[i].copy()), int(view))
                for i, view in zip(batch.sample_ids, batch.view_ids, strict=True)
            ]
        )
        assert torch.equal(images[: len(views)], views)
        assert (inputs.shape, inputs.dtype) == ((8, 3, 64, 64), torch.float32)
        assert inputs.is_contiguous(memory_format=torch.channels_last) == channels_last
        expected = enlarged(normalized(views), 64).float()
        torch.testing.assert_close(inputs, expected, rtol=1e-4, atol=1e-4)
    # Validation: as they are, and as large.
    _, validation = split_ids(large, arrays.labels)
    plain = normalized(torch.from_numpy(arrays.images[validation]))
    torch.testing.assert_close(seen[3], enlarged(plain, 64).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_test_images_are_enlarged_as_well(large):
    result = distill(large, threads=1)
    shapes = set()
    result.model.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape))
    evaluate_test(result, stage=RunStage.FINAL, data_root=None)
    assert shapes == {(500, 3, 64, 64)}


def test_a_smaller_student_sees_the_mean_of_pixels(tiny, run_data):
    """Antialiased: of fine columns their mean is left, where plain bicubic weighs the inner two."""
    config = tiny(student_image_size=8)
    columns = torch.tensor([200, 0, 0, 200], dtype=torch.uint8).repeat(8).expand(2, 3, 32, 32)
    found = student_inputs(columns, run_data(config), config)
    assert found.shape == (2, 3, 8, 8)
    grey = normalized(torch.full((2, 3, 8, 8), 100.0))
    torch.testing.assert_close(found[..., 2:-2], grey[..., 2:-2], rtol=0, atol=0.1)


@pytest.mark.parametrize(("size", "batch"), [(None, 500), (64, 500), (128, 125), (1024, 1)])
def test_large_images_are_evaluated_in_small_batches(size, batch, tiny, run_data, monkeypatch):
    """As many pixels as 500 images of 64 x 64 have."""
    assert EVAL_BATCH == 500
    config = tiny(student_image_size=size)
    data, counts = run_data(config), []

    class Recorder(torch.nn.Module):
        def forward(self, inputs):
            counts.append(len(inputs))
            return inputs.flatten(1)[:, :10]

    ids = np.arange(batch + 1 if batch > 1 else 2)
    found = evaluate_model(
        Recorder(), data, ids, config=config, precision="float32", log_prior=None
    )
    assert counts == [batch, 1]
    assert 0 <= found.metrics["top1"] <= 1


# Plans


def refusal(config):
    with pytest.raises(UserError) as refused:
        resolve(config)
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def test_a_student_that_does_not_take_the_size_is_refused(tiny):
    text = refusal(tiny(student="T2T_ViT_7"))
    assert "T2T_ViT_7 does not take images of 32 x 32" in text
    assert text.endswith("): set student_image_size, 224 for most models of torchvision and timm.")
    assert ".)" not in text
    resolve(tiny(student="T2T_ViT_7", student_image_size=224))


def test_a_teacher_that_does_not_take_the_size_is_refused(tiny, with_teacher):
    values = {**with_teacher, "teacher": "T2T_ViT_7", "student_image_size": 224}
    text = refusal(with_method(tiny(), "kd", **values))
    assert "T2T_ViT_7 does not take images of 32 x 32" in text
    assert "set image_size" in text


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet8", 32), ("torchvision:vgg19", 224)],  # the second of 575 MB, which are not taken
)
def test_checking_a_model_draws_nothing(name, size):
    before = torch.get_rng_state()
    check_model.__wrapped__(name, 1000, size, "image_size")
    assert torch.equal(torch.get_rng_state(), before)
