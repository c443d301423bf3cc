"""Machinery of the configuration dataclasses: declare, check, read and write settings.

A setting is a dataclass field made by `setting`, whose metadata carry its description,
bounds and choices. Checking, YAML and JSON reading, the fingerprint and the JSON Schema
all derive from those metadata, so that a bound is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ekd_ray.config.yaml_files import YamlFile, dump_yaml
from ekd_ray.errors import Keys, UserError, error_context, meant_name, shorten, unknown_name

MOST_ITEMS = 1000  # of a list or a mapping; recipes have some ten
MOST_CHARACTERS = 4096  # of a text, the longest of which are paths
_MOST_NESTED = 16
MOST_EPOCHS = 100_000
MOST_SEED = 2**63 - 1
MOST_THREADS = 1024
_NONSENSE = 10**6  # a bound from here on stops slips only, and help need not name it
# Control characters cut a path short or steer a terminal, and lone surrogates cannot be written.
_ILLEGAL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# The neutral value of a setting that counts in every fingerprint.
COUNTS = object()
# What another value does. A run of other identity is another run: it has another fingerprint.
# Another value of a pinned setting may change bits or records of the same run: who resumes keeps
# it. A free one changes no run's result, though perhaps how many there are, and when.
Effect = Literal["identity", "pinned", "free"]


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    effect: Effect = "identity",
    alike: Callable[[Any], Any] | None = None,
    neutral: Any = COUNTS,
) -> Any:
    """A dataclass field with its description and limits.

    `low` and `high` are inclusive bounds and `above` an exclusive lower one, and every number
    has one at each end; `choices` are the legal strings; `effect`: see `Effect`. Pinned values of
    which `alike` is the same may be exchanged. At its `neutral` value a setting is left out of the
    fingerprint, so that a new one leaves those of older runs alone, and pins nothing; `COUNTS` has
    no such value.
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {"doc": doc, "effect": effect, "alike": alike, "neutral": neutral, **limits}
    if isinstance(default, dict | list):
        raise TypeError("a setting's default must be immutable: use a tuple or None")
    return dataclasses.field(default=default, metadata=metadata)


# Of each kind of bound: its sign, what holds within it, and its name in a JSON Schema.
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "above": (">", operator.gt, "exclusiveMinimum"),
    "low": (">=", operator.ge, "minimum"),
    "high": ("<=", operator.le, "maximum"),
}


_HINTS: dict[type, dict[str, Any]] = {}
_NAMES: dict[type, tuple[str, ...]] = {}
_RANGES: dict[tuple[type, str], tuple[float, float]] = {}


def hints_of(cls: type) -> dict[str, Any]:
    """The types of a class's settings; to evaluate them takes longer than to check a value."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _float_range(cls: type[Settings], name: str) -> tuple[float, float]:
    """The least and the largest legal value of a setting that is a float, empty of another."""
    key = (cls, name)
    if key not in _RANGES:
        most, limits = sys.float_info.max, cls.__dataclass_fields__[name].metadata
        low = -most if limits["low"] is None else limits["low"]
        if limits["above"] is not None:
            low = max(low, math.nextafter(limits["above"], math.inf))
        _RANGES[key] = low, most if limits["high"] is None else limits["high"]
        if hints_of(cls)[name] not in (float, float | None):
            _RANGES[key] = math.inf, -math.inf
    return _RANGES[key]


def value_type(cls: type, name: str) -> type:
    """The type of a setting's value, of one item where it is a list; without None and words."""
    hint = _without_words(hints_of(cls)[name])
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return typing.get_origin(hint) or hint


@functools.cache
def words_of(hint: Any) -> tuple[str, ...]:
    """The texts that may stand for a number: `auto` of `int | Literal["auto"]`."""
    literals = (arg for arg in typing.get_args(hint) if typing.get_origin(arg) is Literal)
    return tuple(word for literal in literals for word in typing.get_args(literal))


def _has_switch(field: dataclasses.Field[Any]) -> bool:
    """Whether `on` and `off` are among the choices: in YAML these words are true and false."""
    return "on" in (field.metadata["choices"] or ())


def limits_in_words(field: dataclasses.Field[Any]) -> list[str]:
    """The limits of a setting for help and documents: `["> 0", "<= 1"]`, `["one of a, b"]`."""
    limits = field.metadata
    words = [f"{sign} {limits[kind]:g}" for kind, (sign, *_) in _BOUNDS.items()
             if limits[kind] is not None and abs(limits[kind]) < _NONSENSE]  # fmt: skip
    return words + ([f"one of {', '.join(limits['choices'])}"] if limits["choices"] else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the frozen configurations. Raises `UserError` on any illegal value.

    `retired` has settings that there were, with the value that changed nothing: a file that has
    them so is read as ever. `filled_in` has settings that nobody gives, because what was found is
    recorded in them.
    """

    retired: ClassVar[dict[str, Any]] = {}
    filled_in: ClassVar[tuple[str, ...]] = ()

    if not TYPE_CHECKING:  # a type checker would let every misspelt name pass

        def __new__(cls, **values: Any) -> Self:
            for name in values.keys() - cls.__dataclass_fields__.keys():
                raise unknown_name(f"setting of {cls.__name__}:", name, cls.given_names())
            return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # not `fields`, which imports all methods
            value = self.check_value(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def check_value(cls, name: str, value: Any) -> Any:
        """The value as its setting has it, a float for a whole number; raises `UserError`."""
        if type(value) is float:  # most values of most records, of which thousands are read
            low, high = _float_range(cls, name)
            if low <= value <= high:
                return value + 0.0
        field = cls.__dataclass_fields__[name]
        if isinstance(value, bool) and _has_switch(field):
            value = "on" if value else "off"
        value = _coerce((name,), hints_of(cls)[name], value, field.metadata["choices"])
        _check_limits(name, value, field.metadata)
        return value

    @classmethod
    def fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """All settings, in order of declaration."""
        return dataclasses.fields(cls)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of `fields`."""
        if cls not in _NAMES:
            _NAMES[cls] = tuple(field.name for field in cls.fields())
        return _NAMES[cls]

    @classmethod
    def given_names(cls) -> list[str]:
        """The names that a user may give, which are what an error lists."""
        return [name for name in cls.names() if name not in cls.filled_in]

    @classmethod
    def add_fields(cls, added: Mapping[str, tuple[Any, Any]], *, after: str) -> None:
        """Give the class further settings, by name (type, `setting(...)`), behind another one.

        Configurations that were built before have the defaults.
        """
        listed = [(name, kind, field) for name, (kind, field) in added.items()]
        grown = dataclasses.make_dataclass(
            cls.__name__, listed, bases=(cls,), frozen=True, kw_only=True
        )
        for generated in ("__init__", "__repr__", "__eq__", "__hash__"):
            setattr(cls, generated, grown.__dict__[generated])
        fields = {field.name: field for field in dataclasses.fields(grown)}
        order = [name for name in fields if name not in added]
        index = order.index(after) + 1
        order[index:index] = added
        cls.__dataclass_fields__ = {name: fields[name] for name in order}
        for name, (kind, field) in added.items():
            cls.__annotations__[name] = kind
            setattr(cls, name, field.default)
        _HINTS.pop(cls, None)
        _NAMES.pop(cls, None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "configuration") -> Self:
        """Build from a mapping; an unknown key is refused by name, with `where` to find it."""
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where} must be a mapping of settings, got {shorten(values)}.", keys=()
            )
        names = cls.names()
        for key in values:
            if key in cls.retired:
                _check_retired(key, values[key], cls.retired[key])
            elif key not in names:
                raise unknown_name(f"setting in {where}:", key, cls.given_names(), keys=(key,))
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file (JSON is YAML too); an illegal value is refused with its line."""
        file = YamlFile.read(path)
        with file.locate_errors():
            return cls.from_dict(file.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (dict, list, str, int, float, bool, None): JSON- and YAML-ready."""
        return {field.name: _plain(getattr(self, field.name)) for field in self.fields()}

    def to_yaml(self) -> str:
        """YAML text in order of declaration; `from_yaml` reads it back equal."""
        return dump_yaml(self.to_dict())

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like a new one."""
        values = {field.name: getattr(self, field.name) for field in self.fields()}
        return type(self).from_dict({**values, **changes})

    def identity(self) -> dict[str, Any]:
        """The settings that tell runs apart, without places and resources."""
        kept = {}
        for field in self.fields():
            value = getattr(self, field.name)
            counts = field.metadata["effect"] == "identity"
            if counts and value != field.metadata["neutral"]:
                inner = isinstance(value, Settings)
                kept[field.name] = value.identity() if inner else _plain(value)
        return kept

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the identity: equal settings, equal fingerprint."""
        text = _text(self.identity())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def changes(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """The settings in which `other` may not resume this, because they differ.

        Returns:
            By name (`seed`, `distill.seed`), in order, the value here and that of `other`.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for field in self.fields():
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            effect, alike = field.metadata["effect"], field.metadata["alike"]
            if isinstance(mine, Settings):
                inner = mine.changes(theirs).items()
                found |= {f"{field.name}.{name}": values for name, values in inner}
            elif effect == "free" or (effect == "pinned" and mine == field.metadata["neutral"]):
                continue
            elif alike(mine) != alike(theirs) if alike else _text(mine) != _text(theirs):
                found[field.name] = _plain(mine), _plain(theirs)
        return found


def json_schema(cls: type[Settings]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration, for editors' completion and checks."""
    properties = {}
    for field in cls.fields():
        hint, limits = hints_of(cls)[field.name], field.metadata
        entry = {**_schema_of(hint), "description": limits["doc"], "default": _plain(field.default)}
        limited = entry["items"] if entry["type"] == "array" else entry
        if limits["choices"]:
            limited["enum"] = [*limits["choices"], *([None] if _is_optional(hint) else [])]
            if _has_switch(field):
                limited["type"], limited["enum"] = (
                    ["string", "boolean"],
                    [*limited["enum"], True, False],
                )
        for kind, (*_, key) in _BOUNDS.items():
            if limits[kind] is not None:
                limited[key] = limits[kind]
        properties[field.name] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": cls.__name__,
        "description": (cls.__doc__ or "").strip().splitlines()[0],
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _check_retired(name: str, value: Any, neutral: Any) -> None:
    if _plain(value) != _plain(neutral):
        raise UserError(
            f"{name} was taken out of ekd_ray and can only be {_plain(neutral)!r}, got "
            f"{shorten(value)}: "
            "remove it, or run this with the release that wrote it.",
            keys=(name,),
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _text(value: Any) -> str:
    """JSON by which values are told apart: 1 and 1.0 are two, a tuple and a list one."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _without_words(hint: Any) -> Any:
    """`hint` without its `| None` and its `| Literal[...]`."""
    if not (_is_optional(hint) or words_of(hint)):
        return hint
    (inner,) = (
        arg
        for arg in typing.get_args(hint)
        if arg is not type(None) and typing.get_origin(arg) is not Literal
    )
    return inner


def _name(keys: Keys) -> str:
    """The keys to a value as they are written for people: `first_points[0].lr`."""
    first, *rest = keys
    words = [f"[{key}]" if isinstance(key, int) else f".{key}"[:80] for key in rest]
    return "".join((f"{first}"[:80], *words))


def _coerce(keys: Keys, hint: Any, value: Any, choices: tuple[str, ...] | None = None) -> Any:
    """`value` as the type that `hint` names, or a `UserError` with what is legal and the value."""
    if value is None and _is_optional(hint):
        return None
    words = words_of(hint)
    if isinstance(value, str) and value in words:
        return value
    hint = _without_words(hint)
    origin = typing.get_origin(hint) or hint
    value = _plain_scalar(value, numeric=origin in (int, float))
    if origin in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        number = _finite(keys, value)
        if origin is float:
            return number
        if number.is_integer():
            return int(value)
    if origin is tuple and isinstance(value, tuple | list):
        _check_count(keys, value)
        inner = typing.get_args(hint)[0]
        return tuple(_coerce((*keys, i), inner, item, choices) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return _json_copy(keys, value)
    if issubclass(origin, Settings) and isinstance(value, Mapping):
        with error_context(*keys):
            return origin.from_dict(value, where=_name(keys))
    if origin is str and isinstance(value, str):
        return _legal_text(keys, value)
    if issubclass(origin, bool | Settings) and isinstance(value, origin):
        return value
    kinds = " or ".join((_type_name(hint), *words))
    if choices and hint is str:
        kinds = f"one of {', '.join(choices)}"
    raise UserError(f"{_name(keys)} must be {kinds}, got {shorten(value)}.", keys=keys)


_GROUPED = re.compile(r"[-+]?\d{1,3}(_\d{3})+(\.\d+)?")  # 1_000, which YAML 1.2 takes for a text


def _plain_scalar(value: Any, *, numeric: bool) -> Any:
    """A scalar of NumPy as Python's, and for a setting that is a number the text `1_000` as one."""
    numpy = sys.modules.get("numpy")  # of one that is not loaded there are no scalars
    if numpy and isinstance(value, numpy.generic):
        return value.item()
    if numeric and isinstance(value, str) and _GROUPED.fullmatch(value):
        return float(value) if "." in value else int(value)
    return value


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if typing.get_origin(hint) is tuple:
        return "a list"
    return names.get(hint, "a mapping")


def _finite(keys: Keys, value: float) -> float:
    """`value` as a float (never -0.0, which would be another fingerprint)."""
    if not abs(value) <= sys.float_info.max:
        raise UserError(f"{_name(keys)} must be a finite number, got {shorten(value)}.", keys=keys)
    return float(value) + 0.0


def _check_count(keys: Keys, value: Sized) -> None:
    if len(value) > MOST_ITEMS:
        raise UserError(
            f"{_name(keys)} must have <= {MOST_ITEMS} entries, got {len(value)}.", keys=keys
        )


def _legal_text(keys: Keys, value: str) -> str:
    if len(value) > MOST_CHARACTERS or _ILLEGAL.search(value):
        raise UserError(
            f"{_name(keys)} must be a text of <= {MOST_CHARACTERS} characters, none of them a "
            f"control character, got {shorten(value)}.",
            keys=keys,
        )
    return value


def _json_copy(keys: Keys, value: Any) -> Any:
    """A copy of nested plain values that the caller cannot change; `UserError` for others."""
    if len(keys) > _MOST_NESTED:
        raise UserError(f"{_name(keys)} is nested deeper than {_MOST_NESTED}.", keys=keys)
    if isinstance(value, Mapping):
        _check_count(keys, value)
        return {
            _legal_text(keys, str(key)): _json_copy((*keys, key), item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        _check_count(keys, value)
        return [_json_copy((*keys, i), item) for i, item in enumerate(value)]
    if isinstance(value, str):
        return _legal_text(keys, value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        _finite(keys, value)
        return value
    raise UserError(
        f"{_name(keys)} must be a number, a text or a list of them, got {shorten(value)}.",
        keys=keys,
    )


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if limits["choices"] and item not in limits["choices"]:
            legal, meant = ", ".join(limits["choices"]), meant_name(item, limits["choices"])
            raise UserError(
                f"{name} must be one of {legal}, got {shorten(item)}.{meant}", keys=(name,)
            )
        for kind, (sign, is_within, _) in _BOUNDS.items():
            bound = limits[kind]
            if bound is not None and not isinstance(item, str) and not is_within(item, bound):
                raise UserError(
                    f"{name} must be {sign} {bound}, got {shorten(item)}.", keys=(name,)
                )


def _schema_of(hint: Any) -> dict[str, Any]:
    if _is_optional(hint):
        entry = _schema_of(_without_words(hint))
        return {**entry, "type": [entry["type"], "null"]}
    if words := words_of(hint):  # `pattern` limits texts only, as `minimum` does numbers
        entry = _schema_of(_without_words(hint))
        pattern = f"^({'|'.join(words)})$"
        return {**entry, "type": [entry["type"], "string"], "pattern": pattern}
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        return {"type": "array", "items": _schema_of(typing.get_args(hint)[0])}
    if issubclass(origin, Settings):
        schema = json_schema(origin)
        return {key: schema[key] for key in ("type", "properties", "additionalProperties")}
    names = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object"}
    return {"type": names[origin]}
