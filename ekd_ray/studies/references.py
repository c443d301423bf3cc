"""References in a recipe's ranges and points to what is known of the pair.

`kd_weight: {low: authors.kd_weight / 4, high: authors.kd_weight * 4, log: true}` searches around
the authors' value of whichever pair extends the recipe. A reference names a value under
`authors:` or `distill:`, with one number to multiply, divide, add or subtract, if any.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from ekd_ray.errors import UserError, at, unknown_name

SECTIONS = ("authors", "distill")
_REFERENCE = re.compile(
    rf"({'|'.join(SECTIONS)})\.(\w+)(?:\s*([*/+-])\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?))?"
)
_OPERATIONS: dict[str, Callable[[Any, float], float]] = {
    "*": operator.mul, "/": operator.truediv, "+": operator.add, "-": operator.sub,
}  # fmt: skip


def is_reference(value: Any) -> bool:
    """Whether a recipe's value is meant as a reference, well formed or not."""
    return isinstance(value, str) and value.startswith(tuple(f"{name}." for name in SECTIONS))


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with the references in `space:` and `first_points:` replaced.

    Raises:
        UserError: a malformed reference, one to a value that is not there, or arithmetic on
            what is no number; its `keys` lead to it.
    """
    found = dict(values)
    for section in ("space", "first_points"):
        if section in values:
            with at(section):
                found[section] = _walk(values[section], values)
    return found


def _walk(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        walked = {}
        for key, item in value.items():
            with at(key):
                walked[key] = _walk(item, values)
        return walked
    if isinstance(value, list):
        items = []
        for index, item in enumerate(value):
            with at(index):
                items.append(_walk(item, values))
        return items
    return _look_up(value, values) if is_reference(value) else value


def _look_up(text: str, values: Mapping[str, Any]) -> Any:
    match = _REFERENCE.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"{text!r} is no reference: write {text.partition('.')[0]}.NAME, or NAME with one "
            "number to multiply (*), divide (/), add (+) or subtract (-).",
            keys=(),
        )
    section, name, sign, number = match.groups()
    known = values.get(section) or {}
    if name not in known:
        raise unknown_name(f"value in {section}:", name, sorted(known), keys=())
    found = known[name]
    if sign is None:
        return found
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(f"{text!r} reckons with {found!r}, which is no number.", keys=())
    if sign == "/" and float(number) == 0:
        raise UserError(f"{text!r} divides by zero.", keys=())
    return _OPERATIONS[sign](found, float(number))
