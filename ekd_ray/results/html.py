"""Small tables for notebooks, which show an object by its `_repr_html_`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from ekd_ray.errors import spell_controls
from ekd_ray.results.words import value_text


def facts_html(title: str, facts: Mapping[str, Any]) -> str:
    """A heading and a table of names and values; all text is escaped."""
    return f"<h4>{_escape(title)}</h4>" + table_html((), facts.items())


def table_html(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; all text is escaped."""
    head = "".join(f"<th>{_escape(name)}</th>" for name in columns)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{_escape(value_text(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _escape(text: str) -> str:
    return html.escape(spell_controls(text))
