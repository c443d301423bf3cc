"""Checks the arguments of public functions against their annotations."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

from ekd_ray.errors import UserError, shorten, unknown_name

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def checks_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: an argument of another type than annotated, or of a name that there is
    not, raises `UserError`.

    A scalar of NumPy is passed on as Python's. Of a wrong number of arguments Python speaks itself.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = [p.name for p in parameters if p.name not in ("self", "cls")]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(function)
    def check(*args: P.args, **kwargs: P.kwargs) -> R:
        if not takes_any:
            check_keywords(f"argument of {function.__name__}:", kwargs, known)
        hints = _hints_of(function)
        plain, named = [*map(_plain, args)], {k: _plain(v) for k, v in kwargs.items()}
        for name, value in (*zip(names, plain, strict=False), *named.items()):
            if not _fits(value, hints.get(name, Any)):
                words = _in_words(hints[name])
                raise UserError(f"{name} must be {words}, got {shorten(value)}.")
        return function(*plain, **named)

    return check


def made_by_load(cls: type[T]) -> type[T]:
    """Decorate a dataclass that `load` makes: an argument without a name is a `UserError`."""
    made: Callable[..., None] = cls.__init__

    @functools.wraps(made)
    def check(self: T, *given: object, **values: object) -> None:
        if given:
            raise UserError(f"{cls.__name__} is read by {cls.__name__}.load({shorten(given[0])}).")
        made(self, **values)

    cls.__init__ = check  # type: ignore[assignment]
    return cls


def check_keywords(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `UserError`, with the nearest name, for a keyword that is none of those known."""
    known = {*known}
    for name in given:
        if name not in known:
            raise unknown_name(kind, name, known)


# When it is first called, because a class is not yet known where its methods are decorated.
_hints_of = functools.cache(typing.get_type_hints)


def _plain(value: Any) -> Any:
    numpy = sys.modules.get("numpy")  # of one that is not loaded there are no scalars
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if _is_union(hint):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if origin is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_fits(item, inner[0]) for item in value)
    if origin is Callable:
        return callable(value)
    if origin in (int, float):
        numbers = int if origin is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, os.PathLike if issubclass(origin, os.PathLike) else origin)


def _in_words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if _is_union(hint):
        words = [*dict.fromkeys(_in_words(part) for part in inner if part is not type(None))]
        if "a path" in words and "a text" in words:
            words.remove("a text")
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if origin is Sequence:
        return "a list" if inner[0] is object else f"a list, each {_in_words(inner[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is Mapping:
        return "a mapping"
    if origin is Callable:
        return "a function"
    if issubclass(origin, os.PathLike):
        return "a path"
    return _NAMES.get(origin, f"a {origin.__name__}")
