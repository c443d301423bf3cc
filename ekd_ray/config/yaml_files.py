"""YAML as settings are written in it, with the line on which each value stands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ekd_ray.errors import Keys, UserError

Places = dict[Keys, str]  # the keys that lead to a value -> FILE:LINE


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `5e-4` as a number (YAML 1.2) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`, of which there may be several
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain word", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


# libyaml's writes the same ten times faster, once for every trial of a search.
class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the texts that `_Loader` would read as numbers, such as `1e5`."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


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
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"cannot read {path}: {reason}; name a YAML file.") from None
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
        raise UserError(f"{where}{line}: {problem}; correct the YAML there.") from None
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
