"""A recipe's values for another number of epochs, for the user's batch and for the data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import REGISTRY, load
from ekd_ray.config.phrases import several
from ekd_ray.config.settings import MOST_EPOCHS
from ekd_ray.config.targets import LEAST_HELD_OUT
from ekd_ray.errors import UserError, error_context, shorten, unknown_name


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of `fit:`, all numbers of which are whole and at least 1."""

    @classmethod
    def parse(cls, name: str, value: Any) -> Self:
        """The rule for a setting as a recipe has it; raises `UserError`."""
        names = [entry.name for entry in fields(cls)]
        legal = isinstance(value, Mapping) and {*value} == {*names}
        if not legal or not all(type(n) is int and 1 <= n <= 10**9 for n in value.values()):
            known = f"{', '.join(names)}, each a whole number >= 1" if names else "written {}"
            raise UserError(f"fit.{name} must be {known}, got {shorten(value)}.", keys=(name,))
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class Share(Rule):
    """Hold out a fifth of the pictures; where that is below 100, 100 or, if less, a third."""


@dataclass(frozen=True, kw_only=True)
class Steps(Rule):
    """As many epochs, `low` to `high`, as make so many steps."""

    steps: int
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Batch(Rule):
    """The rate is that of this batch size: with another one it is scaled."""

    batch_size: int


RULES: dict[str, type[Rule]] = {"validation_fraction": Share, "epochs": Steps, "lr": Batch}
# Of the learning rate with the batch: the noise of SGD's step, and of Adam's, is kept.
_POWERS = {"sgd": (1.0, "linear"), "adamw": (0.5, "square-root")}


def check_rules(rules: Any) -> None:
    """Raise `UserError` unless a mapping names settings that can be fitted, and their rules."""
    if not isinstance(rules, Mapping):
        raise UserError(f"fit must be a mapping of rules, got {shorten(rules)}.", keys=())
    for name, value in rules.items():
        if name not in RULES:
            raise unknown_name("rule in fit:", name, RULES, keys=(name,))
        if value is not None:
            RULES[name].parse(name, value)


def fit_values(
    values: Mapping[str, Any],
    rules: Mapping[str, Any],
    *,
    given: Collection[str],
    data_root: str | None,
) -> dict[str, Any]:
    """The values of a study with those that its recipe fits to data and batch.

    Args:
        rules: setting -> its rule, of `RULES`.
        given: settings that the user has named, which are left as they are.

    Returns:
        The values; `distill.fitted` says what was done.

    Raises:
        UserError: illegal settings, or no such data.
    """
    # Loads torch, and most recipes fit nothing.
    from ekd_ray.data import (
        dataset_info,
        fitted_held_out,
        held_out_size,
        steps_per_epoch,
    )
    from ekd_ray.engine.resolve import count_kept

    wanted = {name: RULES[name].parse(name, rule) for name, rule in rules.items()
              if name not in given}  # fmt: skip
    result = {**values}
    said: list[str] = []
    with error_context("distill"):
        base = DistillConfig.from_dict({**(values.get("distill") or {})})
    total = base.train_subset or count_kept(base, data_root)
    held = held_out_size(total, base.validation_fraction)
    if "validation_fraction" in wanted:
        classes = dataset_info(base.dataset, data_root=data_root).num_classes
        held = fitted_held_out(total, classes)
        result["distill"] = {**result["distill"], "validation_fraction": held / total}
        said.append(
            f"{held} of {several(total, 'picture')} validate: {_why_held(held, total, classes)}"
        )
    rule = wanted.get("epochs")
    if isinstance(rule, Steps):
        steps = steps_per_epoch(total - held, base.batch_size)
        epochs = min(max(round(rule.steps / steps), rule.low), rule.high)
        result = with_epochs(result, epochs)
        said.append(
            f"{several(epochs, 'epoch')} of {several(steps, 'step')}: the recipe aims at "
            f"{rule.steps:,} steps within {rule.low} to {rule.high} epochs"
        )
    rule = wanted.get("lr")
    fixed = "batch_size" not in (result.get("space") or {})
    if isinstance(rule, Batch) and fixed and base.batch_size != rule.batch_size:
        power, word = _POWERS[base.optimizer]
        result = _with_rate(result, (base.batch_size / rule.batch_size) ** power)
        said.append(
            f"lr {result['distill']['lr']:g} for batch {base.batch_size}: the recipe's "
            f"{base.lr:g} at {rule.batch_size} by the {word} rule of {base.optimizer}"
        )
    result["distill"] = {**result["distill"], "fitted": said}
    return result


def _why_held(held: int, total: int, classes: int) -> str:
    """The part of the rule that decides how many pictures validate."""
    fifth = round(total / 5)
    if held == fifth:
        return "20 %"
    if held == classes:
        return "one of each class"
    less = f"because 20 % would be {fifth}"
    if held == LEAST_HELD_OUT:
        return f"the least that there should be, {less}"
    return f"a third, {less}, fewer than {LEAST_HELD_OUT}"


def _with_rate(values: dict[str, Any], factor: float) -> dict[str, Any]:
    """The values with every learning rate, and its range, times a factor."""
    base = DistillConfig.from_dict(values["distill"])
    # Rounded: 0.02 * 0.7071 has no meaning in its tenth digit.
    scaled = {name: _round(getattr(base, name) * factor) for name in ("lr", "lr_min")}
    result = {**values, "distill": {**values["distill"], **scaled}}
    spec = (values.get("space") or {}).get("lr")
    if isinstance(spec, Mapping) and "low" in spec:
        ends: dict[str, Any] = {end: _round(spec[end] * factor) for end in ("low", "high")}
        prior = spec.get("prior")
        if isinstance(prior, Mapping) and isinstance(center := prior.get("center"), int | float):
            ends["prior"] = {**prior, "center": _round(center * factor)}
        result["space"] = {**values["space"], "lr": {**spec, **ends}}
    return result


def _round(rate: float) -> float:
    """To four significant digits."""
    return round(rate, 3 - math.floor(math.log10(rate))) if rate > 0 else rate


def with_epochs(values: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The recipe under another budget: `distill.epochs` and, in proportion, every warm-up.

    The authors' 30 warm-up epochs of 240 become 1 of 8; a warm-up of at least one epoch
    stays at least one. Ranges of the space scale likewise.
    """
    distill = dict(values.get("distill") or {})
    with error_context("distill"):
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
        plain = all(isinstance(item, int | float | str | None) for item in value)
        return list(dict.fromkeys(_scale(item, factor) for item in value)) if plain else value
    legal = isinstance(value, int | float) and 0 < value <= MOST_EPOCHS
    if isinstance(value, bool) or not legal:
        return value
    return max(1, round(value * factor))
