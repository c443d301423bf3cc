"""Numerical robustness: every method, option and evidence function, for any logits to 1e4."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from objective_cases import Batch, build, every_variant, everything_on, run, settings_of

from ekd_ray.losses.methods import METHODS

torch.set_num_threads(1)

LIMIT = 1e4
# Where a form breaks first: overflow of exp in float32 and float64, saturation of the `exp`
# evidence, the digamma series, the last step of bfloat16.
CORNERS = (-LIMIT, LIMIT, 0.0, 88.0, 89.0, -104.0, 10.0, 20.0, 709.0, 710.0, 9984.0, 1e-30)
# What the variants leave free, within the bounds of the settings; T as extreme as is sensible.
FREE = {
    "log_prior": (-20.0, -1.2, 0.0, 20.0),
    "temperature": (0.01, 1.0, 4.0, 100.0),
    "ctkd_t_start": (0.01, 1.0, 20.0),
}


@st.composite
def cases(draw):
    """Logits from a small pool of values, so that ties, ones and giants meet in a row."""
    values = st.one_of(st.floats(-LIMIT, LIMIT, width=32), st.sampled_from(CORNERS))
    pool = torch.tensor(draw(st.lists(values, min_size=1, max_size=6)))
    batch = draw(st.sampled_from([1, 1, 2, 3, 8]))
    classes = draw(st.sampled_from([2, 3, 4, 5, 7, 10, 12, 20, 50, 100, 300, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def logits():
        picked = pool[torch.randint(len(pool), (batch, classes), generator=generator)]
        noise = draw(st.sampled_from([0.0, 1.0, 100.0]))
        return (picked + noise * torch.randn(batch, classes, generator=generator)).clamp(
            -LIMIT, LIMIT
        )

    student, teacher, student_strong, teacher_strong = (logits() for _ in range(4))
    if draw(st.booleans()):
        teacher, teacher_strong = student.clone(), student_strong.clone()
    target = torch.randint(classes, (batch,), generator=generator)
    found = Batch(student, teacher, target, student_strong, teacher_strong)
    return found.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def opposite(classes):
    """One row at the bounds, the teacher at the other one, the target where neither is."""
    row = LIMIT * torch.tensor([[1.0, -1.0] + [0.0] * (classes - 2)])
    return Batch(row, -row, torch.tensor([classes - 1]), -row, row)


@every_variant
@settings(max_examples=4, deadline=None)
@given(
    batch=cases(),
    free=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FREE.items()}),
    g=st.sampled_from([1.0, 0.0, -30.0, 30.0, 1e4]),
    epoch=st.integers(1, 40),
)
@example(opposite(2), {name: values[0] for name, values in FREE.items()}, -30.0, 1)
@example(opposite(1000), {name: values[-1] for name, values in FREE.items()}, 30.0, 40)
def test_total_and_gradients_are_finite(method, values, batch, free, g, epoch):
    used = {k: v for k, v in free.items() if k in settings_of(method) and k not in values}
    objective = build(method, **values, **used)
    if METHODS[method].learned_temperature:
        with torch.no_grad():
            objective.temperature_logit.fill_(g)
    batch = batch.with_gradients()
    total, terms = run(objective, batch, epoch)
    assert total.dtype == torch.float32 and total.shape == ()
    assert torch.isfinite(total), terms
    inputs = [*batch.students(method), *objective.parameters()]
    for tensor, gradient in zip(inputs, torch.autograd.grad(total, inputs), strict=True):
        assert gradient.dtype == tensor.dtype
        assert torch.isfinite(gradient).all(), terms


@pytest.mark.parametrize(
    ("method", "standardize"),
    [(method, False) for method in METHODS]
    + [(method, True) for method in METHODS if "standardize" in settings_of(method)],
)
def test_logits_that_are_all_equal(method, standardize):
    """A row without any spread: standardisation divides by almost nothing there."""
    objective = build(method, **everything_on(method), standardize=standardize)
    for value, classes in itertools.product((0.0, 1234.5, -LIMIT), (2, 1000)):
        flat = torch.full((1, classes), value)
        batch = Batch(flat, flat, torch.tensor([1]), flat, flat).with_gradients()
        total, _ = run(objective, batch)
        gradients = torch.autograd.grad(total, batch.students(method))
        assert torch.isfinite(total)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
