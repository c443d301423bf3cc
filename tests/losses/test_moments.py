"""Several teachers as one Dirichlet, against torch.distributions and the moments in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.distributions import Dirichlet, kl_divergence

from ekd_ray.config import DistillConfig
from ekd_ray.losses import (
    Objective,
    distribution_kd_loss,
    ensemble_log_concentration,
    evidential_cross_entropy,
    expectation_kd_loss,
    resolve_method,
)

torch.set_num_threads(1)


def draw(members=3, batch=4, classes=5, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(members, batch, classes, generator=generator, dtype=torch.float64)


def evidential_members(logits, log_prior=-0.7):
    """(log means, log precisions, concentrations) of members with a Dirichlet each."""
    a = logits.exp() + math.exp(log_prior)
    total = a.sum(dim=2)
    return (a / total[:, :, None]).log(), total.log(), a


# Agreement with oracles


def test_softmax_members_give_the_dirichlet_of_their_mean_and_variance():
    logits = draw()
    found = Dirichlet(ensemble_log_concentration(logits.log_softmax(2)).exp())
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(found.mean, p.mean(axis=0), rtol=1e-12)
    variance = p.var(axis=0).sum(axis=1)
    np.testing.assert_allclose(found.variance.sum(dim=1), variance, rtol=1e-10)


def test_evidential_members_add_the_variance_that_each_has_by_itself():
    log_means, log_precisions, a = evidential_members(draw())
    members = Dirichlet(a)
    found = Dirichlet(ensemble_log_concentration(log_means, log_precisions).exp())
    total = members.mean.var(dim=0, unbiased=False) + members.variance.mean(dim=0)
    torch.testing.assert_close(found.mean, members.mean.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.variance.sum(1), total.sum(1), rtol=1e-10, atol=0)


def test_a_softmax_among_evidential_members_has_no_variance_of_its_own():
    log_means, log_precisions, a = evidential_members(draw())
    log_precisions[0] = math.inf
    members = Dirichlet(a)
    total = members.mean.var(dim=0, unbiased=False) + members.variance[1:].sum(dim=0) / 3
    found = Dirichlet(ensemble_log_concentration(log_means, log_precisions).exp())
    torch.testing.assert_close(found.variance.sum(1), total.sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0, 25.0])
def test_one_evidential_member_gives_back_its_own_dirichlet(scale):
    log_means, log_precisions, a = evidential_members(draw(members=1, scale=scale))
    found = ensemble_log_concentration(log_means, log_precisions)
    torch.testing.assert_close(found, a[0].log(), rtol=0, atol=1e-9)


# What has no variance, or nothing else


def test_softmaxes_that_agree_are_as_precise_as_is_allowed():
    logits = draw(members=1).repeat(3, 1, 1)
    found = ensemble_log_concentration(logits.log_softmax(2))
    torch.testing.assert_close(found.logsumexp(1).exp(), torch.full((4,), 1e6).double())
    torch.testing.assert_close(found.log_softmax(1), logits[0].log_softmax(1))


def test_softmaxes_that_are_certain_of_different_classes_keep_their_mean():
    logits = 1e4 * torch.eye(3, 4, dtype=torch.float64)[:, None]
    found = ensemble_log_concentration(logits.log_softmax(2))
    assert found.isfinite().all() and found.logsumexp(1).exp() < 1e-5
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]).double()
    torch.testing.assert_close(found.softmax(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size_give_finite_logs(dtype):
    for members in (draw(scale=1e4), draw(members=1, scale=1e4).repeat(2, 1, 1)):
        found = ensemble_log_concentration(members.to(dtype).log_softmax(2))
        assert found.isfinite().all() and found.dtype == dtype and not found.requires_grad


LOGITS = arrays.arrays(np.float64, (3, 2, 4), elements=st.floats(-60, 60, width=32))


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.permutations(range(3)), st.permutations(range(4)))
def test_neither_the_order_of_members_nor_their_repetition_counts(logits, members, classes):
    logs = torch.tensor(logits).log_softmax(2)
    found = ensemble_log_concentration(logs)
    assert found.isfinite().all()
    # The softmax is the mean, and a0 has its bounds.
    mean = logs.logsumexp(0) - math.log(3)
    torch.testing.assert_close(found.log_softmax(1), mean, rtol=1e-9, atol=1e-9)
    total = found.logsumexp(1)
    assert ((total > math.log(1e-6) - 1e-9) & (total < math.log(1e6) + 1e-9)).all()
    # Between members that differ by rounding alone it is rounding that decides.
    clear = total < math.log(1e5)
    other = ensemble_log_concentration(logs[members][:, :, classes])
    torch.testing.assert_close(other[clear], found[:, classes][clear], rtol=1e-6, atol=1e-6)
    twice = ensemble_log_concentration(torch.cat([logs, logs]))
    torch.testing.assert_close(twice[clear], found[clear], rtol=1e-6, atol=1e-6)


def test_wrong_shapes_and_a_lone_softmax_are_refused():
    logs = draw().log_softmax(2)
    with pytest.raises(ValueError, match=r"\[K, B, C\]"):
        ensemble_log_concentration(logs[0])
    with pytest.raises(ValueError, match="log_precisions must be"):
        ensemble_log_concentration(logs, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="2 or more"):
        ensemble_log_concentration(logs[:1])


# How it is distilled


def test_the_losses_take_its_logs_as_they_are():
    log_a, student = ensemble_log_concentration(draw().log_softmax(2)), draw(members=1, seed=1)[0]
    prior = math.exp(-0.9)
    concentration = torch.nn.functional.softplus(student / 2) + prior
    expected = 4 * kl_divergence(Dirichlet(log_a.exp()), Dirichlet(concentration)).mean()
    options = {"log_prior": -0.9, "teacher_log_prior": -math.inf}
    for kind in ("softplus", "relu"):
        found = distribution_kd_loss(student, log_a, 2.0, evidence=kind, **options)
        if kind == "softplus":
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        else:
            assert found != expected
    mean = (log_a / 3).softmax(1)
    p_s = (student / 3).exp() + prior
    p_s = p_s / p_s.sum(1, keepdim=True)
    first = 9 * (mean * (mean.log() - p_s.log())).sum(1).mean()
    torch.testing.assert_close(expectation_kd_loss(student, log_a, 3.0, **options), first)


def objective(method, teacher="ensemble:resnet8,resnet8", **values):
    return Objective(resolve_method(DistillConfig(method=method, teacher=teacher, **values)))


def test_ekd_does_not_ask_for_less_of_a_class_than_the_students_prior():
    log_a, student = ensemble_log_concentration(draw().log_softmax(2)), draw(members=1, seed=1)[0]
    log_a[:, 0], target = -30.0, torch.zeros(4, dtype=torch.int64)
    total, terms = objective("ekd", log_prior=-0.9, ekd_warmup=0, ekd_weight=4.5)(
        student.float(), log_a.float(), target, 1
    )
    raised = Dirichlet(log_a.exp().clamp(min=math.exp(-0.9)))
    mine = Dirichlet(torch.nn.functional.softplus(student) + math.exp(-0.9))
    second = kl_divergence(raised, mine).mean()
    torch.testing.assert_close(terms["ekd"].double(), second, rtol=1e-5, atol=0)
    # The first order has the mean as it is.
    first = expectation_kd_loss(student, log_a, 1.0, log_prior=-0.9, teacher_log_prior=-math.inf)
    torch.testing.assert_close(terms["kd"].double(), first, rtol=1e-5, atol=0)
    ce = evidential_cross_entropy(student, target, -0.9)
    torch.testing.assert_close(total.double(), ce + 4.5 * (first + second), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["kd", "dkd", "kd-standardized", "dkd+ekd", "mlkd", "mlkd+ekd"])
def test_the_other_methods_see_the_mean_of_its_members(method):
    """To a softmax method the scale of the concentration is nothing."""
    if method == "kd-standardized":
        method, values = "kd", {"standardize": True}
    else:
        values = {}
    logits, target = draw(), torch.zeros(4, dtype=torch.int64)
    log_a = ensemble_log_concentration(logits.log_softmax(2)).float()
    mean = logits.softmax(2).mean(0).log().float()
    student = draw(members=1, seed=1)[0].float()
    found = objective(method, **values)
    strong = {"student_strong": student} if found.method.strong_view else {}
    results = [
        found(student, of, target, 1, **strong, **({"teacher_strong": of} if strong else {}))[1]
        for of in (log_a, mean)
    ]
    for name in {*results[0]} - {"ekd"}:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_its_second_order_weighs_little_unless_it_is_told():
    """At the weight of a single teacher students lose all of their evidence."""
    for teacher, weight in (("ensemble:resnet8,resnet8", 0.05), ("resnet8", 4.5)):
        config = resolve_method(DistillConfig(method="ekd", teacher=teacher))
        assert config.ekd_weight == weight
    assert objective("ekd", ekd_weight=2.0).config.ekd_weight == 2.0
