"""The objective of a run: its method's terms, weighted and summed.

Every weight is multiplied in exactly one place, `Objective.forward`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.losses.ctkd import INITIAL_LOGIT, reversal_strength
from ekd_ray.losses.inputs import Scalar
from ekd_ray.losses.methods import Outputs, Term, method_of, ramp


class Objective(nn.Module):
    """The weighted sum of a method's terms; owns what the method learns beside the student.

    Args:
        config: a configuration that `resolve_method` has filled.

    `log_prior` and `teacher_log_prior` are 0-d float32 tensors (log of the prior mass
    per class); `log_prior` is a parameter when `config.learn_log_prior`, starting at
    `config.log_prior` or 1.0. `teacher_log_prior` is None when it follows `log_prior`.
    `temperature_logit` is the 0-d parameter of a method that learns its temperature (CTKD).
    """

    log_prior: Tensor
    teacher_log_prior: Tensor | None

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        # The settings of methods are found by name: no type checker knows them.
        self.settings = cast(Any, config)
        self.method = method_of(config)
        if self.method.evidential:
            learned, start = self.settings.learn_log_prior, self.settings.log_prior
            prior = torch.tensor((1.0 if learned else 0.0) if start is None else start)
            if learned:
                self.log_prior = nn.Parameter(prior)
            else:
                self.register_buffer("log_prior", prior)
            own = self.settings.teacher_log_prior
            self.register_buffer("teacher_log_prior", None if own is None else torch.tensor(own))
        if self.method.learned_temperature:
            self.temperature_logit = nn.Parameter(torch.tensor(INITIAL_LOGIT))

    @property
    def log_prior_value(self) -> float | None:
        """The student's log prior as a number (waits for the device), None for softmax methods."""
        return float(self.log_prior.detach()) if self.method.evidential else None

    def factors(self, epoch: int) -> Tensor:
        """What an epoch (from 1) decides, float32 [F]: the ramped weights, the reversal strength.

        `forward` takes it in the place of the epoch, so that no epoch compiles anew.
        """
        numbers: list[float | Tensor] = [*self.weights(epoch).values()]
        if self.method.learned_temperature:
            numbers.append(reversal_strength(epoch, self.settings.ctkd_warmup))
        device = next(self.buffers(), torch.empty(0)).device
        return torch.tensor(numbers).to(device, non_blocking=True)

    def temperature(self, epoch: int | Tensor) -> Scalar:
        """The temperature: a setting, or the learned one (0-d)."""
        if self.method.learned_temperature:
            return self.method.learned_temperature(self.temperature_logit, epoch, self.settings)
        return cast(float, self.settings.temperature)

    def state(self, epoch: int) -> dict[str, float]:
        """Learned values for the log: `log_prior`, `temperature` (waits for the device).

        A `log_prior` that is not learned is reported as well.
        """
        prior = self.log_prior_value
        values = {} if prior is None else {"log_prior": prior}
        if self.method.learned_temperature:
            with torch.no_grad():
                values["temperature"] = float(self.temperature(epoch))
        return values

    @property
    def statistics(self) -> dict[str, Any]:
        """How the method's losses read logits, see `Outputs`."""
        if self.method.evidential:
            return {"log_prior": self.log_prior, "teacher_log_prior": self.teacher_log_prior}
        standardizes = "standardize" in self.method.setting_names
        return {"standardize": self.settings.standardize} if standardizes else {}

    def _weight(self, term: Term, epoch: int) -> float:
        weight: float = getattr(self.settings, term.weight)
        return weight * ramp(epoch, getattr(self.settings, term.warmup)) if term.warmup else weight

    def weights(self, epoch: int) -> dict[str, float]:
        """The weight of each of the method's terms in an epoch (from 1), ramps included.

        Terms of weight 0 are left out: they are not computed.
        """
        found = {
            name: self._weight(term, epoch) for term in self.method.terms for name in term.names
        }
        return {name: weight for name, weight in found.items() if weight}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        epoch: int | Tensor,
        *,
        student_strong: Tensor | None = None,
        teacher_strong: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its unweighted terms.

        Args:
            student_logits: [B, C], any float dtype; the losses are computed in float32.
            teacher_logits: [B, C], or None for a method without a teacher.
            target: [B] int64 class indices.
            epoch: counted from 1, for the ramps; or its `factors`.
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
            student_strong=cast(Tensor, student_strong),
            teacher_strong=cast(Tensor, teacher_strong),
            temperature=self.temperature(epoch[-1] if isinstance(epoch, Tensor) else epoch),
            statistics=self.statistics,
            settings=self.settings,
            method=self.method,
        )
        total = torch.zeros((), device=student_logits.device)
        values = {}
        names = self.weights(1)
        factors = epoch if isinstance(epoch, Tensor) else [*self.weights(epoch).values()]
        weights = dict(zip(names, factors, strict=False))
        for term in self.method.terms:
            if term.names[0] in names:
                for name, value in term.loss(out).items():
                    total = total + weights[name] * value
                    values[name] = value.detach()
        # Every parameter takes part, also when its term's weight is 0: DDP waits for all.
        for parameter in self.parameters():
            total = total + 0.0 * parameter
        return total, values
