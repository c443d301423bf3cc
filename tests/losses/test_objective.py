"""Conformance of every registered method: a new entry of METHODS is covered by being there.

What `ekd_ray.testing.check_method` asks of any method, and beyond it the formulas. Ramps, defaults
and refusals are in test_objective_weights.py, what a method learns in test_objective_state.py.
"""

import oracles
import pytest
import torch
from objective_cases import (
    AutocastRecorder,
    build,
    every_method,
    every_variant,
    everything_on,
    methods_where,
    settings_of,
)

from ekd_ray.losses.method_checks import draw, draw_cosines, method_cases, run
from ekd_ray.losses.methods import METHODS
from ekd_ray.testing import check_training, run_check

torch.set_num_threads(1)

CASES = [(check, case) for method in METHODS for check, case in method_cases(method)]
# Beside what a softmax method has its evidential form is that of the others.
QUICK = (*(f"'{name}'" for name in METHODS if "+" not in name), "'mlkd+ekd'", "'wkd+ekd'")


@pytest.mark.quick_ids(*QUICK)
@pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check, case, id=f"{case}, {check.__name__}") for check, case in CASES],
)
def test_the_method_keeps_to(check, case):
    run_check(check, case)


@pytest.mark.quick_ids("[kd]", "[ekd]", "[mlkd+ekd]", "[wkd]")
@pytest.mark.parametrize("method", METHODS)
def test_the_method_can_be_trained(method):
    check_training(method, teacher="resnet8")


# ---------------------------------------------------------------- values


def agrees_with_the_formula(objective, epoch):
    batch = draw(seed=epoch)
    total, terms = run(objective, batch, epoch)
    arrays = batch.map(lambda value: value.numpy())
    cosines = draw_cosines(batch.student.shape[1]).double().numpy()
    expected = oracles.terms(objective.config, arrays, cosines)
    # Priors and a learned temperature are float32.
    for name, value in terms.items():
        torch.testing.assert_close(float(value), expected[name], rtol=1e-6, atol=1e-9)
    expected_total = oracles.total(objective.config, arrays, cosines, epoch)
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


@pytest.mark.parametrize("method", ["mlkd", "mlkd+ekd"])
def test_pairs_of_samples_count_by_their_number(method):
    """Twice the same samples: 4 times the pairs over 2 B, and doubled entries over C."""
    objective, batch = build(method, **everything_on(method)), draw()
    once = run(objective, batch, 2)[1]
    twice = run(objective, batch.map(lambda value: torch.cat([value, value])), 2)[1]
    for name, factor in {"batch": 2.0, "class": 4.0, "instance": 1.0}.items():
        torch.testing.assert_close(twice[name], factor * once[name], rtol=1e-12, atol=1e-12)


@every_method
def test_autocast_is_off_inside(method):
    # CPU autocast would leave these operations alone, others' might not.
    batch = draw(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastRecorder("softmax") as recorder:
        run(build(method, **everything_on(method)), batch, 2)
    assert True not in recorder.enabled


# ---------------------------------------------------------------- what a method is given


@methods_where("needs_teacher")
def test_a_missing_teacher_is_a_programming_error(method):
    batch = draw().replace(teacher=None)
    with pytest.raises(ValueError, match="needs teacher_logits, got None") as refused:
        run(build(method), batch)
    assert repr(method) in str(refused.value)
