"""Tables that the documents take from the code when the site is built."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from typing import Any

from ekd_ray import config as configs
from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.settings import Settings, limits_in_words, words_of
from ekd_ray.losses import METHODS, resolve_method

_MARK = re.compile(r"<!-- (settings|methods): (\w+) -->")
_EPOCHS = 240


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a table where a page asks for it: of a configuration class, or of the methods."""

    def table(match: re.Match[str]) -> str:
        kind, name = match.groups()
        return settings_table(getattr(configs, name)) if kind == "settings" else _TABLES[name]()

    return _MARK.sub(table, markdown)


def settings_table(kind: type[Settings]) -> str:
    """One row a setting: name, type, default, what a resume may do, what it is and its bounds."""
    fields, hints = kind.fields(), typing.get_type_hints(kind)
    rows = ["| setting | type | default | effect | |", "|---|---|---|---|---|"]
    for field in fields:
        default = "" if dataclasses.is_dataclass(field.default) else f"`{field.default}`"
        words = [field.metadata["doc"], *limits_in_words(field)]
        text = "; ".join(words).replace("|", "\\|")
        effect = field.metadata["effect"]
        cells = (f"`{field.name}`", _kind(hints[field.name]), default, effect, text)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _kind(hint: Any) -> str:
    if words_of(hint):  # `int | Literal["auto"]`
        return " or ".join([typing.get_args(hint)[0].__name__, *words_of(hint)])
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    short = name.replace(" | None", "").replace("typing.", "")
    return short.replace("|", "\\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*header], *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def terms_table() -> str:
    """One row a weight: the terms that it multiplies, what ramps it up, and the methods."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, method in METHODS.items():
        for term in method.terms:
            ramp = f"`{term.warmup}`" if term.warmup else ""
            rows.setdefault((_code(term.names), f"`{term.weight}`", ramp), []).append(name)
    return _table(
        ("terms", "weight", "ramp", "methods"),
        ((*key, _code(users)) for key, users in rows.items()),
    )


def method_settings_table() -> str:
    """One row a setting: what it is, its bounds and the methods that read it."""
    return _table(
        ("setting", "", "methods"),
        (
            (
                f"`{name}`",
                "; ".join([entry.doc, *limits_in_words(entry.field())]),
                _code(key for key, method in METHODS.items() if name in method.setting_names),
            )
            for name, entry in REGISTRY.items()
        ),
    )


def defaults_table() -> str:
    """The settings that a method fills in, for a run of 240 epochs."""

    def cells(name: str) -> Iterable[str]:
        for method, entry in METHODS.items():
            config = resolve_method(DistillConfig(method=method, epochs=_EPOCHS))
            value = getattr(config, name) if name in entry.setting_names else ""
            yield "unset" if value is None else f"{value:g}" if value != "" else ""

    filled = [name for name, entry in REGISTRY.items() if entry.unset is None]
    return _table(
        ("default", *(f"`{name}`" for name in METHODS)),
        ((f"`{name}`", *cells(name)) for name in filled),
    )


def ranges_table() -> str:
    """The ranges that a search tries, a method a row."""

    def text(spec: dict[str, Any]) -> str:
        if "choices" in spec:
            return " or ".join(f"`{choice}`" for choice in spec["choices"])
        notes = ["log"] if spec.get("log") else []
        notes += [f"step {spec['step']:g}"] if "step" in spec else []
        notes += ["or around the known prior"] if "around_prior" in spec else []
        return f"{spec['low']:g} to {spec['high']:g}" + (f" ({', '.join(notes)})" if notes else "")

    return _table(
        ("method", "searched"),
        (
            (f"`{name}`", ", ".join(f"`{key}` {text(spec)}" for key, spec in method.space.items()))
            for name, method in METHODS.items()
            if method.space
        ),
    )


_TABLES = {
    "terms": terms_table,
    "settings": method_settings_table,
    "defaults": defaults_table,
    "ranges": ranges_table,
}
