"""Curriculum temperature: the schedule, the reversed gradient, and who moves which way."""

import math

import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from objective_cases import AutocastRecorder, build, methods_where

from ekd_ray.losses import adversarial_temperature
from ekd_ray.losses.ctkd import INITIAL_LOGIT, reversal_strength
from ekd_ray.losses.method_checks import draw, run

torch.set_num_threads(1)

RANGE = {"t_start": 1.0, "t_end": 20.0, "warmup": 10}
adversarial_methods = methods_where("learned_temperature")


def logit(value=INITIAL_LOGIT, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def at_temperature(method, batch, temperature):
    """The terms that the learned temperature enters, in plain float64 loops, at a fixed T."""
    student, teacher = batch.student.numpy(), batch.teacher.numpy()
    if method == "ctkd":
        p_s, p_t = (oracles.softmax(z, temperature) for z in (student, teacher))
    else:
        p_s, p_t = (oracles.expectation(z, temperature, 0.0) for z in (student, teacher))
    return temperature**2 * oracles.mean_kl(p_t, p_s)


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize("loops", [1, 4, 10, 100])
def test_the_reversal_is_the_published_half_cosine(loops):
    """The released code's decay from its `decay_max` 0 to its `decay_min` -1."""
    for epoch in range(1, 2 * loops + 2):
        share = (math.cos(min(epoch, loops) * math.pi / loops) + 1.0) * 0.5
        published = share * (0.0 - -1.0) + -1.0
        strength = reversal_strength(torch.tensor(float(epoch), dtype=torch.float64), loops)
        assert float(strength) == pytest.approx(published, abs=1e-12)


# ---------------------------------------------------------------- the temperature


@given(value=st.floats(-1e4, 1e4, width=32), start=st.floats(0.1, 10.0), width=st.floats(0.1, 30.0))
@example(value=1e4, start=1.0, width=20.0)
@example(value=-1e4, start=1.0, width=20.0)
def test_it_stays_in_its_range_and_finite(value, start, width):
    leaf = logit(value)
    got = adversarial_temperature(leaf, 3, t_start=start, t_end=width, warmup=10)
    got.backward()
    assert start * (1 - 1e-6) <= float(got.detach()) <= (start + width) * (1 + 1e-6)
    assert torch.isfinite(leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_inside_autocast(dtype):
    leaf = logit(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastRecorder("sigmoid") as sigmoid:
        inside = adversarial_temperature(leaf, 3, **RANGE)
    # CPU autocast would leave it alone, others' might not: it must be off.
    assert sigmoid.enabled == [False]
    outside = adversarial_temperature(leaf, 3, **RANGE)
    assert inside.dtype == torch.float32 and inside.dim() == 0
    assert torch.equal(inside, outside)
    inside.backward()
    assert leaf.grad.dtype == dtype and leaf.grad != 0


# ---------------------------------------------------------------- the reversed gradient


@adversarial_methods
@pytest.mark.parametrize("epoch", [1, 4, 10, 60])
def test_the_gradient_is_the_derivative_times_the_strength(method, epoch):
    """Central differences of the plain formula in g, in float64."""
    batch = draw(scale=5.0)
    objective = build(method, ce_weight=0.5, kd_weight=0.7)
    run(objective, batch, epoch)[0].backward()

    def loss(g):
        return 0.7 * at_temperature(method, batch, 1 + 20 / (1 + math.exp(-g)))

    derivative = (loss(1.0 + 1e-5) - loss(1.0 - 1e-5)) / 2e-5
    assert abs(derivative) > 1e-2
    published = (math.cos(math.pi * min(epoch, 10) / 10) - 1) / 2
    got = float(objective.temperature_logit.grad)
    assert got == pytest.approx(published * derivative, rel=1e-4)


@adversarial_methods
def test_the_students_gradient_is_not_reversed(method):
    """It is the one of the same method at a fixed temperature of that value."""
    alone = {"ce_weight": 0.0} | ({"ekd_weight": 0.0} if "+ekd" in method else {})
    learned = build(method, **alone)
    fixed = build(
        {"ctkd": "kd", "ctkd+ekd": "ekd"}[method],
        temperature=learned.state(40)["temperature"], kd_weight=learned.config.kd_weight, **alone,
    )  # fmt: skip
    gradients = []
    for objective in (learned, fixed):
        batch = draw().with_gradients()
        run(objective, batch, 40)[0].backward()
        gradients.append(batch.student.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- in the objective
