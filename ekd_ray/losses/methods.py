"""The table of methods: which terms each has, which settings it uses, and their defaults.

A new method is one entry of `METHODS` and its functions in a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.losses import mlkd
from ekd_ray.losses.dirichlet import (
    distribution_kd_loss,
    evidential_cross_entropy,
    expectation_kd_loss,
    prior_kl_loss,
)
from ekd_ray.losses.dkd import dkd_loss, expectation_dkd_loss
from ekd_ray.losses.kd import at_least_float32, kd_loss

if TYPE_CHECKING:
    from ekd_ray.losses.objective import Objective

_EVIDENTIAL = (
    "log_prior",
    "learn_log_prior",
    "prior_kl_weight",
    "prior_kl_warmup",
    "prior_kl_evidence",
)
_SECOND_ORDER = ("ekd_weight", "ekd_warmup", "evidence", "teacher_log_prior")
_WEIGHTS = ("ce_weight", "kd_weight")
_DKD = ("dkd_alpha", "dkd_beta", "kd_warmup")
_CTKD = ("ctkd_t_start", "ctkd_t_end", "ctkd_warmup")

# Every term by name, in the order in which sums, logs and tables show them, with the
# setting that weights it and the one that ramps the weight up.
TERM_WEIGHTS: dict[str, tuple[str, str | None]] = {
    "ce": ("ce_weight", None),
    "kd": ("kd_weight", "kd_warmup"),
    "instance": ("kd_weight", None),
    "class": ("kd_weight", None),
    "batch": ("kd_weight", None),
    "ekd": ("ekd_weight", "ekd_warmup"),
    "prior_kl": ("prior_kl_weight", "prior_kl_warmup"),
}
TERMS = tuple(TERM_WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What student and teacher say about a batch: logits [B, C] and target [B] int64.

    The strong view's are None for methods that look at one view, the teacher's for methods
    without one. `epoch` counts from 1.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    epoch: int
    student_strong: Tensor
    teacher_strong: Tensor

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student and teacher, weak then strong, in the order of `mlkd_terms`."""
        return self.student, self.teacher, self.student_strong, self.teacher_strong


TermFunction = Callable[["Objective", Outputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the table of methods.

    `terms` maps a name of `TERMS` to a function (objective, outputs) -> unweighted 0-d loss.
    `uses` are the method settings of `DistillConfig` it reads, `defaults` the values of those
    left at None (or functions of the configuration). `strong_view` asks for a second, strong
    view of every image; `adversarial` methods learn their temperature.
    """

    terms: Mapping[str, TermFunction]
    uses: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evidential: bool = False
    needs_teacher: bool = True
    strong_view: bool = False
    adversarial: bool = False


def _cross_entropy(_: Objective, out: Outputs) -> Tensor:
    with torch.autocast(out.student.device.type, enabled=False):
        return functional.cross_entropy(at_least_float32(out.student), out.target)


def _kd(objective: Objective, out: Outputs) -> Tensor:
    at, standardize = objective.temperature(out.epoch), objective.config.standardize
    return kd_loss(out.student, out.teacher, at, standardize=standardize)


def _dkd(objective: Objective, out: Outputs) -> Tensor:
    config = objective.config
    return dkd_loss(
        out.student, out.teacher, out.target, objective.temperature(out.epoch),
        alpha=config.dkd_alpha, beta=config.dkd_beta, standardize=config.standardize,
    )  # fmt: skip


def _evidential_ce(objective: Objective, out: Outputs) -> Tensor:
    return evidential_cross_entropy(out.student, out.target, objective.log_prior)


def _prior_kl(objective: Objective, out: Outputs) -> Tensor:
    evidence = objective.config.prior_kl_evidence
    return prior_kl_loss(out.student, out.target, objective.log_prior, evidence=evidence)


def _expectation_kd(objective: Objective, out: Outputs) -> Tensor:
    at = objective.temperature(out.epoch)
    return expectation_kd_loss(out.student, out.teacher, at, **objective.priors)


def _expectation_dkd(objective: Objective, out: Outputs) -> Tensor:
    config = objective.config
    return expectation_dkd_loss(
        out.student, out.teacher, out.target, objective.temperature(out.epoch),
        alpha=config.dkd_alpha, beta=config.dkd_beta, **objective.priors,
    )  # fmt: skip


def _distribution_kd(objective: Objective, out: Outputs) -> Tensor:
    # A learned temperature enters the first order only: the second stays at T = 1.
    at = 1.0 if objective.method.adversarial else objective.temperature(out.epoch)
    evidence = objective.config.evidence
    return distribution_kd_loss(out.student, out.teacher, at, evidence=evidence, **objective.priors)


def _both_views(term: TermFunction) -> TermFunction:
    """The sum of a term on the weak and on the strong view."""

    def both(objective: Objective, out: Outputs) -> Tensor:
        strong = Outputs(
            student=out.student_strong, teacher=out.teacher_strong, target=out.target,
            epoch=out.epoch, student_strong=out.student, teacher_strong=out.teacher,
        )  # fmt: skip
        return term(objective, out) + term(objective, strong)

    return both


def _views(objective: Objective, out: Outputs) -> tuple[mlkd.TwoViews, mlkd.TwoViews]:
    """For instance alignment, and for class and batch alignment."""
    at = objective.temperature(out.epoch)
    if objective.method.evidential:
        views = mlkd.expectation_views(*out.four, at, **objective.priors)
        return views, views
    return mlkd.softmax_views(*out.four, at, standardize=objective.config.standardize)


def _instance(objective: Objective, out: Outputs) -> Tensor:
    views, plain = _views(objective, out)
    return mlkd.instance_alignment(views, mlkd.sample_share(plain))


def _class(objective: Objective, out: Outputs) -> Tensor:
    return mlkd.class_alignment(_views(objective, out)[1])


def _batch(objective: Objective, out: Outputs) -> Tensor:
    return mlkd.batch_alignment(_views(objective, out)[1])


def _share_of_epochs(share: float) -> Callable[[DistillConfig], int]:
    """A default that the authors gave in epochs of 240, in proportion to the budget."""
    return lambda config: round(config.epochs * share)


_ALIGNMENTS: dict[str, TermFunction] = {"instance": _instance, "class": _class, "batch": _batch}
_SOFTMAX_DEFAULTS = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}
_EKD_DEFAULTS = {
    "temperature": 1.0,
    "ce_weight": 1.0,
    "kd_weight": 4.5,
    "ekd_weight": 4.5,
    "ekd_warmup": _share_of_epochs(30 / 240),
}
_DKD_DEFAULTS = {"kd_warmup": _share_of_epochs(20 / 240)}
_CTKD_DEFAULTS = {"ctkd_warmup": _share_of_epochs(10 / 240)}


def _without_temperature(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if name != "temperature"}


METHODS: dict[str, Method] = {
    "none": Method(
        terms={"ce": _cross_entropy},
        uses=("ce_weight",),
        defaults={"ce_weight": 1.0},
        needs_teacher=False,
    ),
    "evidential": Method(
        terms={"ce": _evidential_ce, "prior_kl": _prior_kl},
        uses=("ce_weight", *_EVIDENTIAL),
        defaults={"ce_weight": 1.0},
        evidential=True,
        needs_teacher=False,
    ),
    "kd": Method(
        terms={"ce": _cross_entropy, "kd": _kd},
        uses=("temperature", *_WEIGHTS, "standardize"),
        defaults=_SOFTMAX_DEFAULTS,
    ),
    "dkd": Method(
        terms={"ce": _cross_entropy, "kd": _dkd},
        uses=("temperature", *_WEIGHTS, *_DKD, "standardize"),
        defaults={"temperature": 4.0, "ce_weight": 1.0, "kd_weight": 1.0, **_DKD_DEFAULTS},
    ),
    "mlkd": Method(
        terms={"ce": _both_views(_cross_entropy), **_ALIGNMENTS},
        uses=("temperature", *_WEIGHTS, "standardize"),
        defaults=_SOFTMAX_DEFAULTS,
        strong_view=True,
    ),
    "ctkd": Method(
        terms={"ce": _cross_entropy, "kd": _kd},
        uses=(*_WEIGHTS, *_CTKD, "standardize"),
        defaults={**_without_temperature(_SOFTMAX_DEFAULTS), **_CTKD_DEFAULTS},
        adversarial=True,
    ),
    "ekd": Method(
        terms={
            "ce": _evidential_ce,
            "kd": _expectation_kd,
            "ekd": _distribution_kd,
            "prior_kl": _prior_kl,
        },
        uses=("temperature", *_WEIGHTS, *_EVIDENTIAL, *_SECOND_ORDER),
        defaults=_EKD_DEFAULTS,
        evidential=True,
    ),
    "dkd+ekd": Method(
        terms={
            "ce": _evidential_ce,
            "kd": _expectation_dkd,
            "ekd": _distribution_kd,
            "prior_kl": _prior_kl,
        },
        uses=("temperature", *_WEIGHTS, *_DKD, *_EVIDENTIAL, *_SECOND_ORDER),
        defaults={**_EKD_DEFAULTS, "kd_weight": 0.5, **_DKD_DEFAULTS},
        evidential=True,
    ),
    "mlkd+ekd": Method(
        terms={
            "ce": _both_views(_evidential_ce),
            **_ALIGNMENTS,
            "ekd": _both_views(_distribution_kd),
            "prior_kl": _both_views(_prior_kl),
        },
        uses=("temperature", *_WEIGHTS, *_EVIDENTIAL, *_SECOND_ORDER),
        # No results are published for it: the softmax method's weight, whose five
        # temperatures already sum to many times a single KD term, with EKD's others.
        defaults={**_EKD_DEFAULTS, "kd_weight": 0.9},
        evidential=True,
        strong_view=True,
    ),
    "ctkd+ekd": Method(
        terms={
            "ce": _evidential_ce,
            "kd": _expectation_kd,
            "ekd": _distribution_kd,
            "prior_kl": _prior_kl,
        },
        uses=(*_WEIGHTS, *_CTKD, *_EVIDENTIAL, *_SECOND_ORDER),
        defaults={**_without_temperature(_EKD_DEFAULTS), **_CTKD_DEFAULTS},
        evidential=True,
        adversarial=True,
    ),
}

METHOD_SETTINGS = tuple(sorted({name for method in METHODS.values() for name in method.uses}))
_DEFAULTS = {name: DistillConfig.__dataclass_fields__[name].default for name in METHOD_SETTINGS}


def method_of(config: DistillConfig) -> Method:
    """The method that the configuration names; raises `UserError` for an unknown name."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS, keys=("method",))
    return METHODS[config.method]


def resolve_method(config: DistillConfig) -> DistillConfig:
    """Fill the method's defaults; refuse a method setting that would do nothing."""
    method = method_of(config)
    given = {name: getattr(config, name) for name in METHOD_SETTINGS}
    given = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
    for name, value in given.items():
        if name not in method.uses:
            users = ", ".join(key for key, entry in METHODS.items() if name in entry.uses)
            raise UserError(
                f"{name} is not used by method {config.method!r}, got {value}; "
                f"remove it or choose a method that uses it ({users}).",
                keys=(name,),
            )
    missing = {
        name: default(config) if callable(default) else default
        for name, default in method.defaults.items()
        if getattr(config, name) is None
    }
    config = config.replace(**missing)
    weights = [name for name in method.uses if name.endswith("_weight")]
    if not any(getattr(config, name) for name in weights):
        raise UserError(f"every loss weight of method {config.method!r} is 0: raise ce_weight.")
    return config


def with_method(config: DistillConfig, method: str, **values: Any) -> DistillConfig:
    """The same run under another method: every method setting back to its default first."""
    return resolve_method(config.replace(**{**_DEFAULTS, "method": method, **values}))


def ramp(epoch: int, warmup: int) -> float:
    """`min(epoch / warmup, 1)` with `epoch` counted from 1; 1 where there is no warm-up."""
    return min(epoch / warmup, 1.0) if warmup else 1.0
