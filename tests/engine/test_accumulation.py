"""A batch in parts: the same training where samples do not meet, and nothing lost between."""

from __future__ import annotations

import pytest
import torch
from engine_runs import Killed, assert_same_run, kill_at_step, state, untimed, watch_steps
from torch import nn

import ekd_ray.engine.distill as engine
from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method


def no_batch_norm(name, num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, num_classes),
    )  # fmt: skip


@pytest.fixture
def config(tiny, with_teacher):
    """48 images in batches of 18: what is left would fill a part of 9, but no batch."""
    return with_method(tiny(batch_size=18, lr=0.02), "ekd", learn_log_prior=True, **with_teacher)


AIDS = {
    "mixup_alpha": 1.0, "view_pool": 4, "label_smoothing": 0.1, "max_grad_norm": 0.5,
    "ema_decay": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(("parts", "settings"), [(2, {}), (3, {}), (3, AIDS)])
def test_without_batch_norm_parts_are_the_batch(parts, settings, config, monkeypatch):
    config = config.replace(**settings)
    monkeypatch.setattr(engine, "build_model", no_batch_norm)
    whole = distill(config, threads=1)
    steps = []
    watch_steps(monkeypatch, lambda count, run, batch: steps.append(len(batch.sample_ids)))
    found = distill(config.replace(accumulation_steps=parts), threads=1)
    assert steps == [18 // parts] * (2 * 2 * parts)
    for ours, theirs in zip(untimed(found.history), untimed(whole.history), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, value in state(whole).items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert found.log_prior == pytest.approx(whole.log_prior, rel=1e-5)


def test_a_run_killed_between_parts_goes_on_with_the_whole_batch(config, tmp_path, monkeypatch):
    """Killed before the second part of the second step, with a checkpoint after every step."""
    config = config.replace(accumulation_steps=2)
    expected = distill(config, threads=1)
    weights = state(expected)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 4)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    assert_same_run(distill(config, out=tmp_path, threads=1), expected, weights)


def test_parts_must_divide_the_batch():
    with pytest.raises(UserError, match=r"accumulation_steps must divide batch_size \(64\), got 3"):
        DistillConfig(accumulation_steps=3)
    one, two = DistillConfig(), DistillConfig(accumulation_steps=2)
    assert "accumulation_steps" not in one.identity()
    assert one.fingerprint() != two.fingerprint()
