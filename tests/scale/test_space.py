"""The search space: what Optuna is asked, in which ranges, under which conditions."""

import math

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, resolve_method
from ekd_ray.scale.space import Space, check_space, first_points, point_config

optuna.logging.set_verbosity(optuna.logging.ERROR)


def sample(spec, n=60, seed=0):
    """`n` points of a space, asked of Optuna's random sampler."""
    space = Space(spec)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space(study.ask()) for _ in range(n)]


def column(spec, **kwargs):
    (name,) = spec
    return [point[name] for point in sample(spec, **kwargs)]


# Sampling


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1e-3, 10), st.floats(0, 10), st.booleans(), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_numbers_stay_inside_their_range(low, width, log, seed):
    values = column({"kd_weight": {"low": low, "high": low + width, "log": log}}, n=10, seed=seed)
    assert all(low <= value <= low + width and isinstance(value, float) for value in values)
    if width > 0.1:
        assert len(set(values)) > 1


def test_log_ranges_are_even_in_the_logarithm():
    values = column({"lr": {"low": 1e-4, "high": 1.0, "log": True}}, n=400)
    assert 0.4 < sum(value < 1e-2 for value in values) / len(values) < 0.6
    linear = column({"lr": {"low": 1e-4, "high": 1.0}}, n=400)
    assert sum(value < 1e-2 for value in linear) / len(linear) < 0.1


@pytest.mark.parametrize(
    ("spec", "legal"),
    [
        ({"ekd_warmup": {"low": 2, "high": 5}}, {2, 3, 4, 5}),
        ({"ekd_warmup": {"low": 0, "high": 10, "step": 5}}, {0, 5, 10}),
        ({"batch_size": {"low": 2, "high": 4, "log": True}}, {2, 3, 4}),
        ({"momentum": {"low": 0.0, "high": 0.5, "step": 0.25}}, {0.0, 0.25, 0.5}),
        ({"epochs": {"low": 3, "high": 3}}, {3}),
        ({"evidence": {"choices": ["relu", "exp"]}}, {"relu", "exp"}),
        ({"standardize": {"choices": [True, False]}}, {True, False}),
        ({"log_prior": {"choices": [None, -1.0]}}, {None, -1.0}),
    ],
)
def test_every_legal_value_and_no_other_is_sampled(spec, legal):
    values = column(spec)
    assert set(values) == legal
    assert {type(value) for value in values} == {type(value) for value in legal}


# Conditions

CONDITIONAL = {
    "method": {"choices": ["kd", "ekd", "none"]},
    "kd_weight": {"low": 1, "high": 2, "when": {"method": ["kd", "ekd"]}},
    "ekd_weight": {"low": 1, "high": 2, "when": {"method": "ekd"}},
    "evidence": {"choices": ["relu", "exp"], "when": {"method": ["ekd"]}},
    "log_prior": {"low": -2, "high": 1, "when": {"method": "ekd", "evidence": "relu"}},
}


def test_a_parameter_exists_only_where_its_conditions_hold():
    points = sample(CONDITIONAL, n=120)
    for point in points:
        ekd = point["method"] == "ekd"
        assert ("kd_weight" in point) == (point["method"] != "none")
        assert ("ekd_weight" in point) == ("evidence" in point) == ekd
        assert ("log_prior" in point) == (ekd and point["evidence"] == "relu")
    assert {"log_prior" in point for point in points} == {True, False}


def test_a_condition_on_an_absent_parameter_does_not_hold():
    fixed = FixedTrial({"method": "kd", "kd_weight": 1.5, "evidence": "relu", "log_prior": -1.0})
    assert Space(CONDITIONAL)(fixed) == {"method": "kd", "kd_weight": 1.5}


def test_conditional_methods_are_a_legal_study():
    check_space(StudyConfig(space=CONDITIONAL))
    unconditional = {k: {**v, "when": {}} for k, v in CONDITIONAL.items()}
    with pytest.raises(UserError, match="not used by method"):
        check_space(StudyConfig(space=unconditional))


# Illegal spaces


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "search space is empty"),
        ({"kd_wieght": {"low": 1, "high": 2}}, "Did you mean 'kd_weight'"),
        ({"lr": {"lwo": 1, "high": 2}}, r"key of space\.lr.*'lwo'.*Did you mean 'low'"),
        ({"lr": 3}, r"space\.lr must be"),
        ({"lr": {"low": 2, "high": 1}}, r"space\.lr: low must be <= high \(1\), got 2"),
        ({"lr": {"low": 2}}, r"space\.lr\.high must be a number, got None"),
        ({"lr": {"low": True, "high": 2}}, r"space\.lr\.low must be a number, got True"),
        ({"log_prior": {"low": 0, "high": 1, "log": True}}, r"low must be > 0 with log"),
        ({"lr": {"low": 1, "high": 2, "log": True, "step": 1}}, r"step cannot be combined"),
        ({"lr": {"low": 1, "high": 2, "step": 0}}, r"space\.lr.*step"),
        ({"ekd_warmup": {"low": 1, "high": 9, "step": 0.5}}, r"space\.ekd_warmup.*step"),
        ({"lr": {"low": 1, "high": 2, "log": "no"}}, r"space\.lr.*log"),
        ({"ekd_warmup": {"low": 0.5, "high": 9}}, r"space\.ekd_warmup.*whole"),
        ({"evidence": {"low": 1, "high": 2}}, r"space\.evidence is not a number"),
        ({"lr": {"choices": []}}, r"space\.lr\.choices must be a list"),
        ({"lr": {"choices": [1], "low": 1, "high": 2}}, r"space\.lr.*choices"),
        ({"lr": {"low": 0, "high": 1}}, r"lr must be > 0"),
        ({"lr": {"low": 0.1, "high": 1, "step": 1e-300}}, r"space\.lr\.step must divide"),
        ({"epochs": {"low": 1, "high": 10**30}}, r"epochs must be <= 100000"),
        ({"evidence": {"choices": ["relu", "rleu"]}}, r"evidence must be one of"),
        ({"lr": {"low": math.nan, "high": 1}}, "lr"),
        ({"lr": {"low": 0.1, "high": 1, "when": {"momentum": 1}}}, r"space\.lr\.when.*'momentum'"),
        ({"lr": {"low": 0.1, "high": 1, "when": 3}}, r"space\.lr\.when must map"),
        ({"lr": {"low": 1, "high": 2, "when": {"method": "kd"}}, "method": {"choices": ["kd"]}},
         "must be a parameter above 'lr'"),
        # It would silently take the parameter out of the search.
        ({**CONDITIONAL, "ekd_weight": {"low": 1, "high": 2, "when": {"method": "ekdd"}}}, "ekdd"),
        ({"method": {"choices": ["kdd"]}}, "unknown method 'kdd'"),
        ({"standardize": {"choices": [True]}}, "standardize is not used by method 'ekd'"),
        ({"lr": {"low": 0.1, "high": 1, "prior": 0.5}}, r"space\.lr\.prior must be \{center"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"centre": 1}}}, r"space\.lr\.prior must be"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"center": 2}}}, r"prior\.center must be in 0\.1"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"center": "x"}}}, r"prior\.center must be in"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"center": 1, "width": 2}}}, "'width'"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"center": 1, "confidence": "hgih"}}}, "'high'"),
        ({"lr": {"low": 0.1, "high": 1, "prior": {"center": 1, "confidence": []}}}, "confidence"),
        ({"evidence": {"choices": ["relu"], "prior": {"center": "exp"}}}, r"must be in \{relu\}"),
        ({"lr": {"prior": {"center": 1}}}, r"space\.lr has a prior and no values"),
        ({"log_prior": {"low": 0, "high": 1, "around_prior": 1, "prior": {"center": 1}}},
         "around_prior"),
    ],
    ids=str,
)  # fmt: skip
def test_illegal_spaces_are_refused(spec, message):
    with pytest.raises(UserError, match=message) as refused:
        check_space(StudyConfig(space=spec))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_every_seed_samples(seed):
    check_space(StudyConfig(seed=seed, space={"lr": {"low": 0.1, "high": 1}}))


# First points

RANGES = {
    "kd_weight": {"low": 1, "high": 9, "log": True},
    "ekd_warmup": {"low": 0, "high": 30},
    "evidence": {"choices": ["relu", "exp"]},
}


def test_only_the_searched_part_is_told_to_optuna():
    point = {"kd_weight": 4.5, "lr": 0.3, "evidence": "exp"}
    assert Space(RANGES).searched_part(point) == {"kd_weight": 4.5, "evidence": "exp"}


@pytest.mark.parametrize(
    "point", [{"kd_weight": 9.5}, {"kd_weight": True}, {"evidence": "softplus"}], ids=str
)
@pytest.mark.parametrize("place", ["first_points", "authors"])
def test_first_points_outside_of_the_range_are_refused(point, place):
    (name,) = point
    values = {"first_points": (point,)} if place == "first_points" else {"authors": point}
    with pytest.raises(UserError, match=f"first point has {name} = {point[name]}"):
        check_space(StudyConfig(space=RANGES, **values))


def test_first_points_must_be_configurations():
    for point in ({"kd_wieght": 1}, {"ekd_warmup": 1.5}, {"lr": -1}, {"standardize": True}):
        with pytest.raises(UserError, match=next(iter(point))):
            check_space(StudyConfig(space=RANGES, first_points=(point,)))


def test_the_authors_come_first():
    config = StudyConfig(authors={"lr": 0.1}, first_points=({"lr": 0.2}, {"lr": 0.3}))
    assert first_points(config) == ({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})
    assert first_points(StudyConfig()) == ()


# Configurations of points


def test_a_point_is_laid_over_the_shared_settings():
    base = DistillConfig(lr=0.3, ekd_weight=2.0, seed=7)
    config = point_config(base, {"kd_weight": 3.0, "lr": 0.5})
    assert config == resolve_method(base.replace(kd_weight=3.0, lr=0.5))
    assert (config.ce_weight, config.ekd_weight, config.seed) == (1.0, 2.0, 7)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ekd"])
def test_another_method_resets_the_method_settings_and_nothing_else(method):
    base = DistillConfig(
        method="ekd", temperature=2.0, kd_weight=3.0, ce_weight=7.0, ekd_weight=2.0,
        log_prior=-1.0, evidence="relu", prior_kl_weight=0.5, lr=0.3, seed=7, epochs=8,
    )  # fmt: skip
    config = point_config(base, {"method": method, "lr": 0.4})
    default = resolve_method(DistillConfig(method=method, epochs=8))
    for name in REGISTRY:
        assert getattr(config, name) == getattr(default, name), name
    assert (config.method, config.lr, config.seed, config.epochs) == (method, 0.4, 7, 8)


def test_a_point_under_another_method_keeps_its_own_values():
    config = point_config(DistillConfig(method="ekd"), {"method": "kd", "temperature": 3.0})
    assert (config.temperature, config.kd_weight) == (3.0, 0.9)


def test_a_width_around_the_prior_is_positive():
    with pytest.raises(UserError, match=r"space\.log_prior\.around_prior must be > 0, got 0"):
        Space({"log_prior": {"low": -1, "high": 1, "around_prior": 0}})


@pytest.mark.parametrize(
    "space",
    [
        {"temperature": {"low": 1, "high": 4, "around_prior": 1}},
        {"log_prior": {"low": 0.1, "high": 1, "log": True, "around_prior": 1}},
    ],
)
def test_only_a_log_prior_has_a_range_around_one(space):
    with pytest.raises(UserError, match="around_prior is for log_prior and teacher_log_prior"):
        Space(space)


@pytest.mark.parametrize(
    ("entry", "value", "nearest"),
    [
        ({"low": 0.0, "high": 9.0, "step": 0.5}, 3.2, 3.0),
        ({"low": 0.0, "high": 9.0, "step": 0.5}, 20.0, 9.0),
        ({"low": 0.1, "high": 9.0, "log": True}, 3.2, 3.2),
        ({"low": 0.1, "high": 9.0, "log": True}, 0.01, 0.1),
    ],
)
def test_the_nearest_value_of_a_range(entry, value, nearest):
    assert Space({"kd_weight": entry}).parameters["kd_weight"].nearest(value) == nearest


def test_a_first_order_weight_of_zero_is_drawn():
    assert 0.0 in column({"kd_weight": METHODS["ekd"].space["kd_weight"]}, n=400)
