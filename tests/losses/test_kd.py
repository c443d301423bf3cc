"""Softmax distillation and its decoupled forms against slow plain versions."""

import numpy as np
import oracles
import pytest
import torch
from scipy import special

from ekd_ray.losses import dkd_loss, expectation_dkd_loss, kd_loss, standardize_logits

torch.set_num_threads(1)


def draw(batch=6, classes=7, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, batch, classes, generator=generator, dtype=torch.float64
    )
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


def slow_standardize(logits):
    return torch.from_numpy(oracles.standardized(logits.numpy()))


# ---------------------------------------------------------------- agreement with oracles


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_kd_is_the_kl_of_softmaxes_teacher_first(temperature, standardize):
    student, teacher, _ = draw()
    got = kd_loss(student, teacher, temperature, standardize=standardize)
    if standardize:
        student, teacher = slow_standardize(student), slow_standardize(teacher)
    p_s, p_t = (torch.distributions.Categorical(logits=z / temperature) for z in (student, teacher))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(got, temperature**2 * kl(p_t, p_s).mean(), rtol=1e-9, atol=1e-9)
    assert (got - temperature**2 * kl(p_s, p_t).mean()).abs() > 1e-3  # the other order is wrong


def test_standardize_against_a_plain_loop():
    logits, _, _ = draw(scale=20.0)
    torch.testing.assert_close(standardize_logits(logits), slow_standardize(logits))
    near = logits * 1e-7  # where the epsilon matters
    torch.testing.assert_close(standardize_logits(near), slow_standardize(near))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -12345.678])
def test_standardize_maps_equal_logits_to_zero(value):
    logits = torch.full((2, 1000), value, requires_grad=True)
    result = standardize_logits(logits)
    assert (result == 0).all()
    result.pow(2).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("alpha_beta", [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("standardize", [False, True])
def test_dkd_against_the_slow_split(alpha_beta, standardize):
    alpha, beta = alpha_beta
    student, teacher, target = draw()
    got = dkd_loss(student, teacher, target, 3.0, alpha=alpha, beta=beta, standardize=standardize)
    if standardize:
        student, teacher = slow_standardize(student), slow_standardize(teacher)
    p_s, p_t = (special.softmax(z.numpy() / 3, axis=1) for z in (student, teacher))
    np.testing.assert_allclose(
        got, 9 * oracles.decoupled_kl(p_s, p_t, target, alpha, beta), rtol=1e-9
    )
    assert abs(got - 9 * oracles.decoupled_kl(p_t, p_s, target, alpha, beta)) > 1e-3


@pytest.mark.parametrize("alpha_beta", [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0)])
def test_expectation_dkd_against_the_slow_split(alpha_beta):
    alpha, beta = alpha_beta
    student, teacher, target = draw()
    got = expectation_dkd_loss(
        student, teacher, target, 2.0,
        log_prior=-1.2, teacher_log_prior=0.3, alpha=alpha, beta=beta,
    )  # fmt: skip
    a_s, a_t = np.exp(student.numpy() / 2) + np.exp(-1.2), np.exp(teacher.numpy() / 2) + np.exp(0.3)
    p_s, p_t = a_s / a_s.sum(1, keepdims=True), a_t / a_t.sum(1, keepdims=True)
    np.testing.assert_allclose(
        got, 4 * oracles.decoupled_kl(p_s, p_t, target, alpha, beta), rtol=1e-9
    )


def test_dkd_does_not_depend_on_where_the_logits_lie():
    """Far below what a mask of 1000 takes away, the rest is still the rest."""
    student, teacher, target = draw()
    low = (logits - 5e4 for logits in (student, teacher))
    got, expected = dkd_loss(*low, target, 4.0), dkd_loss(student, teacher, target, 4.0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_dkd_is_exact_where_the_published_mask_has_lost():
    """A target far above the rest shows through a mask of 1000: log(0) of the rest is NaN there."""
    student, teacher, target = draw(classes=10)
    small = dkd_loss(student, teacher, target, 4.0, alpha=0.0, beta=1.0)
    high = [logits.clone() for logits in (student, teacher)]
    for logits in high:
        logits[torch.arange(6), target] = 1e4
    same = dkd_loss(*high, target, 4.0, alpha=0.0, beta=1.0)
    torch.testing.assert_close(same, small)


def test_two_classes_have_no_non_target_part():
    student, teacher, target = draw(classes=2)
    assert dkd_loss(student, teacher, target, 4.0, alpha=0.0) == 0
    torch.testing.assert_close(
        dkd_loss(student, teacher, target, 4.0), kd_loss(student, teacher, 4.0)
    )


# ---------------------------------------------------------------- gradients


def test_a_learned_prior_gets_its_gradient_from_the_students_side_only():
    student, teacher, target = draw()
    prior, alone = (torch.tensor(-1.2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expectation_dkd_loss(student, teacher, target, 2.0, log_prior=prior).backward()
    expectation_dkd_loss(
        student, teacher, target, 2.0, log_prior=alone, teacher_log_prior=-1.2
    ).backward()
    torch.testing.assert_close(prior.grad, alone.grad)
    assert prior.grad.abs() > 1e-4


# ---------------------------------------------------------------- properties


# ---------------------------------------------------------------- refusals
