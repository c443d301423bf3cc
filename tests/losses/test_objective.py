"""Conformance of every registered method: a new entry of METHODS is covered by being there.

Values and gradients; the weights, ramps and settings are in test_objective_weights.py, what
a method learns in test_objective_state.py.
"""

import itertools

import oracles
import pytest
import torch
from objective_cases import (
    FIELDS,
    PAIRWISE_TERMS,
    TARGET_TERMS,
    Batch,
    build,
    draw,
    every_method,
    every_variant,
    everything_on,
    methods_where,
    run,
    settings_of,
    variants,
    variants_where,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from ekd_ray.losses import EVIDENCE_FUNCTIONS
from ekd_ray.losses.methods import METHODS, TERMS

torch.set_num_threads(1)


def test_the_variants_cover_the_table():
    """Every method, each of its settings, {plain, standardised} x every evidence function."""
    covered = {(method, name) for method, values in variants() for name in values}
    assert covered == {(method, name) for method in METHODS for name in settings_of(method)}
    seen = list(variants())
    for method, entry in METHODS.items():
        standardized = [{}, {"standardize": True}] if "standardize" in entry.setting_names else [{}]
        for name in ("evidence", "prior_kl_evidence"):
            kinds = EVIDENCE_FUNCTIONS if name in entry.setting_names else ()
            assert set(FIELDS[name].metadata["choices"]) == set(EVIDENCE_FUNCTIONS)
            for kind in kinds:
                expected = [{**option, name: kind} for option in standardized]
                for option in expected:
                    assert (method, {**everything_on(method), **option}) in seen
        for option in standardized:
            assert (method, {**everything_on(method), **option}) in seen


# ---------------------------------------------------------------- values


def agrees_with_the_formula(objective, epoch):
    batch = draw(seed=epoch)
    total, terms = run(objective, batch, epoch)
    arrays = batch.map(lambda value: value.numpy())
    expected = oracles.terms(objective.config, arrays)
    # Priors and a learned temperature are float32.
    for name, value in terms.items():
        torch.testing.assert_close(float(value), expected[name], rtol=1e-6, atol=1e-9)
    expected_total = oracles.total(objective.config, arrays, epoch)
    torch.testing.assert_close(float(total.detach()), expected_total, rtol=1e-6, atol=1e-9)
    return set(terms) == set(expected)


@every_variant
def test_the_total_is_the_formula(method, values):
    """Recomputed from METHODS.md in plain float64 loops."""
    everything = agrees_with_the_formula(build(method, **values), epoch=7)
    assert everything or not values, "by default the regularisation is off"


@every_method
@pytest.mark.parametrize("epoch", [1, 10, 40])
def test_the_ramped_total_is_the_formula(method, epoch):
    ramped = {name: 20 for name in settings_of(method) if name.endswith("_warmup")}
    assert agrees_with_the_formula(build(method, **{**everything_on(method), **ramped}), epoch)


@every_variant
def test_the_order_of_the_batch_does_not_matter(method, values):
    objective = build(method, **values)
    batch, order = draw(), torch.tensor([3, 0, 5, 1, 4, 2])
    one = run(objective, batch, 2)[0]
    other = run(objective, batch.map(lambda value: value[order]), 2)[0]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    mixed = run(objective, batch.replace(teacher=batch.teacher[order]), 2)[0]
    assert METHODS[method].needs_teacher == bool((mixed - one).abs() > 1e-6)


@every_variant
def test_the_loss_is_a_mean_over_the_batch(method, values):
    """Twice the same samples are the same loss; pairs of samples, by their number."""
    objective = build(method, **values)
    batch = draw()
    once = run(objective, batch, 2)[1]
    twice = run(objective, batch.map(lambda value: torch.cat([value, value])), 2)[1]
    for name, value in once.items():
        expected = PAIRWISE_TERMS.get(name, 1.0) * value
        torch.testing.assert_close(twice[name], expected, rtol=1e-12, atol=1e-12)


# With a prior of the teacher's own the Dirichlets differ although the logits do not.
@variants_where(lambda values: "teacher_log_prior" not in values)
def test_nothing_to_distil_when_student_equals_teacher(method, values):
    objective = build(method, **values)
    batch = draw()
    same = batch.replace(teacher=batch.student, teacher_strong=batch.student_strong)
    terms = run(objective, same)[1]
    distilled = {name: value for name, value in terms.items() if name not in TARGET_TERMS}
    assert bool(distilled) == METHODS[method].needs_teacher
    assert all(abs(float(value)) < 1e-10 for value in distilled.values()), distilled
    apart = run(objective, batch)[1]
    assert all(float(apart[name]) > 1e-3 for name in distilled), apart


@every_method
def test_only_methods_that_ask_for_the_strong_view_read_it(method):
    objective, batch = build(method, **everything_on(method)), draw()
    totals = []
    for strong in (batch, draw(seed=9)):
        total, _ = objective(
            batch.student, batch.teacher, batch.target, 1,
            student_strong=strong.student_strong, teacher_strong=strong.teacher_strong,
        )  # fmt: skip
        totals.append(total)
    assert METHODS[method].strong_view == bool((totals[0] - totals[1]).abs() > 1e-3)


# ---------------------------------------------------------------- extremes and precision


def extreme_logits(dtype):
    big = torch.tensor([1e4, -1e4, 0.0, 88.0, -100.0, 700.0], dtype=torch.float64)
    rows = [big.roll(i) for i in range(6)]
    rows += [torch.full((6,), value, dtype=torch.float64) for value in (1e4, -1e4, 0.0)]
    rows += [1e4 * torch.eye(6, dtype=torch.float64)[0], -1e4 * torch.eye(6).double()[0]]
    return torch.stack(rows).to(dtype)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_value_and_gradient_at_extreme_logits(method, values, dtype):
    objective = build(method, **values)
    logits = extreme_logits(dtype)
    # Every row against others and against itself, each with two targets.
    pairs = list(itertools.product((0, 1, 6), (0, 1)))
    batch = Batch(
        student=logits.repeat(len(pairs), 1),
        teacher=torch.cat([logits.roll(shift, 0) for shift, _ in pairs]),
        target=torch.cat([torch.full((len(logits),), label) for _, label in pairs]),
        student_strong=logits.roll(2, 0).repeat(len(pairs), 1),
        teacher_strong=torch.cat([logits.roll(2 + shift, 0) for shift, _ in pairs]),
    ).with_gradients()
    total, terms = run(objective, batch)
    assert torch.isfinite(total)
    assert all(torch.isfinite(term) for term in terms.values()), terms
    inputs = [*batch.students(method), *objective.parameters()]
    gradients = torch.autograd.grad(total, inputs)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_variant
def test_float32_agrees_with_float64(method, values):
    objective = build(method, **values)
    results = []
    for dtype in (torch.float32, torch.float64):
        batch = draw().to(torch.float32).to(dtype).with_gradients()
        total = run(objective, batch, 2)[0]
        gradients = torch.autograd.grad(total, batch.students(method))
        assert {tensor.dtype for tensor in (total, *gradients)} == {dtype}
        results.append([total.detach().double(), *(gradient.double() for gradient in gradients)])
    (low, *low_gradients), (high, *high_gradients) = results
    torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low_gradients, high_gradients, rtol=1e-3, atol=1e-5)


@every_variant
def test_float32_inside_autocast(method, values):
    objective = build(method, **values)
    batch = draw(dtype=torch.bfloat16)
    expected = run(objective, batch.to(torch.float32), 2)[0]
    batch = batch.with_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = run(objective, batch, 2)
    assert total.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    for gradient in torch.autograd.grad(total, batch.students(method)):
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


# ---------------------------------------------------------------- gradients


@every_variant
def test_no_gradient_reaches_the_teacher(method, values):
    batch = draw().with_gradients()
    total, terms = run(build(method, **values), batch, 2)
    total.backward()
    assert batch.teacher.grad is None and batch.teacher_strong.grad is None
    assert all(logits.grad.abs().max() > 0 for logits in batch.students(method))
    assert not any(term.requires_grad for term in terms.values())
    assert total.dim() == 0 and all(term.dim() == 0 for term in terms.values())


@every_method
def test_the_students_gradient_is_the_derivative_of_the_total(method):
    """Central differences, for the student's logits and a learned prior.

    A learned temperature is left out: its gradient is reversed (test_ctkd.py). The teacher's
    prior is its own: one that followed the student's would have no gradient.
    """
    settings = {"learn_log_prior": True, "teacher_log_prior": 0.4}
    learned = {name: value for name, value in settings.items() if name in settings_of(method)}
    objective = build(method, **everything_on(method), **learned).double()
    batch = draw(batch=3, classes=4, scale=1.5).with_gradients()
    inputs = batch.students(method)
    if learned:
        inputs.append(objective.log_prior)
    # `gradcheck` moves the inputs in place: the function reads them where they are.
    assert torch.autograd.gradcheck(lambda *_: run(objective, batch, 2)[0], inputs)


@pytest.mark.parametrize(
    ("method", "standardize"),
    [(method, False) for method in METHODS]
    + [(method, True) for method in METHODS if "standardize" in settings_of(method)],
)
def test_no_value_is_read_back_from_the_device(method, standardize):
    # Fake tensors have no values: any .item() or bool() raises.
    with FakeTensorMode():
        objective = build(method, **everything_on(method), standardize=standardize)
        logits = [torch.empty(4, 5, requires_grad=True) for _ in range(4)]
        batch = Batch(*logits[:2], torch.empty(4, dtype=torch.long), *logits[2:])
        total, _ = run(objective, batch)
        gradients = torch.autograd.grad(total, batch.students(method))
    assert total.shape == ()
    assert all(gradient.shape == (4, 5) for gradient in gradients)


# ---------------------------------------------------------------- what a method is given


@methods_where("needs_teacher")
def test_a_missing_teacher_is_a_programming_error(method):
    batch = draw().replace(teacher=None)
    with pytest.raises(ValueError, match="needs teacher_logits, got None") as refused:
        run(build(method), batch)
    assert repr(method) in str(refused.value)


@methods_where("strong_view")
@pytest.mark.parametrize("missing", ["student_strong", "teacher_strong"])
def test_a_missing_strong_view_is_a_programming_error(method, missing):
    batch = draw().replace(**{missing: None})
    with pytest.raises(ValueError, match="needs the strong view, got None") as refused:
        run(build(method), batch)
    assert repr(method) in str(refused.value)


@methods_where("needs_teacher", False)
def test_methods_without_a_teacher_take_none(method):
    batch = draw()
    objective = build(method, **everything_on(method))
    without, given = (run(objective, b)[0] for b in (batch.replace(teacher=None), batch))
    assert torch.equal(without, given)


@every_method
def test_terms_are_reported_in_the_order_of_the_table(method):
    total, terms = run(build(method, **everything_on(method)), draw())
    assert list(terms) == [name for name in TERMS if name in METHODS[method].term_names]
    weights = build(method, **everything_on(method)).weights(1)
    expected = sum(weights[name] * value for name, value in terms.items())
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
