"""Every setting of every configuration class, for tests over all of them."""

import typing

from ekd_ray.config import DistillConfig, StudyConfig

CLASSES = (DistillConfig, StudyConfig)
FIELDS = [(cls, field) for cls in CLASSES for field in cls.fields()]


def hint_of(cls, field):
    """(type, may be None) of a setting; of a number that a word may stand for, the number's."""
    hint = typing.get_type_hints(cls)[field.name]
    args = typing.get_args(hint)
    optional = type(None) in args
    word = any(typing.get_origin(arg) is typing.Literal for arg in args)
    inner = next(arg for arg in args if arg is not type(None)) if optional or word else hint
    return typing.get_origin(inner) or inner, optional


def case_id(value):
    return getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
