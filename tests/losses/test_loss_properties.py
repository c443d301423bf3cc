"""What every distillation term must have: finite, exact, undisturbed, invariant."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from objective_cases import AutocastRecorder
from torch._subclasses.fake_tensor import FakeTensorMode

from ekd_ray.losses import (
    EVIDENCE_FUNCTIONS,
    distribution_kd_loss,
    dkd_loss,
    evidential_cross_entropy,
    expectation_dkd_loss,
    expectation_kd_loss,
    kd_loss,
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

extreme = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([-1e4, 1e4, 0.0, 88.0, 89.0, -104.0, 10.0, 20.0]),
)


@st.composite
def extreme_case(data):
    batch, classes = data(st.sampled_from([(1, 2), (1, 5), (3, 3), (2, 10)]))
    rows = st.lists(extreme, min_size=2 * batch * classes, max_size=2 * batch * classes)
    values = torch.tensor(data(rows)).view(2, batch, classes)
    target = torch.tensor(
        data(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    )
    dtype = data(st.sampled_from([torch.float32, torch.bfloat16]))
    temperature = data(st.sampled_from([0.1, 1.0, 4.0, 20.0]))
    return values[0].to(dtype), values[1].to(dtype), target, temperature


@settings(max_examples=120, deadline=None)
@given(case=extreme_case(), log_prior=st.floats(-20, 20))
@example(
    case=(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), torch.tensor([1]), 0.1),
    log_prior=-20.0,
)
def test_value_and_gradient_are_finite_for_logits_to_1e4(case, log_prior):
    student, teacher, target, temperature = case
    for name, term in all_terms(target, temperature, log_prior).items():
        logits = student.clone().requires_grad_()
        loss = term(logits, teacher)
        assert loss.dtype == torch.float32, name
        assert loss.shape == (), name
        assert torch.isfinite(loss), name
        loss.backward()
        assert torch.isfinite(logits.grad).all(), name
        # Divergences and expected cross-entropies are not negative, up to rounding.
        assert loss > -1e-2 * temperature**2, name


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize("temperature", [0.1, 20.0])
def test_finite_with_a_thousand_classes_at_the_bound(name, temperature):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        1e4 * torch.randint(-1, 2, (1, 1000), generator=generator).float() for _ in range(2)
    )
    student.requires_grad_()
    loss = all_terms(torch.tensor([3]), temperature)[name](student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


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


@pytest.mark.parametrize("name", TERM_NAMES)
def test_autocast_changes_nothing(name):
    student, teacher, target = draw(8, 20, dtype=torch.bfloat16)
    term = all_terms(target)[name]
    plain = term(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastRecorder() as recorder:
        inside = term(student, teacher)
    # CPU autocast would leave these operations alone, others' might not: it must be off.
    assert set(recorder.enabled) == {False}
    assert inside.dtype == torch.float32
    assert inside == plain == term(student.float(), teacher.float())


@pytest.mark.parametrize("name", TERM_NAMES)
def test_no_value_is_read_back_from_the_device(name):
    # Fake tensors have no values: any .item() or bool() raises.
    with FakeTensorMode():
        student = torch.empty(4, 5, requires_grad=True)
        teacher, target = torch.empty(4, 5), torch.empty(4, dtype=torch.long)
        loss = all_terms(target, 1.0, torch.empty(()))[name](student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
    assert loss.shape == ()
    assert gradient.shape == student.shape


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


@pytest.mark.parametrize("name", TERM_NAMES)
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher, target = draw(9, 5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    shuffled = all_terms(target[order])[name](student[order], teacher[order])
    torch.testing.assert_close(shuffled, all_terms(target)[name](student, teacher))


@pytest.mark.parametrize("name", TERM_NAMES)
def test_it_is_a_mean_over_the_batch(name):
    student, teacher, target = draw(5, 4)
    rows = [
        all_terms(target[i : i + 1])[name](student[i : i + 1], teacher[i : i + 1]) for i in range(5)
    ]
    torch.testing.assert_close(all_terms(target)[name](student, teacher), torch.stack(rows).mean())


@pytest.mark.parametrize("name", [n for n in DISTILLATION_NAMES if "standardized" not in n])
def test_temperature_squared_undoes_the_division_of_the_logits(name):
    student, teacher, target = draw()
    hot = distillation_terms(target, 4.0)[name](4 * student, 4 * teacher)
    torch.testing.assert_close(hot, 16 * distillation_terms(target, 1.0)[name](student, teacher))
