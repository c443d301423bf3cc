"""Weights, ramps and settings of every registered method, and the table of methods itself."""

import itertools
import typing

import pytest
import torch
from objective_cases import (
    FIELDS,
    HINTS,
    RAMPS,
    build,
    draw,
    every_method,
    every_weight,
    everything_on,
    run,
    settings_of,
    terms_of,
    weights_of,
)

from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, TERMS, resolve_method, with_method

torch.set_num_threads(1)

# ---------------------------------------------------------------- weights


@every_weight
def test_every_weight_is_multiplied_once(method, name):
    batch = draw()

    def total(weight):
        return run(build(method, **{**everything_on(method), name: weight}), batch)

    (one, terms), (two, same), (four, _) = total(1.0), total(2.0), total(4.0)
    moved = two - one
    assert abs(float(moved.detach())) > 1e-3
    torch.testing.assert_close(four - two, 2 * moved, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(terms[key], same[key]) for key in terms), "reported unweighted"
    its_terms = sum(terms[key] for key in terms_of(method, name))
    torch.testing.assert_close(moved, its_terms, rtol=1e-10, atol=1e-10)


@every_weight
def test_a_weight_alone_gives_exactly_its_terms(method, name):
    off = dict.fromkeys(weights_of(method), 0.0)
    batch = draw()
    total, terms = run(build(method, **{**everything_on(method), **off, name: 1.0}), batch)
    assert sorted(terms) == sorted(terms_of(method, name))
    torch.testing.assert_close(total.detach(), sum(terms.values()).to(total))
    doubled = build(method, **{**everything_on(method), **off, name: 2.0})
    assert torch.equal(run(doubled, batch)[0], 2 * total)


@every_method
def test_a_term_of_weight_zero_still_reaches_every_parameter(method):
    """DDP waits for the gradient of every parameter: it is zero then, not missing."""
    learned = {"learn_log_prior": True} if "learn_log_prior" in settings_of(method) else {}
    for off in weights_of(method):
        values = {**everything_on(method), **learned, off: 0.0}
        if any(values[name] for name in weights_of(method)):
            objective = build(method, **values)
            run(objective, draw().with_gradients())[0].backward()
            assert all(parameter.grad is not None for parameter in objective.parameters())


# ---------------------------------------------------------------- ramps


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in METHODS for n in settings_of(m) if n in RAMPS]
)
def test_warm_ups_ramp_their_own_weight_only(method, name):
    ramped = terms_of(method, RAMPS[name])
    assert ramped
    plain = build(method, **everything_on(method))
    slow = build(method, **{**everything_on(method), name: 4})
    for epoch, share in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (5, 1.0)):
        full, weights = plain.weights(epoch), slow.weights(epoch)
        for term in ramped:
            assert weights.pop(term) == share * full.pop(term)
        assert weights == full


# ---------------------------------------------------------------- settings


def another(name, value):
    """Legal values of a setting other than `value`."""
    limits, hint = FIELDS[name].metadata, HINTS[name]
    if limits["choices"]:
        return [choice for choice in limits["choices"] if choice != value]
    if hint is bool:
        return [not value]
    if int in (hint, *typing.get_args(hint)):
        return [(value or 0) + 5]
    return [0.7 if value is None else 1.5 * value + 0.1]


def what_training_sees(method, values):
    """The total, and the gradient of everything learned beside the student."""
    objective = build(method, **values)
    total = run(objective, draw().with_gradients(), 3)[0]
    total.backward()
    gradients = {name: float(value.grad) for name, value in objective.named_parameters()}
    return {"total": float(total.detach()), **gradients}


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method in METHODS for name in settings_of(method)],
)
def test_every_setting_that_a_method_uses_moves_its_training(method, name):
    base = {**everything_on(method)}
    base |= {key: 10 for key in settings_of(method) if key.endswith("_warmup")}
    default = base.get(name, getattr(build(method, **base).config, name))
    before = what_training_sees(method, base)
    for value in another(name, default):
        after = what_training_sees(method, {**base, name: value})
        common = before.keys() & after.keys()
        moved = {key: abs(after[key] - before[key]) > 1e-4 for key in common}
        # A warm-up that ramps no weight steers how something is learned, not the value.
        steers = name.endswith("_warmup") and name not in RAMPS
        assert moved["total"] != steers, (value, moved)
        assert any(moved.values()), value


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in METHODS for n in REGISTRY if n not in settings_of(m)],
)
def test_a_setting_that_would_do_nothing_is_refused(method, name):
    (value, *_) = another(name, FIELDS[name].default)
    with pytest.raises(UserError) as refused:
        resolve_method(DistillConfig(method=method, **{name: value}))
    message = str(refused.value)
    users = [key for key in METHODS if name in settings_of(key)]
    assert message.startswith(f"{name} is not used by method '{method}', got {value}")
    assert f"({', '.join(users)})" in message


def test_unknown_method():
    with pytest.raises(UserError, match=r"unknown method 'edk'.*Known: .*ekd"):
        resolve_method(DistillConfig(method="edk"))


# ---------------------------------------------------------------- the table


@every_method
def test_the_table_is_consistent(method):
    entry = METHODS[method]
    assert set(entry.term_names) <= set(TERMS)
    assert set(entry.setting_names) <= set(DistillConfig.names())
    assert set(entry.space) <= set(entry.setting_names)
    resolved = resolve_method(DistillConfig(method=method))
    assert resolve_method(resolved) == resolved
    for name in entry.setting_names:
        if not name.endswith("log_prior"):  # the teacher decides
            assert getattr(resolved, name) is not None, name


_SOFTMAX = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "standardize": False}
_EKD = {
    "temperature": 1.0, "ce_weight": 1.0, "kd_weight": 4.5, "ekd_weight": 4.5,
    "ekd_warmup": 30, "evidence": "softplus", "ekd_temperature": 1.0, "prior_kl_weight": 0.0,
    "prior_kl_warmup": 10, "prior_kl_evidence": "softplus", "learn_log_prior": False,
    "log_prior": None, "teacher_log_prior": None,
}  # fmt: skip
_DKD = {"dkd_alpha": 1.0, "dkd_beta": 8.0, "kd_warmup": 20}
_CTKD = {"ctkd_t_start": 1.0, "ctkd_t_end": 20.0, "ctkd_warmup": 10}


def without_temperature(values):
    return {name: value for name, value in values.items() if name != "temperature"}


# METHODS.md, sections 1 and 2: 240 epochs, resnet32x4 -> resnet8x4 where it depends on the pair.
DEFAULTS = {
    "none": {"ce_weight": 1.0},
    "evidential": {
        "ce_weight": 1.0, "log_prior": None, "learn_log_prior": False, "prior_kl_weight": 0.0,
        "prior_kl_warmup": 10, "prior_kl_evidence": "softplus",
    },
    "kd": _SOFTMAX,
    "dkd": {"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0, "standardize": False, **_DKD},
    "mlkd": _SOFTMAX,
    "ctkd": {**without_temperature(_SOFTMAX), **_CTKD},
    "ekd": _EKD,
    "dkd+ekd": {**_EKD, "kd_weight": 0.5, **_DKD},
    "mlkd+ekd": {**_EKD, "kd_weight": 0.9},  # this project's
    "ctkd+ekd": {**without_temperature(_EKD), **_CTKD},
}  # fmt: skip


@every_method
def test_defaults_are_the_published_ones(method):
    config = resolve_method(DistillConfig(method=method))
    assert {name: getattr(config, name) for name in settings_of(method)} == DEFAULTS[method]


@pytest.mark.parametrize(
    ("epochs", "ekd", "dkd", "ctkd"),
    [(240, 30, 20, 10), (8, 1, 1, 1), (480, 60, 40, 20), (1, 1, 1, 1)],
)
def test_the_default_warm_ups_are_in_proportion(epochs, ekd, dkd, ctkd):
    expected = {"ekd_warmup": ekd, "kd_warmup": dkd, "ctkd_warmup": ctkd}
    for method, name in itertools.product(METHODS, expected):
        if name in settings_of(method):
            config = resolve_method(DistillConfig(method=method, epochs=epochs))
            assert getattr(config, name) == expected[name]


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(METHODS, 2)))
def test_with_method_starts_the_method_afresh(before, after):
    """The old method's settings vanish, the run's stay, the given values win."""
    config = build(before, **everything_on(before), lr=0.7, epochs=16).config
    changed = with_method(config, after, ce_weight=0.3)
    expected = DistillConfig(method=after, lr=0.7, epochs=16, ce_weight=0.3)
    assert changed == resolve_method(expected)
