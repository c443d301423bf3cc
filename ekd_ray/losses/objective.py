"""The objective of a run: which terms a method has, and their weights.

`METHODS` is the table of methods; a new one is one entry here and its functions in a
file beside this one. Every weight is multiplied in exactly one place, `Objective.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.losses.dirichlet import (
    distribution_kd_loss,
    evidential_cross_entropy,
    expectation_kd_loss,
    prior_kl_loss,
)
from ekd_ray.losses.kd import at_least_float32, kd_loss

_EVIDENTIAL = (
    "log_prior",
    "learn_log_prior",
    "prior_kl_weight",
    "prior_kl_warmup",
    "prior_kl_evidence",
)
_SECOND_ORDER = ("ekd_weight", "ekd_warmup", "evidence", "teacher_log_prior")

# Every term by name, in the order in which sums, logs and tables show them.
TERMS = ("ce", "kd", "ekd", "prior_kl")

TermFunction = Callable[["Objective", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the table of methods.

    `terms` maps a name of `TERMS` to a function (objective, student_logits,
    teacher_logits, target) -> unweighted 0-d loss. `uses` are the method settings of
    `DistillConfig` it reads, `defaults` the values of those left at None (or functions
    of the configuration).
    """

    terms: Mapping[str, TermFunction]
    uses: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evidential: bool = False
    needs_teacher: bool = True


def _cross_entropy(_: Objective, student: Tensor, __: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return functional.cross_entropy(at_least_float32(student), target)


def _kd(objective: Objective, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    config = objective.config
    return kd_loss(student, teacher, objective.temperature, standardize=config.standardize)


def _evidential_ce(objective: Objective, student: Tensor, _: Tensor, target: Tensor) -> Tensor:
    return evidential_cross_entropy(student, target, objective.log_prior)


def _prior_kl(objective: Objective, student: Tensor, _: Tensor, target: Tensor) -> Tensor:
    evidence = objective.config.prior_kl_evidence
    return prior_kl_loss(student, target, objective.log_prior, evidence=evidence)


def _expectation_kd(objective: Objective, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    return expectation_kd_loss(student, teacher, objective.temperature, **objective.priors)


def _distribution_kd(objective: Objective, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
    config = objective.config
    return distribution_kd_loss(
        student, teacher, objective.temperature, evidence=config.evidence, **objective.priors
    )


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
        uses=("temperature", "ce_weight", "kd_weight", "standardize"),
        defaults={"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    ),
    "ekd": Method(
        terms={
            "ce": _evidential_ce,
            "kd": _expectation_kd,
            "ekd": _distribution_kd,
            "prior_kl": _prior_kl,
        },
        uses=("temperature", "ce_weight", "kd_weight", *_EVIDENTIAL, *_SECOND_ORDER),
        defaults={
            "temperature": 1.0,
            "ce_weight": 1.0,
            "kd_weight": 4.5,
            "ekd_weight": 4.5,
            # The authors' 30 of 240 epochs, in proportion.
            "ekd_warmup": lambda config: round(config.epochs / 8),
        },
        evidential=True,
    ),
}

METHOD_SETTINGS = tuple(sorted({name for method in METHODS.values() for name in method.uses}))


def method_of(config: DistillConfig) -> Method:
    """The method that the configuration names; raises `UserError` for an unknown name."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    return METHODS[config.method]


def resolve_method(config: DistillConfig) -> DistillConfig:
    """Fill the method's defaults; refuse a method setting that would do nothing."""
    method = method_of(config)
    for name in METHOD_SETTINGS:
        default = DistillConfig.__dataclass_fields__[name].default
        if name not in method.uses and getattr(config, name) != default:
            users = ", ".join(key for key, entry in METHODS.items() if name in entry.uses)
            raise UserError(
                f"{name} is not used by method {config.method!r}, got {getattr(config, name)}; "
                f"remove it or choose a method that uses it ({users})."
            )
    missing = {
        name: default(config) if callable(default) else default
        for name, default in method.defaults.items()
        if getattr(config, name) is None
    }
    config = config.replace(**missing)
    if not any(getattr(config, name) for name in method.uses if name.endswith("_weight")):
        raise UserError(f"every loss weight of method {config.method!r} is 0: raise ce_weight.")
    return config


def with_method(config: DistillConfig, method: str, **values: Any) -> DistillConfig:
    """The same run under another method: every method setting back to its default first."""
    defaults = {name: DistillConfig.__dataclass_fields__[name].default for name in METHOD_SETTINGS}
    return resolve_method(config.replace(**{**defaults, "method": method, **values}))


def ramp(epoch: int, warmup: int) -> float:
    """`min(epoch / warmup, 1)` with `epoch` counted from 1; 1 where there is no warm-up."""
    return min(epoch / warmup, 1.0) if warmup else 1.0


class Objective(nn.Module):
    """The weighted sum of a method's terms; owns the (possibly learned) log prior.

    Args:
        config: a configuration that `resolve_method` has filled.

    `log_prior` and `teacher_log_prior` are 0-d float32 tensors (log of the prior mass
    per class); `log_prior` is a parameter when `config.learn_log_prior`, starting at
    `config.log_prior` or 1.0. `teacher_log_prior` is None when it follows `log_prior`.
    """

    log_prior: Tensor
    teacher_log_prior: Tensor | None

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.method = method_of(config)
        if self.method.evidential:
            default = 1.0 if config.learn_log_prior else 0.0
            prior = torch.tensor(default if config.log_prior is None else config.log_prior)
            if config.learn_log_prior:
                self.log_prior = nn.Parameter(prior)
            else:
                self.register_buffer("log_prior", prior)
            own = config.teacher_log_prior
            self.register_buffer("teacher_log_prior", None if own is None else torch.tensor(own))

    @property
    def log_prior_value(self) -> float | None:
        """The student's log prior as a number (waits for the device), None for softmax methods."""
        return float(self.log_prior.detach()) if self.method.evidential else None

    @property
    def temperature(self) -> float:
        """The method's temperature."""
        assert self.config.temperature is not None, "resolve_method fills it"
        return self.config.temperature

    @property
    def priors(self) -> dict[str, Any]:
        """The two log priors, as the evidential distillation losses take them."""
        return {"log_prior": self.log_prior, "teacher_log_prior": self.teacher_log_prior}

    def weights(self, epoch: int) -> dict[str, float]:
        """The weight of each of the method's terms in an epoch (from 1), ramps included.

        Terms of weight 0 are left out: they are not computed.
        """
        config = self.config
        weights = {
            "ce": config.ce_weight,
            "kd": config.kd_weight,
            "ekd": (config.ekd_weight or 0.0) * ramp(epoch, config.ekd_warmup or 0),
            "prior_kl": config.prior_kl_weight * ramp(epoch, config.prior_kl_warmup),
        }
        return {name: weight for name in self.method.terms if (weight := weights[name])}

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its unweighted terms.

        Args:
            student_logits: [B, C], any float dtype; the losses are computed in float32.
            teacher_logits: [B, C], or None for a method without a teacher.
            target: [B] int64 class indices.
            epoch: counted from 1, for the ramps.

        Returns:
            The 0-d float32 total and, by name, the 0-d detached terms before weighting.
        """
        if self.method.needs_teacher and teacher_logits is None:
            raise ValueError(f"method {self.config.method!r} needs teacher_logits, got None")
        teacher = cast(Tensor, teacher_logits)
        total = torch.zeros((), device=student_logits.device)
        values = {}
        for name, weight in self.weights(epoch).items():
            value = self.method.terms[name](self, student_logits, teacher, target)
            total = total + weight * value
            values[name] = value.detach()
        return total, values
