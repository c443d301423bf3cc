"""Recipes: partial `StudyConfig`s in YAML, sharing bases through `extends:`.

A recipe is written for one method (`distill.method`); under `methods:` it may say what
changes for others, which `--method` chooses: `select_method`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, load_yaml
from ekd_ray.config.method_settings import REGISTRY, load
from ekd_ray.config.yaml_files import in_file, place_in
from ekd_ray.errors import Keys, UserError, at, unknown_name

_EXTRA_KEYS = ("extends", "description", "methods")
_SECTIONS = ("distill", "space", "authors", "teacher_training", "methods")


def load_recipe(path: str | Path, method: str | None = None) -> dict[str, Any]:
    """A recipe's values with its bases merged in; keys are those of `StudyConfig`.

    `extends:` names a file relative to the recipe. Mappings merge key by key, other
    values replace, and a key set to null under `space:` is removed.

    Args:
        method: the recipe under this method instead of its own (see `select_method`).

    Raises:
        UserError: unreadable or malformed YAML, an unknown key, an unknown method, or a
            cycle of `extends`.
    """
    layers: list[dict[str, Any]] = []
    for file, layer in _chain(Path(path)):
        with in_file(file):
            _check_keys(layer)
        layers.append(layer)
    values = _merged(layers)
    try:
        _check_sections(values)
        for name, changes in (values.get("methods") or {}).items():
            with at("methods", name):
                _check_method(name, changes)
    except UserError as error:
        place = Origin(path=Path(path), values=values).place(error.keys)
        raise UserError(f"{place or path}: {error}") from None
    values = select_method(values, method)
    space = values.get("space") or {}
    if space:
        values["space"] = {name: spec for name, spec in space.items() if spec is not None}
    return values


def _check_keys(values: Mapping[str, Any]) -> None:
    legal = (*_EXTRA_KEYS, *StudyConfig.names())
    for key in values:
        if key not in legal:
            raise unknown_name("key", key, legal, keys=(key,))
    base = values.get("extends")
    if not isinstance(base, str | None):
        raise UserError(f"extends must be a file name, got {base!r}.", keys=("extends",))


def _check_method(name: str, changes: Any) -> None:
    if not isinstance(changes, Mapping):
        raise UserError(f"methods.{name} must be a mapping, got {changes!r}.", keys=())
    for key in changes:
        if key not in StudyConfig.names():
            raise unknown_name(f"key in methods.{name}:", key, StudyConfig.names(), keys=(key,))
    _check_sections(changes, f"methods.{name}.")


def _check_sections(values: Mapping[str, Any], inside: str = "") -> None:
    for section in _SECTIONS:
        got = values.get(section)
        if not isinstance(got, Mapping | None):
            raise UserError(f"{inside}{section} must be a mapping, got {got!r}.", keys=(section,))
    points = values.get("first_points") or []
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(
            f"{inside}first_points must be a list of mappings, got {points!r}.",
            keys=("first_points",),
        )


def select_method(values: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """The values of a study under `method`, with the `methods:` table taken out.

    `method` is a key of `methods:` or a name of `METHODS`; None, and the recipe's own
    method, leave the rest as it is. Under another one the method settings of the recipe,
    their ranges, its first points and its authors' values go. The ranges of a name of
    `METHODS` come (`Method.space`), and what the table's entry says is laid over them. An
    entry that searches `method` itself starts from the authors' values of each of its choices.

    Raises:
        UserError: an unknown method.
    """
    rest = {key: value for key, value in values.items() if key != "methods"}
    table = values.get("methods") or {}
    distill = rest.get("distill") or {}
    if method is None or method == _own_method(values):
        return rest
    # Late: --help and a recipe's own method need no torch.
    from ekd_ray.losses.methods import METHODS

    if not isinstance(method, str) or method not in {*METHODS, *table}:
        raise unknown_name("method", method, [*METHODS, *(k for k in table if k not in METHODS)])
    changes = table.get(method) or {}
    if method in METHODS:
        changes = merge({"space": METHODS[method].space}, changes)
    space = rest.get("space") or {}
    stripped = {
        **rest,
        "distill": {k: v for k, v in distill.items() if k not in REGISTRY},
        "space": {k: v for k, v in space.items() if k not in REGISTRY and k != "method"},
        "authors": None,
        "first_points": [],
    }
    own = {} if (changes.get("distill") or {}).get("method") else {"distill": {"method": method}}
    result = merge(merge(stripped, changes), own)
    searched = ((changes.get("space") or {}).get("method") or {}).get("choices") or ()
    own_authors = {_own_method(values): rest.get("authors")}
    points = [
        {"method": name, **((table.get(name) or {}).get("authors") or own_authors.get(name) or {})}
        for name in searched
    ]
    if points:
        result["authors"], *result["first_points"] = points
    return result


def _own_method(values: Mapping[str, Any]) -> Any:
    return (values.get("distill") or {}).get("method", DistillConfig().method)


def _chain(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A recipe and those that it extends, nearest first: each file and what is in it."""
    seen: list[Path] = []
    base: str | None = path.name
    path = path.parent
    while base is not None:
        path = path / base
        seen.append(path.resolve())
        if seen[-1] in seen[:-1]:
            chain = " -> ".join(map(str, seen))
            raise UserError(f"extends makes a circle: {chain}; remove one of the lines.")
        values = load_yaml(path)
        yield path, values
        path, base = path.parent, values.get("extends")


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The files of a chain, nearest first, as one; what a file says of itself goes."""
    values: Mapping[str, Any] = reduce(merge, reversed(layers))
    return {key: value for key, value in values.items() if key not in ("extends", "description")}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the values of a study were read, to tell the line of one that is refused.

    Attributes:
        values: what was handed on, with flags laid over it.
        method: the one that `select_method` was given.
        root: the key of the file under which they stand.
    """

    path: Path
    values: Mapping[str, Any]
    method: str | None = None
    root: tuple[str, ...] = ()

    @contextlib.contextmanager
    def lines(self) -> Iterator[None]:
        """The values are checked inside: an error says in which line of which file it is."""
        try:
            yield
        except UserError as error:
            place = self.place(error.keys)
            if place is None:
                raise
            raise UserError(f"{place}: {error}") from None

    def place(self, keys: Keys | None) -> str | None:
        """`FILE:LINE` of the value to which `keys` lead; None for one that no file has.

        Reads the files again: while all is well nobody keeps account of lines.
        """
        found, value = _follow(self.values, keys or ())
        # Of a section no more is known than that something in it is missing.
        if not found or len(found) == 1 < len(keys or ()):
            return None
        files = [(file, _follow(layer, self.root)[1]) for file, layer in _chain(self.path)]
        for written in self._written(found, _merged([layer for _, layer in files])):
            for file, layer in files:
                there, raw = _follow(layer, written)
                if there == written:
                    # A flag's value is in no file. As text, for NaN is not equal to itself.
                    same = repr(raw) == repr(value)
                    return place_in(file, (*self.root, *written)) if same else None
        return None

    def _written(self, keys: Keys, recipe: Mapping[str, Any]) -> tuple[Keys, ...]:
        """The keys in a file from which `select_method` takes `keys`, the ones that win first."""
        if self.method is None or self.method == _own_method(recipe):
            return (keys,)
        table = ("methods", self.method, *keys)
        if keys[0] not in ("authors", "first_points"):
            return table, keys
        # Where the method itself is searched, each point is one method's authors' values.
        depth = 1 if keys[0] == "authors" else 2
        point = _follow(self.values, keys[:depth])[1]
        name = point.get("method") if isinstance(point, Mapping) else None
        rest = keys[depth:]
        return table, ("methods", str(name), "authors", *rest), ("authors", *rest)


def _follow(values: Any, keys: Keys) -> tuple[Keys, Any]:
    """As many of the keys as lead somewhere, and what stands there."""
    for count, key in enumerate(keys):
        listed = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if not listed and not (isinstance(values, Mapping) and key in values):
            return keys[:count], values
        values = values[key]
    return keys, values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        # A range is one value: {choices: ...} must not merge with {low: ..., high: ...}.
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        mergeable = both and not _is_range(value)
        result[key] = merge(result[key], value) if mergeable else value
    return result


def _is_range(value: Mapping[str, Any]) -> bool:
    return "low" in value or "choices" in value


def known_pairs(folder: Path, home: str) -> list[str]:
    """The pairs with a recipe in `<folder>/<home>/`; raises `UserError` where there is none."""
    known = sorted(p.stem for p in (folder / home).glob("*.yaml") if not p.stem.startswith("_"))
    if not known:
        homes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise unknown_name(f"dataset with recipes in {folder}:", home, homes)
    return known


def find_recipe(folder: Path, home: str, pair: str) -> Path:
    """`<folder>/<home>/<pair>.yaml`; raises `UserError` listing the pairs there are."""
    known = known_pairs(folder, home)
    if pair not in known:
        raise unknown_name(f"pair for {home}", pair, known)
    return folder / home / f"{pair}.yaml"


def with_epochs(values: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The recipe under another budget: `distill.epochs` and, in proportion, every warm-up.

    The authors' 30 warm-up epochs of 240 become 1 of 8; a warm-up of at least one epoch
    stays at least one. Ranges of the space scale likewise.
    """
    distill = dict(values.get("distill") or {})
    with at("distill"):
        before = DistillConfig(epochs=distill.get("epochs", DistillConfig().epochs)).epochs
    result = {**values, "distill": {**distill, "epochs": epochs}}
    if before == epochs:
        return result
    load()
    in_epochs = {"lr_warmup", *(name for name, entry in REGISTRY.items() if entry.in_epochs)}

    def scaled(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: _scale(value, epochs / before) if name in in_epochs else value
            for name, value in section.items()
        }

    for section in ("distill", "authors", "space"):
        if isinstance(result.get(section), Mapping):
            result[section] = scaled(result[section])
    result["first_points"] = [scaled(point) for point in result.get("first_points") or ()]
    return result


def _scale(value: Any, factor: float) -> Any:
    if isinstance(value, Mapping):
        return {k: item if k == "when" else _scale(item, factor) for k, item in value.items()}
    if isinstance(value, list):
        return list(dict.fromkeys(_scale(item, factor) for item in value))
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return value
    return max(1, round(value * factor))
