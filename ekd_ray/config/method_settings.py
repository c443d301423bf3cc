"""Settings that distillation methods bring to `DistillConfig`.

None stands here: a method declares its own, and `ekd_ray.losses.register_method` adds them
under their flat names (`dkd_beta`). `load` imports the modules that do so, once a setting is
asked for that is not known yet.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from ekd_ray.config.plugins import load_installed
from ekd_ray.config.settings import MOST_EPOCHS, setting

# The modules that register methods when they are imported. By name, because they load torch and
# stand above this one.
PROVIDERS = ["ekd_ray.losses"]
MOST = 10**6  # of a number for which a method declares no bound; weights are some ten


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSetting:
    """A setting as a method declares it.

    Attributes:
        name: the flat name, unique among all settings.
        kind: its type. One that allows None is None until the method that runs fills its default
            in, so that methods can share the setting and differ in the default.
        doc: what it is, in a few words.
        default: a value, or a function of the `DistillConfig`.
        search: the range that a search tries when the recipe has none of its own: an entry of
            a search space. None is not searched.
        low, high, above, choices: limits, as `ekd_ray.config.settings.setting` has them; a number
            without them is from -`MOST` to `MOST`, of epochs to `MOST_EPOCHS`.
        in_epochs: a number of epochs, which follows another budget in proportion.
        neutral: whether a configuration that leaves it unset has the fingerprint that it had
            before there was the setting.
    """

    name: str
    kind: Any
    doc: str
    default: Any = None
    search: Mapping[str, Any] | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None
    in_epochs: bool = False
    neutral: bool = True

    @property
    def unset(self) -> Any:
        """The value in a configuration that does not give it."""
        return None if type(None) in typing.get_args(self.kind) else self.default

    def field(self) -> Any:
        """The field of `DistillConfig`."""
        limits = {name: getattr(self, name) for name in ("low", "high", "above", "choices")}
        if not limits["choices"] and {int, float} & {self.kind, *typing.get_args(self.kind)}:
            if limits["low"] is None and limits["above"] is None:
                limits["low"] = -MOST
            if limits["high"] is None:
                limits["high"] = MOST_EPOCHS if self.in_epochs else MOST
        neutral = {"neutral": self.unset} if self.neutral else {}
        return setting(self.unset, self.doc, **limits, **neutral)

    def is_same_as(self, other: MethodSetting) -> bool:
        """Whether both are one field; default (where None stands for it) and range may differ."""
        fields = (self.field(), other.field())
        same = self.kind == other.kind and fields[0].default == fields[1].default
        return same and fields[0].metadata == fields[1].metadata


# By name, in the order of declaration; and the plugins that some come from.
REGISTRY: dict[str, MethodSetting] = {}
ORIGINS: dict[str, str] = {}


def load() -> None:
    """Import the modules that register methods."""
    for name in PROVIDERS:
        importlib.import_module(name)
    load_installed()
