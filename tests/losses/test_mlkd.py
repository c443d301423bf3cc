"""Multi-level logit distillation against plain loops, its masks and its invariances."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.losses import mlkd_terms
from ekd_ray.losses.method_checks import draw
from ekd_ray.losses.mlkd import class_share, sample_share

torch.set_num_threads(1)

NAMES = ("ce", "instance", "class", "batch")
PRIORS = {"log_prior": -1.2, "teacher_log_prior": 0.4}
FORMS = {
    "softmax": mlkd_terms,
    "standardized": lambda *a, **k: mlkd_terms(*a, standardize=True, **k),
    "expectation": lambda *a, **k: mlkd_terms(*a, **{**PRIORS, **k}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def terms(form, batch, temperature=4.0, ce_weight=1.0, kd_weight=1.0, **values):
    return FORMS[form](
        batch.student, batch.teacher, batch.student_strong, batch.teacher_strong, batch.target,
        temperature, ce_weight=ce_weight, kd_weight=kd_weight, **values,
    )  # fmt: skip


def oracle(form, batch, temperature, ce_weight, kd_weight):
    """METHODS.md, section 2, row by row; standardised is the instance alignment alone."""
    arrays = batch.map(lambda value: value.numpy())
    views = (arrays.student, arrays.teacher), (arrays.student_strong, arrays.teacher_strong)

    def predict(side, logits, at):
        if form != "expectation":
            return oracles.softmax(logits, at)
        prior = PRIORS["log_prior" if side == "student" else "teacher_log_prior"]
        return oracles.expectation(logits, at, prior)

    def predict_instance(side, logits, at):
        return predict(side, oracles.standardized(logits) if form == "standardized" else logits, at)

    if form == "expectation":
        ce = sum(
            oracles.evidential_cross_entropy(view[0], arrays.target, PRIORS["log_prior"])
            for view in views
        )
    else:
        ce = sum(oracles.cross_entropy(view[0], arrays.target) for view in views)
    aligned = oracles.mlkd_alignments(*views, temperature, predict, predict_instance)
    weighted = {name: kd_weight * value for name, value in aligned.items()}
    return {"ce": ce_weight * ce, **weighted}


def assert_terms(got, expected, **tolerance):
    assert tuple(got) == NAMES
    assert all(value.dim() == 0 for value in got.values())
    np.testing.assert_allclose(
        [float(got[name].detach()) for name in NAMES], [expected[name] for name in NAMES],
        **{"rtol": 1e-9, "atol": 1e-12, **tolerance},
    )  # fmt: skip


# ---------------------------------------------------------------- agreement with the oracle


@every_form
@pytest.mark.parametrize(("batch", "classes"), [(6, 7), (5, 8), (1, 5), (2, 2), (3, 11)])
@pytest.mark.parametrize("temperature", [4.0, 3.0, 1.5])  # 3 is then twice in the sums
def test_every_term_is_the_formula(form, batch, classes, temperature):
    case = draw(seed=batch, batch=batch, classes=classes)
    expected = oracle(form, case, temperature, 0.3, 0.7)
    assert_terms(terms(form, case, temperature, 0.3, 0.7), expected)


def test_standardisation_is_of_the_instance_alignment_alone():
    case = draw()
    plain, standardized = terms("softmax", case), terms("standardized", case)
    assert abs(plain["instance"] - standardized["instance"]) > 1e-2
    for name in ("ce", "class", "batch"):
        assert torch.equal(plain[name], standardized[name])
    # Its mask is the plain teacher's too: neither shift nor scale of the rows moves it.
    scaled = case.replace(student=3 * case.student - 7, student_strong=2 * case.student_strong + 1)
    again = terms("standardized", scaled)
    torch.testing.assert_close(again["instance"], standardized["instance"], rtol=1e-6, atol=0)


def test_a_weight_of_zero_leaves_its_terms_out():
    assert list(terms("softmax", draw(), ce_weight=0.0)) == ["instance", "class", "batch"]
    assert list(terms("softmax", draw(), kd_weight=0.0)) == ["ce"]


# ---------------------------------------------------------------- the masks


def shares_of(teacher):
    probabilities = teacher.softmax(dim=1)
    return float(sample_share(probabilities)), float(class_share(probabilities))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    columns=st.lists(st.integers(0, 5), min_size=2, max_size=9).filter(lambda c: len(set(c)) > 1),
)
def test_the_masks_are_the_shares_at_or_below_the_percentile(seed, rows, columns):
    """`np.percentile(..., 50)` and `<=`, for odd and even sizes and with ties.

    Ties come from equal rows and equal columns, so that both sides round them alike.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    teacher = teacher[rows][:, columns]
    p = oracles.softmax(teacher.numpy(), 1.0)
    m, c = shares_of(teacher)
    assert m == pytest.approx(oracles.share_at_or_below_the_median([max(row) for row in p]))
    assert c == pytest.approx(oracles.share_at_or_below_the_median([sum(col) for col in p.T]))


# ---------------------------------------------------------------- properties


@every_form
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_zero_when_the_student_is_the_teacher(form, scale):
    case = draw(batch=4, classes=100, scale=scale, dtype=torch.float32)
    leaf = case.student.clone().requires_grad_()
    strong = case.student_strong.clone().requires_grad_()
    same = case.replace(
        student=leaf, teacher=case.student, student_strong=strong, teacher_strong=strong.detach()
    )
    option = {"teacher_log_prior": None} if form == "expectation" else {}
    found = terms(form, same, **option)
    for name in ("instance", "class", "batch"):
        assert found[name] == 0
    sum(found[name] for name in ("instance", "class", "batch")).backward()
    for gradient in (leaf.grad, strong.grad):
        assert gradient is None or gradient.abs().max() < 1e-6


@every_form
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_none_for_the_teacher(form, name):
    case = draw(batch=2, classes=3, scale=1.5).with_gradients()
    inputs = (case.student, case.student_strong)
    if name in ("class", "batch"):
        inputs = inputs[:1]  # they read the weak view alone
    assert torch.autograd.gradcheck(lambda *_: terms(form, case, 2.5)[name], inputs)
    terms(form, case, 2.5)[name].backward()
    assert case.teacher.grad is None and case.teacher_strong.grad is None
    assert all(leaf.grad.abs().max() > 0 for leaf in inputs)
    if name in ("class", "batch"):
        assert case.student_strong.grad is None


def test_a_learned_prior_gets_its_gradient_from_the_students_side_only():
    case = draw()
    both, alone = (torch.tensor(-1.2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for name in NAMES:
        followed = terms("expectation", case, log_prior=both, teacher_log_prior=None)[name]
        fixed = terms("expectation", case, log_prior=alone, teacher_log_prior=-1.2)[name]
        pair = [torch.autograd.grad(*each)[0] for each in ((followed, both), (fixed, alone))]
        torch.testing.assert_close(*pair)
        assert pair[0].abs() > 1e-5


@every_form
def test_float32_agrees_with_float64(form):
    case = draw(batch=64, classes=100, dtype=torch.float32)
    low, high = terms(form, case), terms(form, case.to(torch.float64))
    for name in NAMES:
        assert low[name].dtype == torch.float32 and high[name].dtype == torch.float64
        torch.testing.assert_close(low[name].double(), high[name], rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- refusals
