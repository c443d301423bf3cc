"""Evidential losses against torch.distributions, SciPy and arbitrary-precision arithmetic."""

import functools

import mpmath
import numpy as np
import pytest
import torch
from scipy import special

from ekd_ray.errors import UserError
from ekd_ray.losses import (
    EVIDENCE_FUNCTIONS,
    dirichlet_kl,
    distribution_kd_loss,
    evidence,
    evidential_cross_entropy,
    expectation_kd_loss,
    log_concentration,
    log_expectation,
    prior_kl_loss,
    vacuity,
)

torch.set_num_threads(1)
KINDS = tuple(EVIDENCE_FUNCTIONS)
ORACLE_EVIDENCE = {
    "log1p_softplus": lambda z: np.log1p(np.logaddexp(0, z)),
    "softplus": lambda z: np.logaddexp(0, z),
    "exp": np.exp,
    "relu": lambda z: np.maximum(z, 0),
}


def draw(batch=6, classes=7, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, batch, classes, generator=generator, dtype=torch.float64
    )
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


# ---------------------------------------------------------------- agreement with oracles


@pytest.mark.parametrize("log_prior", [-20.0, -1.22, 0.0, 1.0, 5.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_evidential_cross_entropy_is_a_difference_of_digammas(log_prior, scale):
    logits, _, target = draw(scale=scale)
    got = evidential_cross_entropy(logits, target, log_prior)
    a = np.exp(logits.numpy()) + np.exp(log_prior)
    rows = [
        special.digamma(r.sum()) - special.digamma(r[y]) for r, y in zip(a, target, strict=True)
    ]
    np.testing.assert_allclose(got, np.mean(rows), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("at", [10.0, 40.0])
def test_evidential_cross_entropy_is_continuous_where_the_logarithm_takes_over(at):
    z = torch.linspace(at - 0.01, at + 0.01, 401, dtype=torch.float64).requires_grad_()
    logits = torch.stack([z, torch.zeros_like(z)], 1)
    for row in (0, 1):
        loss = evidential_cross_entropy(logits, torch.full((401,), row), -20.0)
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        x = np.exp(z.detach().numpy())
        total = x + 1 + 2 * np.exp(-20.0)
        other = x + np.exp(-20.0) if row == 0 else 1 + np.exp(-20.0)
        value = special.digamma(total) - special.digamma(other)
        np.testing.assert_allclose(loss.detach(), value.mean(), rtol=0, atol=1e-12)
        expected = x * special.polygamma(1, total)
        if row == 0:
            expected = expected - x * special.polygamma(1, x + np.exp(-20.0))
        np.testing.assert_allclose(gradient * 401, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_expectation_kd_is_the_kl_of_the_means_teacher_first(temperature):
    student, teacher, _ = draw()
    got = expectation_kd_loss(student, teacher, temperature, log_prior=-1.2, teacher_log_prior=0.3)
    a_s, a_t = (
        (student / temperature).exp() + np.exp(-1.2),
        (teacher / temperature).exp() + np.exp(0.3),
    )
    p_s, p_t = (torch.distributions.Categorical(probs=a / a.sum(1, True)) for a in (a_s, a_t))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(got, temperature**2 * kl(p_t, p_s).mean(), rtol=1e-9, atol=1e-9)
    assert (got - temperature**2 * kl(p_s, p_t).mean()).abs() > 1e-3  # the other order is wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distribution_kd_is_the_dirichlet_kl_teacher_first(kind, temperature):
    student, teacher, _ = draw()
    got = distribution_kd_loss(
        student, teacher, temperature, log_prior=-1.2, teacher_log_prior=0.3, evidence=kind
    )
    a_s = ORACLE_EVIDENCE[kind](student.numpy() / temperature) + np.exp(-1.2)
    a_t = ORACLE_EVIDENCE[kind](teacher.numpy() / temperature) + np.exp(0.3)
    p_s, p_t = (torch.distributions.Dirichlet(torch.from_numpy(a)) for a in (a_s, a_t))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(got, temperature**2 * kl(p_t, p_s).mean(), rtol=1e-9, atol=1e-9)
    assert (got - temperature**2 * kl(p_s, p_t).mean()).abs() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_prior_kl_leaves_the_targets_evidence_alone(kind):
    logits, _, target = draw()
    got = prior_kl_loss(logits, target, -0.9, evidence=kind)
    a = np.full(logits.shape, np.exp(-0.9))
    for i, row in enumerate(logits.numpy()):
        for j, z in enumerate(row):
            if j != target[i]:
                a[i, j] += ORACLE_EVIDENCE[kind](z)
    pulled, prior = (
        torch.distributions.Dirichlet(torch.from_numpy(x))
        for x in (a, np.full(a.shape, np.exp(-0.9)))
    )
    expected = torch.distributions.kl_divergence(pulled, prior).mean()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    moved = logits.scatter_add(1, target[:, None], torch.full((6, 1), 5.0, dtype=torch.float64))
    assert prior_kl_loss(moved, target, -0.9, evidence=kind) == got


def test_prior_kl_is_zero_without_wrong_evidence():
    logits = torch.full((2, 3), -1e4)
    logits[:, 1] = 50.0
    assert prior_kl_loss(logits, torch.tensor([1, 1]), -1.0).item() == 0


@pytest.mark.parametrize("low_high", [(1e-6, 1e-2), (0.1, 10.0), (10.0, 1e4), (1e-3, 1e5)])
def test_dirichlet_kl_agrees_with_arbitrary_precision(low_high):
    rng = np.random.default_rng(0)
    p, q = np.exp(rng.uniform(*np.log(low_high), size=(2, 3, 5)))
    got = dirichlet_kl(torch.from_numpy(p), torch.from_numpy(q))
    np.testing.assert_allclose(got, [exact_kl(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-9)


def exact_kl(p, q):
    with mpmath.workdps(40):
        p, q = [mpmath.mpf(float(x)) for x in p], [mpmath.mpf(float(x)) for x in q]
        loggamma, digamma = functools.cache(mpmath.loggamma), functools.cache(mpmath.digamma)
        p_total, q_total = sum(p), sum(q)
        value = loggamma(p_total) - loggamma(q_total)
        for x, y in zip(p, q, strict=True):
            value += loggamma(y) - loggamma(x) + (x - y) * (digamma(x) - digamma(p_total))
        return float(value)


def test_dirichlet_kl_keeps_its_digits_where_float32_has_none():
    # 1,000 classes of softplus evidence at z = 1e4: lnG(S) is 1.5e8, the divergence about 5.
    p = torch.full((1, 1000), 1e4)
    q = p * (1 + 1e-3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)))
    exact = exact_kl(p[0].numpy(), q[0].numpy())
    got = dirichlet_kl(p, q)
    assert got.dtype == torch.float32
    assert abs(got.item() - exact) < 1e-6 * max(1, exact)


def test_log_expectation_log_concentration_and_vacuity():
    logits, _, _ = draw()
    a = np.exp(logits.numpy() / 2) + np.exp(-0.7)
    np.testing.assert_allclose(log_concentration(logits, -0.7, 2.0), np.log(a), rtol=1e-12)
    expected = np.log(a) - special.logsumexp(np.log(a), axis=1, keepdims=True)
    np.testing.assert_allclose(log_expectation(logits, 2.0, -0.7), expected, rtol=1e-12)
    a = np.exp(logits.numpy()) + np.exp(-0.7)
    np.testing.assert_allclose(vacuity(logits, -0.7), 7 * np.exp(-0.7) / a.sum(1), rtol=1e-12)
    assert vacuity(torch.full((1, 5), -1e4), 0.3).tolist() == [1.0]
    assert vacuity(torch.full((1, 5), 1e4), 0.3).tolist() == [0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_values(kind):
    z = torch.linspace(-15, 15, 61, dtype=torch.float64)
    np.testing.assert_allclose(evidence(z, kind), ORACLE_EVIDENCE[kind](z.numpy()), atol=1e-9)
    assert evidence(z.bfloat16(), kind).dtype == torch.float32
    assert (evidence(z, kind) >= 0).all()


# ---------------------------------------------------------------- gradients


SECOND_ORDER = [functools.partial(distribution_kd_loss, evidence=kind) for kind in KINDS]


@pytest.mark.parametrize("loss", [expectation_kd_loss, *SECOND_ORDER])
def test_a_learned_prior_gets_its_gradient_from_the_students_side_only(loss):
    student, teacher, _ = draw(batch=3, classes=4, scale=2.0)
    prior = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p: loss(student, teacher, 2.0, log_prior=p, teacher_log_prior=-0.8), (prior,)
    )
    alone = loss(student, teacher, 2.0, log_prior=prior, teacher_log_prior=-0.8)
    shared = loss(student, teacher, 2.0, log_prior=prior)
    gradients = [torch.autograd.grad(value, prior)[0] for value in (alone, shared)]
    assert gradients[0] == gradients[1]
    assert gradients[0].abs() > 1e-4
    own = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert not loss(student, teacher, 2.0, log_prior=-0.8, teacher_log_prior=own).requires_grad


REGULARISERS = [functools.partial(prior_kl_loss, evidence=kind) for kind in KINDS]


@pytest.mark.parametrize("loss", [evidential_cross_entropy, *REGULARISERS])
def test_a_learned_prior_gets_the_gradient_of_the_terms_without_a_teacher(loss):
    logits, _, target = draw(batch=3, classes=4, scale=2.0)
    prior = torch.tensor(-0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: loss(logits, target, p), (prior,))
    (gradient,) = torch.autograd.grad(loss(logits, target, prior), prior)
    assert gradient.abs() > 1e-4


# ---------------------------------------------------------------- properties


# ---------------------------------------------------------------- refusals


def test_unknown_evidence_names_the_nearest():
    z = torch.zeros(1, 2)
    with pytest.raises(UserError, match="Did you mean 'softplus'"):
        distribution_kd_loss(z, z, 1.0, log_prior=0.0, evidence="softpls")
    with pytest.raises(UserError, match="relu"):
        prior_kl_loss(z, torch.zeros(1, dtype=torch.long), 0.0, evidence="rule")


@pytest.mark.parametrize("loss", [expectation_kd_loss, distribution_kd_loss])
@pytest.mark.parametrize("log_prior", [float("inf"), torch.zeros(1)])
def test_wrong_priors_are_refused(loss, log_prior):
    with pytest.raises(ValueError, match="log_prior must be"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, log_prior=log_prior)


def test_dirichlet_kl_is_per_row_and_checks_shapes():
    p = torch.tensor([[1.0, 2.0], [0.5, 0.5]])
    assert dirichlet_kl(p, p).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="concentration_q"):
        dirichlet_kl(p, torch.ones(1, 2))


# ---------------------------------------------------------------- closed gradients


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_the_divergence_has_the_derivative_of_both_sides(scale):
    generator = torch.Generator().manual_seed(3)
    pair = scale * torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) + 0.05
    p, q = (side.clone().requires_grad_() for side in pair)
    assert torch.autograd.gradcheck(dirichlet_kl, (p, q))
    alone = torch.autograd.grad(dirichlet_kl(p.detach(), q).sum(), q)[0]
    torch.testing.assert_close(torch.autograd.grad(dirichlet_kl(p, q).sum(), q)[0], alone)


def x_times_trigamma(log_x):
    """Its series beyond e^300, where x^2 leaves float64."""
    return special.polygamma(1, np.exp(log_x)) * np.exp(log_x) if log_x < 300 else 1.0


@pytest.mark.parametrize("at", [-300.0, -5.0, 0.0, 9.9, 10.1, 39.9, 40.1, 300.0, 5e3])
def test_the_gradient_of_the_cross_entropy_is_exact_at_every_size(at):
    """By the target's logit z: `(S psi'(S) p - a psi'(a)) * exp(z) / a` of that class."""
    z = torch.tensor([[at, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    evidential_cross_entropy(z, torch.tensor([0]), -1.2).backward()
    log_a = np.logaddexp(z.detach().numpy()[0], -1.2)
    log_total = np.logaddexp.reduce(log_a)
    p = np.exp(log_a[0] - log_total)
    slope = x_times_trigamma(log_total) * p - x_times_trigamma(log_a[0])
    expected = slope * np.exp(at - log_a[0])
    np.testing.assert_allclose(float(z.grad[0, 0]), expected, rtol=1e-9, atol=1e-13)
