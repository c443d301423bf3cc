"""The second, strong view of every image: what it is, who sees it, and that a run repeats it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_runs import (
    Killed,
    assert_same_run,
    by_hand,
    kill_at_step,
    one_step,
    slow_view,
    state,
    watch_steps,
    watch_student,
)

from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.data.strong_views import strong_augment, strong_base_views, strong_draws
from ekd_ray.engine.distill import distill
from ekd_ray.engine.teacher.source import LiveTeacher
from ekd_ray.losses import mlkd_terms
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_weights

POOL, SEED = 5, 7


@pytest.fixture(scope="module")
def mlkd(tiny, with_teacher):
    return with_method(tiny(view_pool=POOL, view_seed=SEED), "mlkd", **with_teacher)


@pytest.fixture(scope="module")
def straight(mlkd):
    """An uninterrupted run and its weights."""
    result = distill(mlkd, threads=1)
    return result, state(result)


def weak_and_strong(batch):
    """uint8 images of a batch in both views, image by image."""
    arrays = load_dataset("synthetic", "train")
    weak, strong = [], []
    for i, view, drawn in zip(batch.sample_ids, batch.view_ids, batch.strong_ids, strict=True):
        image, ids = torch.from_numpy(arrays.images[i].copy()), (np.array([i]), np.array([drawn]))
        base = strong_base_views(*ids, seed=SEED, num_views=162)
        weak.append(slow_view(image, int(view)))
        cropped = slow_view(image, int(base[0]))[None]
        strong.append(strong_augment(cropped, strong_draws(*ids, seed=SEED))[0])
    return torch.stack(weak), torch.stack(strong)


def normalized(images):
    info = dataset_info("synthetic")
    return by_hand(images, info.mean, info.std)


def test_student_and_teacher_see_each_view_once_a_step(mlkd, monkeypatch):
    """Against views made one image at a time; in two passes, each with its own statistics."""
    batches, asked = [], []
    call = LiveTeacher.__call__
    monkeypatch.setattr(
        LiveTeacher,
        "__call__",
        lambda self, images: asked.append(images.clone()) or call(self, images),
    )
    watch_steps(monkeypatch, lambda _, run, batch: batches.append(batch))
    seen = watch_student(monkeypatch)
    distill(mlkd.replace(epochs=1, validation_fraction=0.0, teacher_cache="off"), threads=1)
    assert len(batches) == 5
    assert len(seen) == len(asked) == 10
    for step, batch in enumerate(batches):
        weak, strong = weak_and_strong(batch)
        assert torch.equal(asked[2 * step], weak)
        assert torch.equal(asked[2 * step + 1], strong)
        torch.testing.assert_close(seen[2 * step], normalized(weak), rtol=0, atol=1e-5)
        torch.testing.assert_close(seen[2 * step + 1], normalized(strong), rtol=0, atol=1e-5)
        changed = (weak != strong).flatten(1).float().mean(1)
        assert (changed > 0.1).float().mean() > 0.8  # an operation or a crop may change little


def test_the_loss_of_a_step_is_that_of_both_views(mlkd, monkeypatch):
    """The weighted terms of `mlkd_terms`, from logits of plain networks."""
    config = one_step(mlkd.replace(ce_weight=0.7, kd_weight=0.3, temperature=4.0))
    batches = []
    watch_steps(monkeypatch, lambda _, run, batch: batches.append(batch))
    result = distill(config, threads=1)
    (batch,) = batches
    torch.manual_seed(config.seed)
    student = build_model(config.student, 10).train()
    teacher = build_model(config.teacher, 10)
    load_weights(teacher, config.teacher_weights)
    views = [normalized(images) for images in weak_and_strong(batch)]
    target = torch.from_numpy(load_dataset("synthetic", "train").labels[batch.sample_ids])
    with torch.no_grad():
        mine = [student(view) for view in views]
        theirs = [teacher.eval()(view).half().float() for view in views]
        terms = mlkd_terms(
            mine[0], theirs[0], mine[1], theirs[1], target, 4.0, ce_weight=0.7, kd_weight=0.3
        )
    assert result.metrics["train_loss"] == pytest.approx(float(sum(terms.values())), rel=1e-3)
    buffers = {k: v for k, v in result.model.state_dict().items() if "running" in k}
    for key, value in buffers.items():  # weak first, then strong
        torch.testing.assert_close(value, student.state_dict()[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("cache", ["off", "on"])
def test_it_resumes_inside_an_epoch_bit_for_bit(cache, mlkd, straight, tmp_path, monkeypatch):
    """Killed at step 5 (of 3 an epoch), resumed after step 4."""
    config = mlkd.replace(teacher_cache=cache)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    assert_same_run(distill(config, out=tmp_path, threads=1), *straight)
