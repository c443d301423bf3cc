"""The registry of methods: what each is made of, which settings it has, and what it needs.

A new method is one file beside this one: its functions, and its entry (`register_method`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.arguments import checks_arguments
from ekd_ray.config.method_settings import REGISTRY, MethodSetting
from ekd_ray.config.phrases import joined
from ekd_ray.config.plugins import registers
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.losses.inputs import Scalar
from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


class MethodValues:
    """A method's settings as attributes, of a kind that `torch.compile` traces."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values[name]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Logits of student and teacher on a batch, and how they are to be read.

    Attributes:
        student, teacher: logits [B, C]; the teacher's are None for a method without one.
        target: [B] int64 class indices, in a mix of pictures that of the larger part.
        shares: [B, C], the classes' shares in each picture where some are mixed, else None.
        student_strong, teacher_strong: [B, C], or None for a method of one view.
        views: student, teacher and target of all views as one batch, [B, C] or [2 B, C]: one
            large operation costs a GPU less than two small ones.
        student_features, teacher_features: what the method's `features` gave on the weak view, [B,
            ...] of at least float32 each, in their order; the teacher's without gradient.
        class_cosines: [C, C], the cosines between the rows of the teacher's classifier, without
            gradient, of at least float32; None for a method that does not read them.
        log_concentration: the student's on `views` at T = 1, which several terms of an
            evidential method read; None for a softmax method.
        label_smoothing: share of each label that the cross-entropy spreads over all classes; None
            for none.
        temperature: the setting, or the learned one (0-d).
        statistics: keyword arguments of the losses: `standardize` of a softmax method,
            `log_prior` and `teacher_log_prior` (0-d, log of the prior mass per class) of an
            evidential one.
        settings: the method's settings by name. Real numbers are 0-d tensors, so that one
            compiled step serves all of their values; but a 1 stays a number, because nothing need
            be multiplied with it.
        method: the entry that is run.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    shares: Tensor | None
    student_strong: Tensor
    teacher_strong: Tensor
    student_features: tuple[Tensor, ...]
    teacher_features: tuple[Tensor, ...]
    class_cosines: Tensor
    views: tuple[Tensor, Tensor, Tensor]
    log_concentration: Tensor
    label_smoothing: Scalar | None
    temperature: Scalar
    statistics: Mapping[str, Any]
    settings: MethodValues
    method: Method

    def sum_over_views(self, mean: Tensor) -> Tensor:
        """The sum of the views' means, from the mean over the batch of all of them."""
        return 2 * mean if self.method.strong_view else mean

    def softened_target(self) -> Tensor:
        """The target of the cross-entropy: that of `views` [..], or the shares of the classes
        [.., C] where pictures are mixed or labels smoothed."""
        student, _, target = self.views
        if self.label_smoothing is None:
            return target if self.shares is None else self.shares
        shares = self.shares
        if shares is None:
            shares = torch.nn.functional.one_hot(target, student.shape[1]).to(student)
        return shares + self.label_smoothing * (1 / student.shape[1] - shares)


@dataclass(frozen=True, kw_only=True)
class Term:
    """Parts of a loss that share a weight.

    Attributes:
        names: of the parts, as logs show them.
        weight: the setting that they are multiplied with.
        warmup: the setting with the epochs over which the weight ramps up.
        decay: the setting with the epoch after which the weight falls, to 0 in the last epoch.
        loss: their unweighted values by name, 0-d.
        is_divergence: whether it is 0 where the student says what the teacher says, and nowhere
            less. The conformance suite (`ekd_ray.testing`) holds it to that.
        couples_samples: whether it compares the samples of a batch with each other, and so is no
            mean over them.
    """

    names: tuple[str, ...]
    weight: str
    loss: Callable[[Outputs], Mapping[str, Tensor]]
    warmup: str | None = None
    decay: str | None = None
    is_divergence: bool = False
    couples_samples: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """One distillation method.

    Attributes:
        settings: the settings that it reads; any other method's is refused.
        terms: what its loss is the weighted sum of.
        doc: a line on it for lists, with its paper.
        needs_teacher: whether it compares student and teacher.
        strong_view: whether it looks at a second, strong view of every image.
        features: layers whose outputs it compares, by their dotted names in student and teacher:
            one name for both, or a pair (student's, teacher's). The teacher is asked in every
            step then, because its cache holds logits only, and nothing is compiled.
        class_cosines: whether it reads how alike the teacher's classifier has the classes.
        evidential: whether logits are read as Dirichlet distributions (`evidential`).
        learned_temperature: the temperature (0-d) of a method that learns it, from the learned
            scalar, the epoch (0-d, from 1) and the settings.
    """

    settings: tuple[MethodSetting, ...]
    terms: tuple[Term, ...]
    doc: str = ""
    needs_teacher: bool = True
    strong_view: bool = False
    features: tuple[str | tuple[str, str], ...] = ()
    class_cosines: bool = False
    evidential: bool = False
    learned_temperature: Callable[[Tensor, Tensor, Any], Tensor] | None = None

    @property
    def setting_names(self) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(entry.name for entry in self.settings)

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of its terms' parts, in the order in which they are summed."""
        return tuple(name for term in self.terms for name in term.names)

    @property
    def student_layers(self) -> tuple[str, ...]:
        """The student's side of `features`."""
        return tuple(layer if isinstance(layer, str) else layer[0] for layer in self.features)

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """The teacher's side of `features`."""
        return tuple(layer if isinstance(layer, str) else layer[1] for layer in self.features)

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        """The ranges that a search tries where the recipe has none: a search space."""
        return {entry.name: dict(entry.search) for entry in self.settings if entry.search}


# Those without a teacher first, and softmax methods before evidential ones.
METHODS: dict[str, Method] = {}

# The parts that there are, in the order in which an epoch's sums and logs have them.
TERMS = ["ce", "kd", "instance", "class", "batch", "ekd", "prior_kl"]


@registers("method", METHODS)
@checks_arguments
def register_method(name: str, method: Method) -> Method:
    """Make a method known by a name, and with it its settings; returns the method.

    Raises:
        UserError: the name is taken, a setting means something else already, a term is weighted
            by a setting that the method does not have, or there are features and no teacher.
    """
    if name in METHODS:
        raise UserError(f"there is a method {name!r} already: choose another name.")
    named = ((term.weight, term.warmup, term.decay) for term in method.terms)
    weighted = {key for names in named for key in names if key}
    if missing := sorted(weighted - {*method.setting_names}):
        raise UserError(
            f"method {name!r} lacks the settings {', '.join(missing)} of its terms: declare them."
        )
    if (method.features or method.class_cosines) and not method.needs_teacher:
        raise UserError(
            f"method {name!r} compares features with those of no teacher, or reads its classifier: "
            "set needs_teacher."
        )
    DistillConfig.add_method_settings(method.settings)
    TERMS.extend(part for part in method.term_names if part not in TERMS)
    known = {**METHODS, name: method}
    METHODS.clear()
    METHODS.update(
        sorted(known.items(), key=lambda item: (item[1].needs_teacher, item[1].evidential))
    )
    return method


def log_range(low: float, high: float) -> dict[str, Any]:
    """A range to search by the logarithm."""
    return {"low": low, "high": high, "log": True}


def share_of_epochs(epochs: int, *, of: int = 240) -> Callable[[DistillConfig], int]:
    """A default that the authors gave in epochs of 240, in proportion to the budget, at least 1."""
    return lambda config: max(1, round(config.epochs * (epochs / of)))


def ramp(epoch: int, warmup: int) -> float:
    """`min(epoch / warmup, 1)` with `epoch` counted from 1; 1 where there is no warm-up."""
    return min(epoch / warmup, 1.0) if warmup else 1.0


def cosine_decay(epoch: int, start: int, epochs: int) -> float:
    """1 up to epoch `start`, then half a cosine, which is 0 in the last of the run's `epochs`."""
    share = (epoch - start) / max(epochs - start, 1)
    return (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2.0


def method_of(config: DistillConfig) -> Method:
    """The method that the configuration names; raises `UserError` for an unknown name."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS, keys=("method",))
    return METHODS[config.method]


def resolve_method(config: DistillConfig) -> DistillConfig:
    """Fill the method's defaults; refuse a method setting that would do nothing."""
    method = method_of(config)
    for name in sorted({*REGISTRY} - {*method.setting_names}):
        value = getattr(config, name)
        if value != REGISTRY[name].unset:
            users = ", ".join(key for key, entry in METHODS.items() if name in entry.setting_names)
            raise UserError(
                f"{name} is not used by method {config.method!r}, got {value}; "
                f"remove it or choose a method that uses it ({users}).",
                keys=(name,),
            )
    _check_training_aids(config, method)
    missing = {
        entry.name: entry.default(config) if callable(entry.default) else entry.default
        for entry in method.settings
        if getattr(config, entry.name) is None
    }
    config = config.replace(**missing)
    if not any(getattr(config, term.weight) for term in method.terms):
        raise UserError(f"every loss weight of method {config.method!r} is 0: raise ce_weight.")
    return config


def _check_training_aids(config: DistillConfig, method: Method) -> None:
    """Raise `UserError` for what would do nothing under a method, or make its views disagree."""
    if method.strong_view and config.draws_views:
        names = ("mixup_alpha", "cutmix_alpha", "auto_augment", "random_erasing")
        used = [name for name in names if getattr(config, name) not in (0, "none")]
        raise UserError(
            f"{joined(used)} must be off under method {config.method!r}, which compares each view "
            f"with a strong one of its own, got {getattr(config, used[0])}: leave it out, or "
            "choose another method.",
            keys=(used[0],),
        )
    if config.label_smoothing and "ce" not in method.term_names:
        raise UserError(
            f"label_smoothing must be 0 under method {config.method!r}, which has no term ce, got "
            f"{config.label_smoothing}: leave it out, or choose another method.",
            keys=("label_smoothing",),
        )


def with_method(config: DistillConfig, method: str, **values: Any) -> DistillConfig:
    """The same run under another method: every method setting back to its default first."""
    unset = {name: entry.unset for name, entry in REGISTRY.items()}
    return resolve_method(config.replace(**{**unset, "method": method, **values}))
