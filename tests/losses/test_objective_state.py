"""Values that a method learns beside the student: the log prior and the temperature."""

import pytest
import torch
from objective_cases import (
    build,
    every_method,
    everything_on,
    methods_where,
)

from ekd_ray.losses.method_checks import draw, run
from ekd_ray.losses.methods import METHODS

torch.set_num_threads(1)


@methods_where("evidential")
@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({}, 0.0),
        ({"log_prior": -1.2}, -1.2),
        ({"learn_log_prior": True}, 1.0),
        ({"learn_log_prior": True, "log_prior": -1.2}, -1.2),
    ],
    ids=str,
)
def test_the_log_prior_starts_where_it_should_and_travels_in_the_state(method, values, start):
    objective = build(method, **everything_on(method), **values)
    learned = values.get("learn_log_prior", False)
    assert objective.log_prior_value == pytest.approx(start, abs=1e-7)
    assert objective.log_prior.dtype == torch.float32
    assert isinstance(objective.log_prior, torch.nn.Parameter) == learned
    torch.testing.assert_close(objective.state_dict()["log_prior"], torch.tensor(start))
    if learned:
        run(objective, draw())[0].backward()
        assert objective.log_prior.grad.abs() > 1e-4


@every_method
def test_what_is_learned_is_what_the_method_says(method):
    entry = METHODS[method]
    option = {"learn_log_prior": True} if entry.evidential else {}
    objective = build(method, **option)
    expected = {"log_prior": entry.evidential, "temperature_logit": entry.learned_temperature}
    learned = {name for name, present in expected.items() if present}
    assert {name for name, _ in objective.named_parameters()} == learned
    assert set(objective.state_dict()) == learned
    reported = {"log_prior": entry.evidential, "temperature": entry.learned_temperature}
    assert set(objective.state(1)) == {name for name, present in reported.items() if present}
    assert all(type(value) is float for value in objective.state(1).values())
