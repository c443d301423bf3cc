"""What the documents take from the code when the site is built: the tables of settings."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from ekd_ray import config as configs
from ekd_ray.config.settings import limits_in_words

_MARK = re.compile(r"<!-- settings: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of a configuration class where a page asks for it."""
    return _MARK.sub(lambda match: settings_table(getattr(configs, match[1])), markdown)


def settings_table(kind: type) -> str:
    """One row a setting: name, type, default, what it is and its bounds."""
    hints = typing.get_type_hints(kind)
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        default = "" if dataclasses.is_dataclass(field.default) else f"`{field.default}`"
        words = [field.metadata["doc"], *limits_in_words(field)]
        text = "; ".join(words).replace("|", "\\|")
        rows.append(f"| `{field.name}` | {_kind(hints[field.name])} | {default} | {text} |")
    return "\n".join(rows)


def _kind(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    short = name.replace(" | None", "").replace("typing.", "")
    return short.replace("|", "\\|")
