"""The objective of a run: its method's terms, weighted and summed.

Every weight is multiplied in exactly one place, `Objective.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.config.ensembles import is_ensemble
from ekd_ray.losses.ctkd import INITIAL_LOGIT
from ekd_ray.losses.dirichlet import log_concentration
from ekd_ray.losses.inputs import Scalar, at_least_float32, without_autocast
from ekd_ray.losses.methods import (
    MethodValues,
    Outputs,
    Term,
    cosine_decay,
    method_of,
    ramp,
)


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
    _numbers: Tensor

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        # The settings of methods are found by name: no type checker knows them.
        self.settings = cast(Any, config)
        self.method = method_of(config)
        self._terms = [term for term in self.method.terms if getattr(config, term.weight)]
        values = {name: getattr(config, name) for name in self.method.setting_names}
        if config.label_smoothing:
            values["label_smoothing"] = config.label_smoothing
        numbers = {k: v for k, v in values.items() if isinstance(v, float) and v != 1}
        self._number_names = tuple(numbers)
        self._plain = {k: v for k, v in values.items() if k not in numbers}
        self.register_buffer("_numbers", torch.tensor([*numbers.values()]), persistent=False)
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
        """The numbers that a step takes from the host, float32 [F] on the objective's device.

        The epoch (from 1), the weight of each term in it, ramps included, and the method's real
        settings: tensors, so that a step that is compiled once serves all epochs and trials.
        """
        found = torch.tensor([epoch, *self.weights(epoch).values()], dtype=self._numbers.dtype)
        if self._numbers.is_cuda:  # only from pinned memory does the copy not block
            found = found.pin_memory()
        found = found.to(self._numbers.device, non_blocking=True)
        return torch.cat([found, self._numbers])

    def _read_settings(self, numbers: Iterable[Tensor]) -> MethodValues:
        """The method's settings, as `Outputs` has them."""
        return MethodValues({**self._plain, **dict(zip(self._number_names, numbers, strict=True))})

    def _temperature(self, epoch: Tensor, settings: MethodValues) -> Scalar:
        """The temperature: a setting, or the learned one (0-d); 1 where the method has none."""
        if self.method.learned_temperature:
            logit = cast(Tensor, self.temperature_logit)
            return self.method.learned_temperature(logit, epoch, settings)
        has_one = "temperature" in self.method.setting_names
        return cast(Scalar, settings.temperature) if has_one else 1.0

    def state(self, epoch: int) -> dict[str, float]:
        """Learned values for the log: `log_prior`, `temperature` (waits for the device).

        A `log_prior` that is not learned is reported as well.
        """
        prior = self.log_prior_value
        values = {} if prior is None else {"log_prior": prior}
        if self.method.learned_temperature:
            with torch.no_grad():
                settings = self._read_settings(self._numbers.unbind())
                values["temperature"] = float(self._temperature(self.factors(epoch)[0], settings))
        return values

    @property
    def statistics(self) -> dict[str, Any]:
        """How the method's losses read logits, see `Outputs`."""
        if self.method.evidential:
            # An ensemble's logits are the log of its concentration, with all of its mass.
            joined = is_ensemble(self.config.teacher)
            own = -math.inf if joined else self.teacher_log_prior
            return {"log_prior": self.log_prior, "teacher_log_prior": own}
        standardizes = "standardize" in self.method.setting_names
        return {"standardize": self.settings.standardize} if standardizes else {}

    def _weight(self, term: Term, epoch: int) -> float:
        weight: float = getattr(self.settings, term.weight)
        if term.warmup:
            weight *= ramp(epoch, getattr(self.settings, term.warmup))
        if term.decay:
            start = getattr(self.settings, term.decay)
            weight *= cosine_decay(epoch, start, self.config.epochs)
        return weight

    def weights(self, epoch: int) -> dict[str, float]:
        """The weight of each of the method's terms in an epoch (from 1), ramps included.

        Terms of weight 0 are left out: they are not computed.
        """
        return {name: self._weight(term, epoch) for term in self._terms for name in term.names}

    @without_autocast
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        target: Tensor,
        epoch: int | Tensor,
        *,
        shares: Tensor | None = None,
        student_strong: Tensor | None = None,
        teacher_strong: Tensor | None = None,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        class_cosines: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its unweighted terms.

        Args:
            student_logits: [B, C], any float dtype; the losses are computed in float32.
            teacher_logits: [B, C], or None for a method without a teacher.
            target: [B] int64 class indices.
            shares: [B, C], the classes' shares in each picture where some are mixed, which the
                (evidential) cross-entropy and `prior_kl` then read; `target` has the largest one.
            epoch: counted from 1, for the ramps; or its `factors`, which a loop over steps makes
                once an epoch.
            student_strong, teacher_strong: [B, C], the strong view's, for methods that
                look at one.
            student_features, teacher_features: [B, ...] each, any float dtype, the outputs of the
                layers that the method reads (`Method.features`).
            class_cosines: [C, C], for methods that read how alike the teacher's classifier has the
                classes (`Method.class_cosines`).

        Returns:
            The 0-d float32 total and, by name, the 0-d detached terms before weighting.
        """
        if self.method.needs_teacher and teacher_logits is None:
            raise ValueError(f"method {self.config.method!r} needs teacher_logits, got None")
        if self.method.strong_view and (student_strong is None or teacher_strong is None):
            raise ValueError(f"method {self.config.method!r} needs the strong view, got None")
        classes = student_logits.shape[1]
        if self.method.class_cosines and (
            class_cosines is None or tuple(class_cosines.shape) != (classes, classes)
        ):
            given = None if class_cosines is None else tuple(class_cosines.shape)
            raise ValueError(
                f"method {self.config.method!r} needs class_cosines [C, C] of {classes} classes, "
                f"got {given}"
            )
        layers = len(self.method.features)
        if (counts := (len(student_features), len(teacher_features))) != (layers, layers):
            raise ValueError(
                f"method {self.config.method!r} needs the features of {layers} layers, got "
                f"{counts[0]} of the student and {counts[1]} of the teacher"
            )
        factors = epoch if isinstance(epoch, Tensor) else self.factors(epoch)
        names = [name for term in self._terms for name in term.names]
        weights, numbers = factors[1 : 1 + len(names)], factors[1 + len(names) :]
        settings = self._read_settings(numbers.unbind())
        student = at_least_float32(student_logits)
        # What a method does not need is None, which its terms never look at.
        teacher, teacher_strong = cast(Tensor, teacher_logits), cast(Tensor, teacher_strong)
        views = student, teacher, target
        if student_strong is not None and self.method.strong_view:
            student_strong = at_least_float32(student_strong)
            views = (
                torch.cat([student, student_strong]),
                torch.cat([teacher, teacher_strong]),
                torch.cat([target, target]),
            )
        log_a = log_concentration(views[0], self.log_prior) if self.method.evidential else None
        out = Outputs(
            student=student,
            teacher=teacher,
            target=target,
            shares=None if shares is None else shares.to(student),
            student_strong=cast(Tensor, student_strong),
            teacher_strong=teacher_strong,
            student_features=tuple(map(at_least_float32, student_features)),
            teacher_features=tuple(at_least_float32(f.detach()) for f in teacher_features),
            class_cosines=cast(
                Tensor,
                class_cosines if class_cosines is None else class_cosines.detach().to(student),
            ),
            views=views,
            log_concentration=cast(Tensor, log_a),
            label_smoothing=settings.label_smoothing if self.config.label_smoothing else None,
            temperature=self._temperature(factors[0], settings),
            statistics=self.statistics,
            settings=settings,
            method=self.method,
        )
        found: dict[str, Tensor] = {}
        for term in self._terms:
            found |= term.loss(out)
        values = torch.stack([found[name] for name in names])
        total = (values * weights).sum()
        # Every parameter takes part, also when its term's weight is 0: DDP waits for all.
        for parameter in self.parameters():
            total = total + 0.0 * parameter
        if self.method.features:  # so does the classifier, where only features are compared
            total = total + 0.0 * student.sum()
        return total, dict(zip(names, values.detach().unbind(), strict=True))
