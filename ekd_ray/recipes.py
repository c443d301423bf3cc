"""Recipes: partial `StudyConfig`s in YAML, sharing bases through `extends:`.

A recipe is written for one method (`distill.method`); under `methods:` it may say what
changes for others, which `--method` chooses: `select_method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, load_yaml
from ekd_ray.errors import UserError, unknown_name

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
    values = _merged(Path(path), seen=())
    _check_sections(values, str(path))
    for name, changes in (values.get("methods") or {}).items():
        if not isinstance(changes, Mapping):
            raise UserError(f"{path}: methods.{name} must be a mapping, got {changes!r}.")
        for key in changes:
            if key not in StudyConfig.names():
                raise unknown_name(f"key in methods.{name} of {path}:", key, StudyConfig.names())
        _check_sections(changes, f"{path}: methods.{name}")
    values = select_method(values, method)
    space = values.get("space") or {}
    if space:
        values["space"] = {name: spec for name, spec in space.items() if spec is not None}
    return values


def _check_sections(values: Mapping[str, Any], where: str) -> None:
    for section in _SECTIONS:
        if not isinstance(values.get(section), Mapping | None):
            raise UserError(f"{where}: {section} must be a mapping, got {values[section]!r}.")
    points = values.get("first_points") or []
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(f"{where}: first_points must be a list of mappings, got {points!r}.")


def select_method(values: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """The values of a study under `method`, with the `methods:` table taken out.

    `method` is a key of `methods:` or a name of `METHODS`; None, and the recipe's own
    method, leave the rest as it is. Under another one the method settings of the recipe,
    their ranges, its first points and its authors' values go, and those of the table's
    entry come. An entry that searches `method` itself starts from the authors' values of
    each of its choices.

    Raises:
        UserError: an unknown method.
    """
    rest = {key: value for key, value in values.items() if key != "methods"}
    table = values.get("methods") or {}
    distill = rest.get("distill") or {}
    if method is None or method == distill.get("method", DistillConfig().method):
        return rest
    # Late: --help and a recipe's own method need no torch.
    from ekd_ray.losses.methods import METHOD_SETTINGS, METHODS

    if not isinstance(method, str) or method not in {*METHODS, *table}:
        raise unknown_name("method", method, [*METHODS, *(k for k in table if k not in METHODS)])
    changes = table.get(method) or {}
    space = rest.get("space") or {}
    stripped = {
        **rest,
        "distill": {k: v for k, v in distill.items() if k not in METHOD_SETTINGS},
        "space": {k: v for k, v in space.items() if k not in METHOD_SETTINGS and k != "method"},
        "authors": None,
        "first_points": [],
    }
    own = {} if (changes.get("distill") or {}).get("method") else {"distill": {"method": method}}
    result = merge(merge(stripped, changes), own)
    searched = ((changes.get("space") or {}).get("method") or {}).get("choices") or ()
    own_authors = {distill.get("method", DistillConfig().method): rest.get("authors")}
    points = [
        {"method": name, **((table.get(name) or {}).get("authors") or own_authors.get(name) or {})}
        for name in searched
    ]
    if points:
        result["authors"], *result["first_points"] = points
    return result


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(item) for item in (*seen, resolved))
        raise UserError(f"extends makes a circle: {chain}; remove one of the lines.")
    values = load_yaml(path)
    legal = (*_EXTRA_KEYS, *StudyConfig.names())
    for key in values:
        if key not in legal:
            raise unknown_name(f"key in {path}:", key, legal)
    base = values.pop("extends", None)
    values.pop("description", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must be a file name, got {base!r}.")
    return merge(_merged(path.parent / base, (*seen, resolved)), values)


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


_EPOCH_SETTINGS = ("ekd_warmup", "kd_warmup", "ctkd_warmup", "prior_kl_warmup", "lr_warmup")


def with_epochs(values: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The recipe under another budget: `distill.epochs` and, in proportion, every warm-up.

    The authors' 30 warm-up epochs of 240 become 1 of 8; a warm-up of at least one epoch
    stays at least one. Ranges of the space scale likewise.
    """
    distill = dict(values.get("distill") or {})
    before = DistillConfig(epochs=distill.get("epochs", DistillConfig().epochs)).epochs
    result = {**values, "distill": {**distill, "epochs": epochs}}
    if before == epochs:
        return result
    for section in ("distill", "authors", "space"):
        if isinstance(result.get(section), Mapping):
            result[section] = _scaled(result[section], epochs / before)
    points = result.get("first_points") or ()
    result["first_points"] = [_scaled(point, epochs / before) for point in points]
    return result


def _scaled(section: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        name: _scale(value, factor) if name in _EPOCH_SETTINGS else value
        for name, value in section.items()
    }


def _scale(value: Any, factor: float) -> Any:
    if isinstance(value, Mapping):
        return {k: item if k == "when" else _scale(item, factor) for k, item in value.items()}
    if isinstance(value, list):
        return list(dict.fromkeys(_scale(item, factor) for item in value))
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return value
    return max(1, round(value * factor))
