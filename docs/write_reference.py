"""The parts of the documents that are made from the code, written into their pages.

`python docs/write_reference.py` writes them anew. They stand between `<!-- made: KIND NAME -->` and
`<!-- end -->`; a test fails where the pages and the code differ.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ekd_ray import config as configs
from ekd_ray.cli.main import COMMANDS, all_parsers, command_parser
from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import ORIGINS, REGISTRY, MethodSetting
from ekd_ray.config.setting_list import list_settings
from ekd_ray.config.settings import limits_in_words
from ekd_ray.losses import METHODS, resolve_method

DOCS = Path(__file__).parent
PAGES = ("methods.md", "reference/commands.md", "reference/python.md", "reference/settings.md")
_PART = re.compile(r"(<!-- made: (\w+)(?: ([\w.]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_EPOCHS = 240
_SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Attributes": "Has",
             "Example": "Example"}  # fmt: skip


def fill_page(text: str) -> str:
    """A page with its parts as the code has them now."""

    def part(match: re.Match[str]) -> str:
        head, kind, name, end = match.groups()
        return f"{head}\n{_PARTS[kind](*([name] if name else []))}\n\n{end}"

    return _PART.sub(part, text)


def write_pages() -> None:
    """Write every page anew."""
    for name in PAGES:
        page = DOCS / name
        page.write_text(fill_page(page.read_text(encoding="utf-8")), encoding="utf-8")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*header], *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Settings


def settings_tables(name: str) -> str:
    """A table a subject, one row a setting: type, default, effect, what it is and its bounds."""
    parts = []
    for subject, rows in list_settings(getattr(configs, name)).items():
        cells = (
            (f"`{row.name}`", row.kind, f"`{row.default}`" if row.default else "", row.effect,
             row.doc)
            for row in rows
            if row.name not in ORIGINS
        )  # fmt: skip
        header = ("setting", "type", "default", "effect", "")
        parts.append(f"### {subject.capitalize()}\n\n{_table(header, cells)}")
    return "\n\n".join(parts)


# Commands


def flags_tables() -> str:
    """A table a command, one row a flag."""
    parts = []
    for name in COMMANDS:
        for parser in all_parsers(command_parser(name)):
            rows = [
                (_flag_text(action), (action.help or "").replace("%%", "%"))
                for group in parser._action_groups
                if group.title != "help"
                for action in group._group_actions
                if not isinstance(action, argparse._SubParsersAction)
            ]
            text = f"### {parser.prog}\n\n{parser.description or ''}".rstrip()
            if parser.epilog:
                text += f"\n\n{parser.epilog}"
            if parser.examples:
                text += "\n\n```\n" + "\n".join(parser.examples) + "\n```"
            parts.append(text + (f"\n\n{_table(('flag', ''), rows)}" if rows else ""))
    return "\n\n".join(parts)


def _flag_text(action: argparse.Action) -> str:
    metavar = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{metavar}`"
    value = "" if action.nargs == 0 else f" {metavar}"
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


# Methods


def terms_table() -> str:
    """One row a weight: the terms that it multiplies, what ramps it up or down, and the methods."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, method in METHODS.items():
        for term in method.terms:
            ramp = _code(name for name in (term.warmup, term.decay) if name)
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
            for name, entry in _own_settings().items()
        ),
    )


def _own_settings() -> dict[str, MethodSetting]:
    """The settings of the methods without those of plugins, which a process may have loaded."""
    return {name: entry for name, entry in REGISTRY.items() if name not in ORIGINS}


def defaults_table() -> str:
    """The settings that a method fills in, for a run of 240 epochs."""

    def cells(name: str) -> Iterable[str]:
        for method, entry in METHODS.items():
            config = resolve_method(DistillConfig(method=method, epochs=_EPOCHS))
            value = getattr(config, name) if name in entry.setting_names else ""
            yield "unset" if value is None else f"{value:g}" if value != "" else ""

    filled = [name for name, entry in _own_settings().items() if entry.unset is None]
    return _table(
        ("default", *(f"`{name}`" for name in METHODS)),
        ((f"`{name}`", *cells(name)) for name in filled),
    )


def ranges_table() -> str:
    """The ranges that a search tries, a method a row."""

    def text(spec: Mapping[str, Any]) -> str:
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


# Python


def describe_name(path: str) -> str:
    """A function or class with its signature and its docstring; of a class its members, too."""
    module, _, name = path.rpartition(".")
    value = getattr(__import__(module, fromlist=[name]), name)
    if inspect.ismodule(value):
        found = [(key, getattr(value, key)) for key in _own_names(value)]
        return "\n\n".join(_describe(key, member, "###") for key, member in found)
    return _describe(name, value, "###")


def _own_names(module: Any) -> list[str]:
    return [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]  # fmt: skip


def _describe(name: str, value: Any, head: str) -> str:
    text = f"{head} {name}\n\n"
    if inspect.isroutine(value) or (inspect.isclass(value) and "__init__" in vars(value)):
        text += f"```python\n{_signature(name, value)}\n```\n\n"
    text += _docstring(value)
    if inspect.isclass(value):
        for member in _members(value):
            found = inspect.getattr_static(value, member)
            plain = getattr(found, "__func__", getattr(found, "fget", found))
            plain = getattr(plain, "func", plain)  # a cached_property
            text += "\n\n" + _describe(f"{name}.{member}", plain, f"{head}#")
    return text.rstrip()


def _members(cls: type) -> list[str]:
    """Public methods and properties, those of its bases in ekd_ray included."""
    kinds = ("function", "method", "property", "cached_property", "classmethod", "staticmethod")
    found = {}
    for base in reversed([c for c in cls.__mro__ if c.__module__.startswith("ekd_ray")]):
        found |= {n: v for n, v in vars(base).items() if not n.startswith("_")}
    return [n for n, v in found.items() if type(v).__name__ in kinds and inspect.getdoc(v)]


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    returns = "" if isinstance(value, type) else _return_text(signature)
    short = name.rpartition(".")[2]
    lines, star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        lines.append(str(parameter).replace("'", ""))  # annotations are texts
    if len(one := f"{short}({', '.join(lines)}){returns}") <= 96:
        return one
    return f"{short}(\n" + "".join(f"    {line},\n" for line in lines) + f"){returns}"


def _return_text(signature: inspect.Signature) -> str:
    found = signature.return_annotation
    if found in (inspect.Signature.empty, "None", None):
        return ""
    return f" -> {found if isinstance(found, str) else inspect.formatannotation(found)}"


def _docstring(value: Any) -> str:
    """A docstring in Markdown: each of its sections a list."""
    lines = (inspect.getdoc(value) or "").splitlines()
    text, section = [], ""
    block: list[str] = []

    def close() -> None:
        body = textwrap.dedent("\n".join(block)).strip()
        if section == "Example":
            code = re.sub(" *# doctest: .SKIP", "", body)
            text.append(f"```python\n{code}\n```")
        elif section:
            entries = re.split(r"\n(?=\S)", body)
            text.append("\n".join(f"- {_entry(' '.join(e.split()))}" for e in entries))
        elif body:
            text.append(body)
        block.clear()

    for line in lines:
        if (name := line.removesuffix(":")) in _SECTIONS and line.endswith(":"):
            close()
            section = name
            text.append(f"**{_SECTIONS[name]}**")
        elif section and line and not line.startswith(" "):
            close()
            section = ""
            block.append(line)
        else:
            block.append(line)
    close()
    return "\n\n".join(text)


def _entry(text: str) -> str:
    name, colon, rest = text.partition(": ")
    plain = colon and re.fullmatch(r"[\w*, ]+", name) and len(name) < 60
    return f"{_code(name.split(', '))}: {rest}" if plain else text


_PARTS: dict[str, Callable[..., str]] = {
    "settings": settings_tables,
    "flags": flags_tables,
    "terms": terms_table,
    "method_settings": method_settings_table,
    "defaults": defaults_table,
    "ranges": ranges_table,
    "name": describe_name,
}

if __name__ == "__main__":
    write_pages()
