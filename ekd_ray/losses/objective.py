"""The objective of a run: its method's terms, weighted and summed.

Every weight is multiplied in exactly one place, `Objective.forward`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.losses.ctkd import INITIAL_LOGIT, adversarial_temperature
from ekd_ray.losses.kd import Scalar
from ekd_ray.losses.methods import (
    METHOD_SETTINGS,
    METHODS,
    TERM_WEIGHTS,
    TERMS,
    Method,
    Outputs,
    method_of,
    ramp,
    resolve_method,
    with_method,
)

__all__ = [
    "METHODS",
    "METHOD_SETTINGS",
    "TERMS",
    "TERM_WEIGHTS",
    "Method",
    "Objective",
    "Outputs",
    "method_of",
    "ramp",
    "resolve_method",
    "with_method",
]


class Objective(nn.Module):
    """The weighted sum of a method's terms; owns what the method learns beside the student.

    Args:
        config: a configuration that `resolve_method` has filled.

    `log_prior` and `teacher_log_prior` are 0-d float32 tensors (log of the prior mass
    per class); `log_prior` is a parameter when `config.learn_log_prior`, starting at
    `config.log_prior` or 1.0. `teacher_log_prior` is None when it follows `log_prior`.
    `temperature_logit` is the 0-d parameter of an adversarial method (CTKD).
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
        if self.method.adversarial:
            self.temperature_logit = nn.Parameter(torch.tensor(INITIAL_LOGIT))

    @property
    def log_prior_value(self) -> float | None:
        """The student's log prior as a number (waits for the device), None for softmax methods."""
        return float(self.log_prior.detach()) if self.method.evidential else None

    def temperature(self, epoch: int) -> Scalar:
        """The temperature: a setting, or the learned one of an adversarial method (0-d)."""
        config = self.config
        if self.method.adversarial:
            assert config.ctkd_warmup is not None, "resolve_method fills it"
            return adversarial_temperature(
                self.temperature_logit,
                epoch,
                t_start=config.ctkd_t_start,
                t_end=config.ctkd_t_end,
                warmup=config.ctkd_warmup,
            )
        assert config.temperature is not None, "resolve_method fills it"
        return config.temperature

    def state(self, epoch: int) -> dict[str, float]:
        """What the method learns, for the log: `log_prior`, `temperature` (waits for the device).

        A `log_prior` that is not learned is reported as well.
        """
        prior = self.log_prior_value
        values = {} if prior is None else {"log_prior": prior}
        if self.method.adversarial:
            with torch.no_grad():
                values["temperature"] = float(self.temperature(epoch))
        return values

    @property
    def priors(self) -> dict[str, Any]:
        """The two log priors, as the evidential distillation losses take them."""
        return {"log_prior": self.log_prior, "teacher_log_prior": self.teacher_log_prior}

    def weights(self, epoch: int) -> dict[str, float]:
        """The weight of each of the method's terms in an epoch (from 1), ramps included.

        Terms of weight 0 are left out: they are not computed.
        """
        found = {}
        for name in self.method.terms:
            setting, warmup = TERM_WEIGHTS[name]
            weight = getattr(self.config, setting) or 0.0
            if warmup:
                weight *= ramp(epoch, getattr(self.config, warmup) or 0)
            if weight:
                found[name] = weight
        return found

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        epoch: int,
        *,
        student_strong: Tensor | None = None,
        teacher_strong: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its unweighted terms.

        Args:
            student_logits: [B, C], any float dtype; the losses are computed in float32.
            teacher_logits: [B, C], or None for a method without a teacher.
            target: [B] int64 class indices.
            epoch: counted from 1, for the ramps.
            student_strong, teacher_strong: [B, C], the strong view's, for methods that
                look at one.

        Returns:
            The 0-d float32 total and, by name, the 0-d detached terms before weighting.
        """
        if self.method.needs_teacher and teacher_logits is None:
            raise ValueError(f"method {self.config.method!r} needs teacher_logits, got None")
        if self.method.strong_view and (student_strong is None or teacher_strong is None):
            raise ValueError(f"method {self.config.method!r} needs the strong view, got None")
        out = Outputs(
            student=student_logits,
            teacher=cast(Tensor, teacher_logits),
            target=target,
            epoch=epoch,
            student_strong=cast(Tensor, student_strong),
            teacher_strong=cast(Tensor, teacher_strong),
        )
        total = torch.zeros((), device=student_logits.device)
        values = {}
        for name, weight in self.weights(epoch).items():
            value = self.method.terms[name](self, out)
            total = total + weight * value
            values[name] = value.detach()
        # Every parameter takes part, also when its term's weight is 0: DDP waits for all.
        for parameter in self.parameters():
            total = total + 0.0 * parameter
        return total, values
