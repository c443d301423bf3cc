"""Properties of every distillation term: finite, exact, undisturbed, invariant."""

import pytest
import torch

from ekd_ray.losses import (
    EVIDENCE_FUNCTIONS,
    distribution_kd_loss,
    dkd_loss,
    evidential_cross_entropy,
    expectation_dkd_loss,
    expectation_kd_loss,
    kd_loss,
    mlkd_terms,
    prior_kl_loss,
)

torch.set_num_threads(1)


def draw(batch=6, classes=7, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, batch, classes, generator=generator, dtype=torch.float64
    )
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


def distillation_terms(target, temperature=1.0, log_prior=-1.2):
    """Every term between a student and a teacher, as (student, teacher) -> loss."""
    prior = {"log_prior": log_prior}
    terms = {
        "kd": lambda s, t: kd_loss(s, t, temperature),
        "kd_standardized": lambda s, t: kd_loss(s, t, temperature, standardize=True),
        "dkd": lambda s, t: dkd_loss(s, t, target, temperature),
        "dkd_standardized": lambda s, t: dkd_loss(s, t, target, temperature, standardize=True),
        "expectation_dkd": lambda s, t: expectation_dkd_loss(s, t, target, temperature, **prior),
        "expectation": lambda s, t: expectation_kd_loss(s, t, temperature, **prior),
    }
    for kind in EVIDENCE_FUNCTIONS:
        terms[f"distribution_{kind}"] = lambda s, t, kind=kind: distribution_kd_loss(
            s, t, temperature, **prior, evidence=kind
        )
    return terms


def all_terms(target, temperature=1.0, log_prior=-1.2):
    """The same, and the terms that need no teacher."""
    terms = distillation_terms(target, temperature, log_prior)
    terms["ce"] = lambda s, _: evidential_cross_entropy(s, target, log_prior)
    for kind in EVIDENCE_FUNCTIONS:
        terms[f"prior_{kind}"] = lambda s, _, kind=kind: prior_kl_loss(
            s, target, log_prior, evidence=kind
        )
    return terms


DISTILLATION_NAMES = tuple(distillation_terms(None))
TERM_NAMES = tuple(all_terms(None))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", TERM_NAMES)
def test_gradients_and_none_for_the_teacher(name):
    student, teacher, target = draw(batch=3, classes=4, scale=2.0)
    term = all_terms(target, 2.0)[name]
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: term(z, teacher), (student,))
    term(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DISTILLATION_NAMES)
def test_a_learned_temperature_gets_the_gradient_of_both_sides(name):
    student, teacher, target = draw()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: all_terms(target, t)[name](student, teacher), (temperature,)
    )


# ---------------------------------------------------------------- extremes and precision


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_float32_agrees_with_float64(name, scale):
    student, teacher, target = draw(16, 100, scale=scale, dtype=torch.float32)
    term = all_terms(target)[name]
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        logits = student.detach().to(dtype).requires_grad_()
        values.append(term(logits, teacher.to(dtype)))
        assert values[-1].dtype == dtype
        gradients.append(torch.autograd.grad(values[-1], logits)[0].double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=1e-4, atol=1e-6 * gradients[1].abs().max().item()
    )


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("name", DISTILLATION_NAMES)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_zero_when_the_student_is_the_teacher(name, scale):
    student, _, target = draw(4, 100, scale=scale, dtype=torch.float32)
    logits = student.clone().requires_grad_()
    loss = distillation_terms(target)[name](logits, student)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", [n for n in DISTILLATION_NAMES if "standardized" not in n])
def test_temperature_squared_undoes_the_division_of_the_logits(name):
    student, teacher, target = draw()
    hot = distillation_terms(target, 4.0)[name](4 * student, 4 * teacher)
    torch.testing.assert_close(hot, 16 * distillation_terms(target, 1.0)[name](student, teacher))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(
    ("student", "message"),
    [
        (torch.zeros(0, 3), r"B >= 1 and C >= 2, got \(0, 3\)"),
        (torch.zeros(2, 1), r"got \(2, 1\)"),
        (torch.zeros(3), r"got \(3,\)"),
        (torch.zeros(2, 3).long(), "floating"),
    ],
)
def test_wrong_logits_are_refused(name, student, message):
    with pytest.raises(ValueError, match=message):
        all_terms(torch.zeros(len(student)).long())[name](student, student)


@pytest.mark.parametrize("name", DISTILLATION_NAMES)
def test_wrong_teachers_and_temperatures_are_refused(name):
    logits, target = torch.zeros(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"teacher_logits must have .*\(2, 3\), got \(2, 4\)"):
        all_terms(target)[name](logits, torch.zeros(2, 4))
    for temperature in (0.0, -1.0, float("nan"), torch.ones(1)):
        with pytest.raises(ValueError, match="temperature must be"):
            all_terms(target, temperature)[name](logits, logits)


@pytest.mark.parametrize("name", [n for n in TERM_NAMES if "dkd" in n or n[:2] in ("ce", "pr")])
@pytest.mark.parametrize("target", [torch.zeros(3).long(), torch.zeros(2)])
def test_wrong_targets_are_refused(name, target):
    with pytest.raises(ValueError, match="target must"):
        all_terms(target)[name](torch.zeros(2, 3), torch.zeros(2, 3))


def test_wrong_strong_views_are_refused():
    views = [torch.zeros(2, 3)] * 3
    with pytest.raises(ValueError, match=r"teacher_strong must have the shape .*got \(2, 4\)"):
        mlkd_terms(
            *views, torch.zeros(2, 4), torch.zeros(2).long(), 1.0, ce_weight=1.0, kd_weight=1.0
        )
