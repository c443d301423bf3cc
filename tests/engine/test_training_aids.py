"""Smoothed labels, clipped gradients, averaged weights and mixed pictures, in the training loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engine_runs import (
    Killed,
    assert_same_run,
    kill_at_step,
    one_step,
    same_weights,
    state,
    watch_steps,
    watch_student,
)
from torch import nn
from torch.nn import functional

import ekd_ray.engine.distill as engine
from ekd_ray.config import StudyConfig
from ekd_ray.engine.distill import distill, start_run
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.losses.gradients import ExpectedCrossEntropy
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.losses.objective import Objective
from ekd_ray.scale.space import check_space

DRAWN = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "view_pool": 3}
EVERYTHING = {
    **DRAWN, "auto_augment": "randaugment", "random_erasing": 0.5, "label_smoothing": 0.1,
    "max_grad_norm": 0.5, "ema_decay": 0.9,
}  # fmt: skip


# Labels


def shares_of(rows, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, classes, generator=generator, dtype=torch.float64).softmax(dim=1)


def terms_of(tiny, method, **changes):
    config = with_method(tiny(**changes.pop("settings", {})), method, **changes)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    target = torch.arange(7) % 5
    return Objective(config), logits[0], logits[1], target


def expected_digammas(logits, log_prior, shares):
    a = logits.exp() + np.exp(log_prior)
    of_label = (torch.digamma(a) * shares).sum(dim=1)
    return (torch.digamma(a.sum(dim=1)) - of_label).mean()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_cross_entropies_read_smoothed_and_mixed_labels(mixed, smoothing, tiny):
    settings = {"label_smoothing": smoothing}
    objective, student, teacher, target = terms_of(tiny, "kd", settings=settings)
    shares = shares_of(7, 5) if mixed else None
    wanted = functional.one_hot(target, 5).double() if shares is None else shares
    wanted = (1 - smoothing) * wanted + smoothing / 5
    _, found = objective(student, teacher, target, 1, shares=shares)
    plain = functional.cross_entropy(
        student, shares if mixed else target, label_smoothing=smoothing
    )
    torch.testing.assert_close(found["ce"], plain, rtol=1e-6, atol=0)
    _, unmixed = objective(student, teacher, target, 1)
    assert torch.equal(found["kd"], unmixed["kd"])

    objective, *_ = terms_of(tiny, "ekd", settings=settings, log_prior=-0.5)
    _, found = objective(student, teacher, target, 1, shares=shares)
    expected = expected_digammas(student, -0.5, wanted)
    torch.testing.assert_close(found["ce"], expected, rtol=1e-6, atol=0)


def test_the_gradient_for_shares_is_that_of_the_value():
    log_a = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    shares = shares_of(4, 5)
    assert torch.autograd.gradcheck(lambda logs: ExpectedCrossEntropy.apply(logs, shares), log_a)


def test_evidence_for_both_of_two_mixed_classes_is_left_alone(tiny):
    """As for a label, whose share is 1: `(1 - share)` of the evidence is pulled to the prior."""
    values = {"prior_kl_weight": 1.0, "prior_kl_warmup": 0, "log_prior": 0.0}
    objective, student, _, target = terms_of(tiny, "evidential", **values)
    hard = objective(student, None, target, 1)[1]["prior_kl"]
    same = functional.one_hot(target, 5).double()
    torch.testing.assert_close(
        objective(student, None, target, 1, shares=same)[1]["prior_kl"], hard
    )
    halves = 0.5 * same + 0.5 * same.roll(1, dims=1)
    a = functional.softplus(student) * (1 - halves) + 1
    prior = torch.distributions.Dirichlet(torch.ones_like(a))
    expected = torch.distributions.kl_divergence(torch.distributions.Dirichlet(a), prior).mean()
    found = objective(student, None, target, 1, shares=halves)[1]["prior_kl"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# Gradients and weights


def step_length(config, monkeypatch):
    """How far one step of plain SGD at rate 1 moves the weights: the gradient's norm."""
    config = one_step(config).replace(lr=1.0, momentum=0.0, weight_decay=0.0, schedule="cosine")
    before = []
    with monkeypatch.context() as patch:
        watch_steps(patch, lambda count, run, batch: before.extend(
            parameter.detach().clone() for parameter in run.learner.parameters()
        ))  # fmt: skip
        result = distill(config, threads=1)
    after = result.model.parameters()
    squares = [(a.detach().double() - b).square().sum() for a, b in zip(after, before, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def test_the_scale_of_the_loss_is_no_part_of_the_norm(tiny, monkeypatch):
    clipped = tiny(max_grad_norm=0.02, precision="float16")
    monkeypatch.setattr(engine, "build_model", lambda name, classes: nn.Sequential(
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, classes)
    ))  # fmt: skip
    assert step_length(clipped, monkeypatch) == pytest.approx(0.02, rel=1e-2)


def test_a_long_gradient_is_scaled_to_the_norm(tiny, monkeypatch):
    free = step_length(tiny(), monkeypatch)
    assert free > 0.02
    assert step_length(tiny(max_grad_norm=0.02), monkeypatch) == pytest.approx(0.02, rel=1e-3)
    assert step_length(tiny(max_grad_norm=2 * free), monkeypatch) == free


def test_the_averages_are_evaluated_and_exported(tiny, monkeypatch):
    config = tiny(ema_decay=0.5)
    plain = distill(config.replace(ema_decay=0.0), threads=1)
    averages, runs = {}, []
    move = engine.Averages.move

    def moved(self, steps):
        move(self, steps)
        decay = min(0.5, (1 + steps) / (10 + steps))
        for name, value in runs[0].learner.student.state_dict().items():
            was = averages[name]
            new = decay * was + (1 - decay) * value.double() if value.is_floating_point() else value
            averages[name] = new.clone()

    def started(*args):
        runs.append(start_run(*args))
        for name, value in runs[0].learner.student.state_dict().items():
            averages[name] = value.double().clone()
        return runs[0]

    monkeypatch.setattr(engine.Averages, "move", moved)
    monkeypatch.setattr(engine, "start_run", started)
    found = distill(config, threads=1)
    assert state(found).keys() == averages.keys()
    for name, value in state(found).items():
        torch.testing.assert_close(value.double(), averages[name].double(), rtol=1e-5, atol=1e-7)
    # The training itself is that without averages, and what was evaluated is another network.
    assert same_weights(runs[0].learner.student.state_dict(), plain.model.state_dict())
    assert found.history[-1]["train_loss"] == plain.history[-1]["train_loss"]
    assert found.history[-1]["val_nll"] != plain.history[-1]["val_nll"]


def test_a_learned_prior_is_averaged_with_the_weights(tiny):
    config = with_method(tiny(ema_decay=0.9), "evidential", learn_log_prior=True)
    runs = []
    result = distill(config, threads=1, on_epoch=runs.append)
    plain = distill(config.replace(ema_decay=0.0), threads=1)
    assert result.log_prior == result.history[-1]["log_prior"] != plain.log_prior


# Pictures


def test_a_step_sees_the_mixed_pictures_and_the_teacher_too(
    tiny, with_teacher, run_data, monkeypatch
):
    config = with_method(tiny(**DRAWN), "kd", **with_teacher, teacher_cache="off")
    config = one_step(resolve(config))
    data, parts = run_data(config), []
    seen = watch_student(monkeypatch)
    watched = engine._train_step

    def watch(run, part, factors):
        parts.append((part, run.teachers[0]))
        watched(run, part, factors)

    monkeypatch.setattr(engine, "_train_step", watch)
    result = distill(config, threads=1)
    (part, teacher), batch = parts[0], parts[0][0].batch
    assert batch.view_ids.max() < 3
    below, bases = data.drawn.below(batch.sample_ids, batch.view_ids)
    partners = below[len(batch.sample_ids) :]
    assert np.isin(partners, data.train_ids).all()  # none is held out for validation
    pictures, labels = data.images.views(below, bases)
    mixed, hard, shares = data.drawn.finish(pictures, labels, batch.sample_ids, batch.view_ids)
    assert not torch.equal(mixed, pictures[: len(mixed)])
    assert torch.equal(part.shares, shares) and torch.equal(part.target, hard)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(seen[0], (mixed / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.logits[0], teacher._asked(mixed), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        logits = start_run(config, None).learner.train().student(seen[0])
    expected = functional.cross_entropy(logits, shares)
    assert result.history[0]["loss_ce"] == pytest.approx(float(expected), rel=1e-4)
    assert float(functional.cross_entropy(logits, hard)) != pytest.approx(float(expected), rel=1e-2)


def test_plain_training_has_drawn_views_too(tiny, monkeypatch):
    plain = {"auto_augment": "trivialaugment", "random_erasing": 1.0, "view_pool": 2}
    seen = watch_student(monkeypatch)
    config = tiny(**plain)
    distill(one_step(config), threads=1)
    distill(one_step(config.replace(auto_augment="none", random_erasing=0.0)), threads=1)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("method", ["ekd", "rld"])
def test_a_killed_run_with_everything_on_goes_on_to_the_bit(
    method, tiny, with_teacher, tmp_path, monkeypatch
):
    teacher = with_teacher if METHODS[method].needs_teacher else {}
    learned = {"learn_log_prior": True} if METHODS[method].evidential else {}
    config = with_method(tiny(**EVERYTHING), method, **teacher, **learned)
    expected = distill(config, threads=1)
    weights = state(expected)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=2)
    assert_same_run(distill(config, out=tmp_path, threads=1), expected, weights)


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha", "random_erasing"])
def test_a_method_of_two_views_refuses_drawn_ones(name, tiny, with_teacher):
    refused = pytest.raises(UserError, match=rf"{name} must be off under method 'mlkd'.*got 0.5")
    with refused:
        with_method(tiny(**{name: 0.5}), "mlkd", **with_teacher)
    base = with_method(tiny(), "mlkd", **with_teacher)
    study = StudyConfig(distill=base, space={name: {"choices": [0.0, 0.5]}})
    with refused:
        check_space(study)


def test_smoothing_for_no_cross_entropy_is_refused(tiny, monkeypatch):
    _, *distillation = METHODS["kd"].terms
    monkeypatch.setitem(METHODS, "kd", dataclasses.replace(METHODS["kd"], terms=(*distillation,)))
    with pytest.raises(UserError, match=r"label_smoothing must be 0 .* no term ce, got 0.1"):
        with_method(tiny(label_smoothing=0.1), "kd")
    with_method(tiny(), "kd")
