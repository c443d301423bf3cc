"""All settings by subject, for the help and the documents: the most used first."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import Field, dataclass
from typing import Any

from ekd_ray.config.distill_config import DistillConfig
from ekd_ray.config.settings import Settings, hints_of, limits_in_words, words_of
from ekd_ray.config.study_config import StudyConfig

MOST_USED: dict[type[Settings], tuple[str, ...]] = {
    DistillConfig: (
        "dataset", "teacher", "teacher_weights", "student", "method", "epochs", "batch_size", "lr",
        "train_subset", "seed",
    ),
    StudyConfig: (
        "trials", "budget_hours", "metric", "objectives", "constraints", "confirm_seeds",
        "confirm_top_k", "gpus_per_trial",
    ),
}  # fmt: skip
# Of each subject the setting that is declared first: those after it belong to it.
_SUBJECTS: dict[type[Settings], dict[str, str]] = {
    DistillConfig: {
        "plugins": "data", "student": "models", "method": "method", "epochs": "solver",
        "precision": "numerics",
    },
    StudyConfig: {
        "distill": "what is tried and compared", "trials": "search", "confirm_top_k": "confirm",
        "teacher_fill": "places and resources",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """A setting in words: `doc` ends with its bounds, `default` is empty where it has none."""

    name: str
    kind: str
    default: str
    effect: str
    doc: str


def list_settings(cls: type[Settings]) -> dict[str, list[SettingRow]]:
    """Every setting of a configuration once, by subject in order of declaration; `most used` is
    the first subject."""
    used = MOST_USED[cls]
    found: dict[str, list[SettingRow]] = {"most used": []}
    fields = {field.name: field for field in cls.fields()}
    subject = ""
    for name, field in fields.items():
        subject = _SUBJECTS[cls].get(name, subject)
        if name not in used:
            found.setdefault(subject, []).append(_describe(cls, field))
    found["most used"] = [_describe(cls, fields[name]) for name in used]
    return found


def default_text(field: Field[Any]) -> str:
    """A setting's default in words; empty where it is None, nothing, or settings of their own."""
    default = field.default
    if default is None or default == () or dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _describe(cls: type[Settings], field: Field[Any]) -> SettingRow:
    return SettingRow(
        name=field.name,
        kind=_kind(hints_of(cls)[field.name]),
        default=default_text(field),
        effect=field.metadata["effect"],
        doc="; ".join([field.metadata["doc"], *limits_in_words(field)]),
    )


def _kind(hint: Any) -> str:
    """The type of a setting, without None: `int or auto`, `tuple[str, ...]`."""
    if words := words_of(hint):
        return " or ".join([typing.get_args(hint)[0].__name__, *words])
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return name.replace(" | None", "").replace("typing.", "")
