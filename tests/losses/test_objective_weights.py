"""Weights, ramps and settings of every registered method, and the table of methods itself."""

import itertools

import pytest
import torch
from objective_cases import (
    FIELDS,
    RAMPS,
    build,
    every_method,
    everything_on,
    settings_of,
    terms_of,
)

from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.errors import UserError
from ekd_ray.losses.method_checks import alternatives
from ekd_ray.losses.methods import METHODS, resolve_method, with_method

torch.set_num_threads(1)

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


def test_the_weight_of_a_transport_falls_by_half_a_cosine():
    """By hand: 1 up to the epoch, 1/2 half way from there, nothing in the last."""
    objective = build("wkd", wkd_weight=8.0, wkd_decay=4, epochs=8, kd_weight=2.0)
    found = {epoch: objective.weights(epoch)["transport"] for epoch in (1, 4, 6, 8)}
    assert found == pytest.approx({1: 8.0, 4: 8.0, 6: 4.0, 8: 0.0})
    assert objective.weights(8)["kd"] == 2.0
    never = build("wkd", wkd_weight=8.0, wkd_decay=8, epochs=8)
    assert never.weights(8)["transport"] == 8.0


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in METHODS for n in REGISTRY if n not in settings_of(m)],
)
def test_a_setting_that_would_do_nothing_is_refused(method, name):
    (value, *_) = alternatives(REGISTRY[name], FIELDS[name].default)
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
def test_defaults_are_filled_in(method):
    resolved = resolve_method(DistillConfig(method=method))
    for name in settings_of(method):
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
_WHOLE = {"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0}
_RLD = {"rld_alpha": 1.0, "rld_beta": 8.0, "rld_confidence_temperature": 1.0, "kd_warmup": 20}
_DIST = {"dist_inter": 2.0, "dist_intra": 2.0}
_WKD = {
    "wkd_weight": 600.0, "wkd_decay": 150, "wkd_sharpen": 1.0, "wkd_epsilon": 0.05,
    "wkd_iterations": 10,
}  # fmt: skip
_CTKD = {"ctkd_t_start": 1.0, "ctkd_t_end": 20.0, "ctkd_warmup": 10}


def without_temperature(values):
    return {name: value for name, value in values.items() if name != "temperature"}


# METHODS.md, sections 1, 2 and 4: 240 epochs, resnet32x4 -> resnet8x4 where it depends on the pair.
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
    "rld": {**_WHOLE, **_RLD, "standardize": False},
    "ttm": {"ce_weight": 1.0, "kd_weight": 45.0, "ttm_exponent": 0.1},
    "wttm": {"ce_weight": 1.0, "kd_weight": 4.0, "ttm_exponent": 0.2},
    "dist": {**_WHOLE, **_DIST},
    "wkd": {**_WHOLE, "temperature": 8.0, **_WKD},
    "ekd": _EKD,
    "dkd+ekd": {**_EKD, "kd_weight": 0.5, **_DKD},
    "mlkd+ekd": {**_EKD, "kd_weight": 0.9},  # this project's
    "ctkd+ekd": {**without_temperature(_EKD), **_CTKD},
    "rld+ekd": {**_EKD, "kd_weight": 1.0, **_RLD},
    "ttm+ekd": {**without_temperature(_EKD), "kd_weight": 45.0, "ttm_exponent": 0.1},
    "wttm+ekd": {**without_temperature(_EKD), "kd_weight": 4.0, "ttm_exponent": 0.2},
    "dist+ekd": {**_EKD, "kd_weight": 1.0, **_DIST},
    "wkd+ekd": {**_EKD, "kd_weight": 1.0, **_WKD},
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


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.pairwise([*METHODS, *METHODS, "none"]), ("mlkd+ekd", "kd")]
)
def test_with_method_starts_the_method_afresh(before, after):
    """The old method's settings vanish, the run's stay, the given values win."""
    config = build(before, **everything_on(before), lr=0.7, epochs=16).config
    changed = with_method(config, after, ce_weight=0.3)
    expected = DistillConfig(method=after, lr=0.7, epochs=16, ce_weight=0.3)
    assert changed == resolve_method(expected)
