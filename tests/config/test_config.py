"""Settings: reading, writing, bounds, fingerprints and the JSON Schema, derived from metadata."""

import dataclasses
import datetime
import functools
import json
import math
import typing

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setting_fields import CLASSES, FIELDS, case_id, hint_of

from ekd_ray.config import DistillConfig, StudyConfig, json_schema
from ekd_ray.config.study_config import LEAST_SHARE
from ekd_ray.config.yaml_files import parse_yaml
from ekd_ray.errors import UserError


def item_type(cls, field):
    """The type that the limits apply to: the items' for a tuple."""
    kind, _ = hint_of(cls, field)
    if kind is not tuple:
        return kind
    item = typing.get_args(typing.get_type_hints(cls)[field.name])[0]
    return typing.get_origin(item) or item


@functools.cache  # to check a schema takes much longer than to check values by it
def validator(cls):
    return jsonschema.Draft202012Validator(json_schema(cls))


def valid_for_schema(cls, values):
    return validator(cls).is_valid(values)


@pytest.mark.parametrize(
    "values",
    [
        {"lr_milestones": [0.5, 0.5]},
        {"lr_milestones": [0.7, 0.5]},
        {"lr": 0.1, "lr_min": 0.2},
        {"batch_size": 16, "accumulation_steps": 3},
    ],
)
def test_settings_that_contradict_each_other(values):
    with pytest.raises(UserError, match=max(values, key=len)):
        DistillConfig(**values)


# Settings that there were


def test_the_authors_values_among_the_baselines_of_an_old_study_are_read_as_champions():
    old = StudyConfig.from_dict({"baselines": ["none", "kd", "authors"]})
    assert old == StudyConfig() and "authors" in old.champions
    assert StudyConfig.from_dict({"baselines": ["authors"]}).baselines == ()


def test_a_retired_setting_is_read_at_its_neutral_value_only():
    """Files of earlier states have them."""
    old = {**DistillConfig(lr=0.1).to_dict(), "changes": [], "parallel": "ddp"}
    assert DistillConfig.from_dict(old) == DistillConfig(lr=0.1)
    study = {"batch_scaling": "fixed", "perturbation_epochs": None}
    assert StudyConfig.from_dict(study) == StudyConfig()
    with pytest.raises(UserError, match=r"parallel was taken out .* can only be 'ddp', got 'fsdp'"):
        DistillConfig.from_dict({**old, "parallel": "fsdp"})
    with pytest.raises(UserError, match="perturbation_epochs was taken out"):
        StudyConfig.from_dict({"perturbation_epochs": 2})


# Types

WRONG = {
    int: ("3", 1.5, True, [1], {}, math.inf, math.nan),
    float: ("0.1", True, [0.1], math.nan, math.inf, -math.inf),
    bool: (1, 0, "true", 1.0),
    str: (3, True, ["a"], {}),
    tuple: (5, "ab", {}, True),
    dict: (5, "a", [1], True),
    DistillConfig: (5, "a", [1], True),
}
# Infinity and NaN are numbers to JSON Schema.
NOT_JSON = (math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=case_id)
def test_wrong_types_are_refused_by_class_and_schema(cls, field):
    kind, optional = hint_of(cls, field)
    switch = "on" in (field.metadata["choices"] or ())  # true and false are its on and off
    wrong = [value for value in WRONG[kind] if not (switch and isinstance(value, bool))]
    for value in (*wrong, *(() if optional else (None,))):
        with pytest.raises(UserError) as refused:
            cls(**{field.name: value})
        assert str(refused.value).startswith(f"{field.name} must be "), value
        assert str(value) in str(refused.value)
        if not any(value is item for item in NOT_JSON):
            assert not valid_for_schema(cls, {field.name: value}), value
    if optional:
        assert getattr(cls(**{field.name: None}), field.name) is None


def test_numbers_are_coerced_to_their_setting():
    config = DistillConfig(epochs=8.0, lr=1)
    assert (config.epochs, type(config.epochs)) == (8, int)
    assert (config.lr, type(config.lr)) == (1.0, float)


@pytest.mark.parametrize("bad", [math.nan, math.inf, datetime.date(2020, 1, 1)])
@pytest.mark.parametrize("name", ["space", "authors", "teacher_training", "first_points"])
def test_free_mappings_hold_only_what_json_holds(name, bad):
    value = {"lr": {"low": bad, "high": 1.0}}
    with pytest.raises(UserError, match=name):
        StudyConfig(**{name: [value] if name == "first_points" else value})


# Unknown keys


@pytest.mark.parametrize(
    ("cls", "values", "near"),
    [
        (DistillConfig, {"kd_wieght": 1}, "kd_weight"),
        (StudyConfig, {"trails": 1}, "trials"),
        (StudyConfig, {"distill": {"epoch": 1}}, "epochs"),
    ],
)
def test_unknown_key_names_the_nearest(cls, values, near):
    with pytest.raises(UserError, match=f"Did you mean '{near}'") as refused:
        cls.from_dict(values, where="some.yaml")
    assert "some.yaml" in str(refused.value) or "distill" in str(refused.value)
    assert not valid_for_schema(cls, values)
    if cls is DistillConfig:
        with pytest.raises(UserError, match=near):
            cls().replace(**values)


# Round trips

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e9, 1e9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


def legal(cls, field):
    """A strategy of legal values of a setting, from its metadata."""
    kind, optional = hint_of(cls, field)
    limits, item = field.metadata, item_type(cls, field)
    low = limits["above"] if limits["low"] is None else limits["low"]
    if field.name == "constraints":
        values = st.sampled_from(["val_ece<=0.05", "parameters<=300000"])
    elif field.name == "plugins":
        values = st.from_regex(r"[a-z_.]+@[0-9a-f]{64}", fullmatch=True)
    elif limits["choices"]:
        values = st.sampled_from(limits["choices"])
    elif item is bool:
        values = st.booleans()
    elif item is int:
        values = st.integers(low, limits["high"])
    elif field.name == "gpus_per_trial":
        values = st.just(0.0) | st.floats(LEAST_SHARE, limits["high"])
    elif item is float:
        values = st.floats(low, limits["high"], exclude_min=limits["above"] is not None)
    elif item is str:
        values = TEXT
    else:
        values = st.dictionaries(TEXT, PLAIN, max_size=3)
    if kind is tuple:
        values = st.lists(values, max_size=3, unique=item is not dict)
        values = values.map(sorted) if item is float else values
    return st.none() | values if optional else values


def build(cls, values):
    if cls is DistillConfig:
        values["lr_min"] = min(values["lr_min"], values["lr"])
        parts = values.get("accumulation_steps", 1)
        values["batch_size"] = parts * max(1, values.get("batch_size", 64) // parts)
    else:
        metric = values.get("metric", "val_top1")
        values["objectives"] = [n for n in values.get("objectives", ()) if n != metric]
    return cls(**values)


def configs(cls):
    """Legal configurations; each example changes some settings, the rest are defaults."""
    strategies = {
        field.name: configs(DistillConfig) if field.name == "distill" else legal(cls, field)
        for field in cls.fields()
    }
    always = {name: strategies.pop(name) for name in ("lr", "lr_min") if name in strategies}
    drawn = st.fixed_dictionaries(always, optional=strategies)
    return drawn.map(lambda values: build(cls, values))


CONFIGS = st.one_of([configs(cls) for cls in CLASSES])


@settings(max_examples=40, deadline=None)
@given(CONFIGS)
def test_round_trip_through_yaml_and_json(config):
    cls = type(config)
    from_yaml = cls.from_dict(parse_yaml(config.to_yaml(), where="test"))
    from_json = cls.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert from_yaml == config and from_json == config
    assert from_yaml.fingerprint() == from_json.fingerprint() == config.fingerprint()


@settings(max_examples=15, deadline=None)
@given(CONFIGS)
def test_legal_configurations_validate(config):
    validator(type(config)).validate(config.to_dict())


# Shape of the classes


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_and_keyword_only(cls):
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(TypeError):
        cls("cifar100")


def test_later_changes_of_a_given_mapping_do_not_reach_the_study():
    space = {"lr": {"low": 0.1, "high": 1.0}}
    study = StudyConfig(space=space)
    space["lr"]["low"] = 9.0
    space["kd_weight"] = {}
    assert study.space == {"lr": {"low": 0.1, "high": 1.0}}
    study.to_dict()["space"]["lr"]["low"] = 7.0
    assert study.space == {"lr": {"low": 0.1, "high": 1.0}}


def test_mode_and_grace():
    assert StudyConfig().mode == "max"
    assert {StudyConfig(metric=name).mode for name in ("val_nll", "val_ece")} == {"min"}
    assert StudyConfig(distill=DistillConfig(epochs=240)).grace == 30
    assert StudyConfig(distill=DistillConfig(epochs=240, schedule="cosine")).grace == 60
    assert StudyConfig(distill=DistillConfig(epochs=3)).grace == 1
    assert StudyConfig(grace_epochs=5).grace == 5


@pytest.mark.parametrize("cls", CLASSES)
def test_schema_describes_every_setting(cls):
    schema = json_schema(cls)
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema, allow_nan=False)
    jsonschema.validate(cls().to_dict(), schema)
    assert set(schema["properties"]) == set(cls.names())
    assert all(entry["description"] for entry in schema["properties"].values())
    defaults = {name: entry["default"] for name, entry in schema["properties"].items()}
    assert cls.from_dict(defaults) == cls()


def test_what_the_rows_of_a_study_differ_by_is_shown():
    study = StudyConfig(
        space={"lr": {"low": 0.01, "high": 0.1}},
        authors={"ekd_warmup": 1, "lr": 0.05, "a_name_of_an_edited_file": 1},
        warm_points={"from runs/a": {"kd_weight": 2.0}, "edited": None},
    )
    assert study.shown_settings == ("lr", "ekd_warmup", "kd_weight")
    assert StudyConfig().shown_settings == ()
