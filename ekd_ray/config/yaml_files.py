"""YAML as settings are written in it, with the line on which each value stands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ekd_ray.errors import Keys, UserError, shorten
from ekd_ray.files import read_text

Places = dict[Keys, str]  # the keys that lead to a value -> FILE:LINE


# What a text may hold, at most. Settings are a page or two; a study with thousands of first
# points has some ten thousand values.
MOST_BYTES = 2 * 2**20
MOST_VALUES = 50_000
MOST_DEPTH = 32
MOST_DIGITS = 200  # of a whole number, which then is within the range of a float


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema with `<<`, without duplicate keys and tags, bounded in depth and size.

    `on`, `no` and `1:30` are texts, `0o17` is a number. A reference counts as all that it stands
    for, so that a few lines cannot grow to billions of values.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark = event.start_mark
        if tag := getattr(event, "tag", None):
            raise _refused(f"a tag {shorten(tag)}, which settings do not need", mark)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _refused(f"nested deeper than {MOST_DEPTH}", mark)
        is_reference = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_reference and node not in self._sizes:
            raise _refused("a value that refers to itself", mark)
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        self._sizes[node] = 1 + sum(self._sizes[child] for child in children)
        if self._sizes[node] > MOST_VALUES:
            raise _refused(f"more than {MOST_VALUES} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":  # `<<`, of which there may be several
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refused("a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise _refused(f"duplicate key {shorten(key)}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise _refused(f"a number of more than {MOST_DIGITS} digits", node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"(?i)\.(inf|nan)$", r"\1", self.construct_scalar(node)))


def _refused(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_TAG = "tag:yaml.org,2002:"
_CORE = {  # of each type: the texts that are its values, and their first characters
    "null": (r"(~|null|Null|NULL|)$", [*"~nN", ""]),
    "bool": (r"(true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    "int": (r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", [*"-+0123456789"]),
    "float": (
        r"([-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        [*"-+0123456789."],
    ),
    "merge": (r"<<$", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in (*_CORE, "str", "seq", "map")
}
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
_Loader.add_constructor(_TAG + "float", _Loader.construct_float)


# libyaml's writes the same ten times faster, once for every trial of a search.
class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the texts that `_Loader`, or a reader of YAML 1.1, would take for another value."""


_Dumper.yaml_implicit_resolvers = {
    first: _Loader.yaml_implicit_resolvers.get(first, []) + pairs
    for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in the order of `values`; `parse_yaml` reads it back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class YamlFile:
    """A mapping read from a file, and the place (`FILE:LINE`) of each value in it."""

    path: Path
    values: dict[str, Any]
    places: Places

    @classmethod
    def read(cls, path: str | Path) -> YamlFile:
        """Raises `UserError`, one sentence with the line, unless the file holds a mapping."""
        text = read_text(path, most=MOST_BYTES, cure="name a YAML file")
        values, lines = _parse(text, where=str(path))
        if not isinstance(values, dict):
            got = "nothing" if values is None else f"a {type(values).__name__}"
            raise UserError(f"{path} must hold a YAML mapping (KEY: VALUE), got {got}.")
        places = {keys: f"{path}:{line}" for keys, line in lines.items()}
        return cls(path=Path(path), values=values, places=places)

    @contextlib.contextmanager
    def locate_errors(self, *root: str) -> Iterator[None]:
        """A `UserError` raised inside, about the values under `root`, names file and line."""
        try:
            yield
        except UserError as error:
            keys = () if error.keys is None else (*root, *error.keys)
            place = find_place(self.places, keys) or self.path
            raise UserError(f"{place}: {error}") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML text; a syntax error becomes one sentence with `where` and the line."""
    return _parse(text, where=where)[0]


def find_place(places: Mapping[Keys, str], keys: Keys) -> str | None:
    """The place of the value to which `keys` lead, or of the last one on the way to it."""
    ways = (keys[:count] for count in range(len(keys), 0, -1))
    return next((places[way] for way in ways if way in places), None)


def _parse(text: str, *, where: str) -> tuple[Any, dict[Keys, int]]:
    """The value of a text, and the line (from 1) of everything in it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), dict(_lines(loader, node, ()))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{where}{line}: {problem[:200]}; correct the YAML there.") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: no legal YAML value ({reason}); correct it.") from None


def _lines(loader: _Loader, node: yaml.Node, keys: Keys) -> Iterator[tuple[Keys, int]]:
    """The lines below a node that has been constructed, so that `<<` is merged into it."""
    children: list[tuple[Any, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(loader.construct_object(key), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    for key, marked, value in children:
        yield (*keys, key), marked.start_mark.line + 1
        yield from _lines(loader, value, (*keys, key))
