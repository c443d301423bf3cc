"""Names of ensembles: `ensemble:NAME,NAME`, the architectures of their members."""

from __future__ import annotations

from collections.abc import Iterable

_PREFIX = "ensemble:"


def is_ensemble(model: str | None) -> bool:
    """Whether a model's name is that of several networks, whose answers are joined."""
    return str(model or "").startswith(_PREFIX)


def ensemble_name(members: Iterable[str]) -> str:
    """The name of the ensemble of these architectures, in their order."""
    return _PREFIX + ",".join(members)


def member_names(model: str) -> tuple[str, ...]:
    """The architectures of an ensemble; of any other model, its own name alone."""
    return tuple(model.removeprefix(_PREFIX).split(",")) if is_ensemble(model) else (model,)
