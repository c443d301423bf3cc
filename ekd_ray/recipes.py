"""Recipes: partial `StudyConfig`s in YAML, sharing bases through `extends:`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, load_yaml
from ekd_ray.errors import UserError, unknown_name

_EXTRA_KEYS = ("extends", "description")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's values with its bases merged in; keys are those of `StudyConfig`.

    `extends:` names a file relative to the recipe. Mappings merge key by key, other
    values replace, and a key set to null under `space:` is removed.

    Raises:
        UserError: unreadable or malformed YAML, an unknown key, or a cycle of `extends`.
    """
    values = _merged(Path(path), seen=())
    for section in ("distill", "space", "authors", "teacher_training"):
        if not isinstance(values.get(section), Mapping | None):
            raise UserError(f"{path}: {section} must be a mapping, got {values[section]!r}.")
    points = values.get("first_points") or []
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        raise UserError(f"{path}: first_points must be a list of mappings, got {points!r}.")
    space = values.get("space") or {}
    if space:
        values["space"] = {name: spec for name, spec in space.items() if spec is not None}
    return values


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


def find_recipe(folder: Path, dataset: str, pair: str) -> Path:
    """`<folder>/<dataset>/<pair>.yaml`; raises `UserError` listing the pairs there are."""
    home = folder / dataset
    known = sorted(path.stem for path in home.glob("*.yaml") if not path.stem.startswith("_"))
    if not known:
        datasets = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise unknown_name(f"dataset with recipes in {folder}:", dataset, datasets)
    if pair not in known:
        raise unknown_name(f"pair for {dataset}", pair, known)
    return home / f"{pair}.yaml"


_EPOCH_SETTINGS = ("ekd_warmup", "prior_kl_warmup", "lr_warmup")


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
