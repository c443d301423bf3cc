"""CTKD in the loop: the temperature is trained, against the student, logged and checkpointed."""

from __future__ import annotations

import math

import pytest
import torch
from engine_runs import (
    Killed,
    assert_same_run,
    kill_at_step,
    one_step,
    state,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

import ekd_ray.engine.distill as engine
from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import read_history
from ekd_ray.losses.methods import with_method

START = 1 + 4 / (1 + math.exp(-1.0))  # t_start + t_end * sigmoid(1)


@pytest.fixture(scope="module")
def ctkd(tiny, with_teacher):
    """Full reversal from the first step on."""
    values = {"ctkd_t_start": 1.0, "ctkd_t_end": 4.0, "ctkd_warmup": 0, **with_teacher}
    return with_method(tiny(epochs=3), "ctkd", **values)


def temperatures(result):
    return [row["temperature"] for row in result.history]


def plain_kd(student, teacher, temperature):
    p, q = (functional.log_softmax(z / temperature, 1) for z in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(1).mean()


def test_weight_decay_holds_the_temperature_too(ctkd):
    """It sits with the other parameters, as in the released code."""
    runs = [one_step(ctkd.replace(weight_decay=decay, lr=0.5)) for decay in (0.0, 0.1)]
    without, held = (temperatures(distill(config, threads=1))[0] for config in runs)
    g = [math.log((t - 1) / (5 - t)) for t in (without, held)]
    assert g[0] - g[1] == pytest.approx(0.5 * 0.1, rel=1e-3)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_whole_way_is_momentum_ascent_on_what_the_student_said(ctkd, warmup, monkeypatch):
    """Its path from the logits of every step, under a half cosine over the warm-up's epochs."""
    config = ctkd.replace(ctkd_warmup=warmup, kd_weight=20.0, weight_decay=0.0, lr_milestones=())
    said, start = [], engine.start_run

    def started(*args):
        run = start(*args)
        run.learner.objective.register_forward_hook(
            lambda module, inputs, _: said.append([inputs[0].detach().clone(), inputs[1]])
        )
        return run

    monkeypatch.setattr(engine, "start_run", started)
    result = distill(config, threads=1)
    assert len(said) == 9
    g, momentum, expected = torch.tensor(1.0), 0.0, []
    for step, (student, teacher) in enumerate(said):
        epoch = 1 + step // 3
        strength = 1.0 if epoch >= warmup else (1 - math.cos(math.pi * epoch / warmup)) / 2
        g.requires_grad_()
        loss = 20.0 * plain_kd(student, teacher, 1 + 4 * torch.sigmoid(g))
        (slope,) = torch.autograd.grad(loss, g)
        momentum = 0.9 * momentum + strength * float(slope)
        g = g.detach() + config.lr * momentum
        if step % 3 == 2:
            expected.append(float(1 + 4 * torch.sigmoid(g)))
    assert temperatures(result) == pytest.approx(expected, abs=1e-4)
    assert max(abs(t - START) for t in expected) > 0.05


VARIANTS = {
    "ctkd": ("ctkd", {}),
    "adamw": ("ctkd", {"optimizer": "adamw", "lr": 0.01}),
    "ctkd+ekd": ("ctkd+ekd", {"learn_log_prior": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_resumes_inside_an_epoch_bit_for_bit(name, ctkd, tmp_path, monkeypatch):
    """Killed at step 5 (of 3 an epoch), resumed after step 4, momentum of the temperature too."""
    method, values = VARIANTS[name]
    config = with_method(ctkd, method, **values)
    straight = distill(config, threads=1)
    weights = state(straight)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    result = distill(config, out=tmp_path, threads=1)
    assert len({START, *temperatures(result)}) == 4
    assert_same_run(result, straight, weights)
    assert [row["temperature"] for row in read_history(tmp_path)] == temperatures(straight)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("solver/temperature")
    assert [event.value for event in events] == pytest.approx(temperatures(straight), rel=1e-6)
