"""YAML as settings are written in it, and the line of a file on which a value stands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ekd_ray.errors import Keys, UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `5e-4` as a number (YAML 1.2) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
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


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML text; a syntax error becomes one sentence with `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{where}{line}: {problem}; correct the YAML there.") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: no legal YAML value ({reason}); correct it.") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a file, with one-sentence errors."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}.") from None
    values = parse_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a YAML mapping, got {type(values).__name__}.")
    return values


@contextlib.contextmanager
def in_file(path: str | Path, *root: str) -> Iterator[None]:
    """What is read inside stands in the file, under `root`: an error says on which line."""
    try:
        yield
    except UserError as error:
        keys = None if error.keys is None else (*root, *error.keys)
        raise UserError(f"{place_in(path, keys)}: {error}") from None


def place_in(path: str | Path, keys: Keys | None) -> str:
    """`FILE:LINE` of the key to which `keys` lead, or of the last one on the way that is there.

    `FILE` alone without such a key. Composes the file anew, so that reading it when all is
    well keeps no account of lines.
    """
    loader = _Loader(Path(path).read_text(encoding="utf-8"))
    node, line = loader.get_single_node(), None
    for key in keys or ():
        found = _child(loader, node, key)
        if found is None:
            break
        line, node = found
    return str(path) if line is None else f"{path}:{line}"


def _child(loader: _Loader, node: Any, key: str | int) -> tuple[int, Any] | None:
    """The line of a mapping's key, or of a list's item, and the node that it leads to."""
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # puts what `<<` brings in before the mapping's own
        for key_node, value in reversed(node.value):
            if loader.construct_object(key_node, deep=True) == key:
                return key_node.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line + 1, node.value[key]
    return None
