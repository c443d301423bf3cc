"""Pages and cards from the jinja2 templates in `templates/`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ekd_ray.errors import spell_controls


def render(
    template: str, *, autoescape: bool, filters: Mapping[str, Callable[..., Any]], **values: Any
) -> str:
    """Fill in a template.

    Args:
        autoescape: whether the signs of HTML are escaped in values.
        filters: functions by the names that the template calls them.

    Raises:
        jinja2.UndefinedError: the template uses a value that was not given.
    """
    environment = Environment(
        loader=PackageLoader("ekd_ray.results"), autoescape=autoescape,
        finalize=_spell_foreign, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= filters
    return environment.get_template(template).render(values)


def keep_flags(text: str) -> Markup:
    """Text as HTML in which no flag is broken at the end of a line: `--seeds` stays whole."""
    escaped = str(escape(spell_controls(text)))
    return Markup(re.sub(r"(--[a-z][a-z-]*)", r'<span class="flag">\1</span>', escaped))


def _spell_foreign(value: Any) -> Any:
    """The value without signs that a terminal or a browser would obey; markup of ours is ours."""
    foreign = isinstance(value, str) and not hasattr(value, "__html__")
    return spell_controls(value) if foreign else value
