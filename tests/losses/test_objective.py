"""Conformance of every registered method: a new entry of METHODS is covered by being there.

Values and gradients; the weights, ramps and settings are in test_objective_weights.py, what
a method learns in test_objective_state.py.
"""

import typing

import oracles
import pytest
import torch
from objective_cases import (
    HINTS,
    PAIRWISE_TERMS,
    AutocastRecorder,
    Batch,
    build,
    draw,
    every_method,
    every_variant,
    everything_on,
    methods_where,
    run,
    settings_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from ekd_ray.losses.methods import METHODS

torch.set_num_threads(1)


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


# ---------------------------------------------------------------- extremes and precision


@every_variant
def test_float32_inside_autocast(method, values):
    objective = build(method, **values)
    batch = draw(dtype=torch.bfloat16)
    expected = run(objective, batch.to(torch.float32), 2)[0]
    batch = batch.with_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastRecorder("softmax") as recorder:
        total, terms = run(objective, batch, 2)
    # CPU autocast would leave these operations alone, others' might not: it must be off.
    assert True not in recorder.enabled
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


@methods_where("needs_teacher", False)
def test_methods_without_a_teacher_take_none(method):
    batch = draw()
    objective = build(method, **everything_on(method))
    without, given = (run(objective, b)[0] for b in (batch.replace(teacher=None), batch))
    assert torch.equal(without, given)


@every_method
def test_one_program_serves_every_value_of_a_setting(method):
    """What `torch.compile` traces, and keeps on disk, is the same for all trials of a search."""
    programs = []

    def keep(graph, inputs):
        programs.append(graph.code)
        return graph.forward

    numbers = {name for name in settings_of(method) if float in typing.get_args(HINTS[name])}
    numbers |= {name for name in settings_of(method) if HINTS[name] is float}
    for factor in (1.25, 1.5):
        values = dict.fromkeys(numbers, factor) | everything_on(method)
        scaled = {k: factor * v if k in numbers else v for k, v in values.items()}
        torch.compiler.reset()
        objective = build(method, **scaled)
        compiled = torch.compile(objective, backend=keep, fullgraph=True)
        run(compiled, draw(), objective.factors(1))
    assert len(programs) == 2 and programs[0] == programs[1]
