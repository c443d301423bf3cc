"""The evidential form of a method: EKD, and "+EKD" with the others.

Evidential Knowledge Distillation (EKD), ICCV 2025.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.ensembles import is_ensemble
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import NONE
from ekd_ray.losses.dirichlet import (
    EVIDENCE_FUNCTIONS,
    distribution_kd_loss,
    expected_cross_entropy,
    is_concentration,
    wrong_evidence_kl,
)
from ekd_ray.losses.methods import (
    Method,
    Outputs,
    Term,
    log_range,
    register_method,
    share_of_epochs,
)

if TYPE_CHECKING:
    from torch import Tensor

LOG_PRIOR = MethodSetting(
    name="log_prior", kind=float | None, low=-20, high=20, neutral=False,
    doc="log of the prior mass per class (the teacher's learned one)",
    search={"low": -3.0, "high": 1.0},
)  # fmt: skip


def _second_order_weight(config: DistillConfig) -> float:
    """4.5, and 0.05 under an ensemble, whose concentration is no softplus but as large as it is: a
    student of `digits` ended at chance with 0.5 and with 4.5, all of its evidence gone."""
    return 0.05 if is_ensemble(config.teacher) else 4.5


EKD_WEIGHT = MethodSetting(
    name="ekd_weight", kind=float | None, default=_second_order_weight, low=0, neutral=False,
    doc="weight of second-order distribution KD",
    # Wide enough for both evidence functions: the gradient of `softplus` is 2.3 to 3.4 times that
    # of `log1p_softplus` at the same weight.
    search=log_range(0.02, 20.0),
)  # fmt: skip
_SECOND_ORDER = (
    MethodSetting(
        name="ekd_warmup", kind=int | None, default=share_of_epochs(30), low=0, in_epochs=True,
        neutral=False, doc="epochs over which ekd_weight ramps up linearly",
    ),
    MethodSetting(
        name="evidence", kind=str, default="softplus", neutral=False,
        choices=tuple(EVIDENCE_FUNCTIONS), doc="second-order evidence function",
        search={"choices": ["softplus", "log1p_softplus"]},
    ),
    MethodSetting(
        name="ekd_temperature", kind=float | None, default=1.0, low=0.01, high=100,
        doc="softening T of both logits in second-order distribution KD",
    ),
    MethodSetting(
        name="teacher_log_prior", kind=float | None, low=-20, high=20, neutral=False,
        doc="log_prior of the teacher's Dirichlet, where it differs",
    ),
)  # fmt: skip
_PRIOR = (
    MethodSetting(
        name="learn_log_prior", kind=bool, default=False, neutral=False,
        doc="train log_prior with the student, from its value or 1.0",
    ),
    MethodSetting(
        name="prior_kl_weight", kind=float, default=0.0, low=0, neutral=False,
        doc="weight of the evidential regularisation",
    ),
    MethodSetting(
        name="prior_kl_warmup", kind=int, default=10, low=0, in_epochs=True, neutral=False,
        doc="epochs over which prior_kl_weight ramps up",
    ),
    MethodSetting(
        name="prior_kl_evidence", kind=str, default="softplus", neutral=False,
        choices=tuple(EVIDENCE_FUNCTIONS),
        doc="evidence function of the evidential regularisation",
    ),
)  # fmt: skip


def _cross_entropy(out: Outputs) -> dict[str, Tensor]:
    value = expected_cross_entropy(out.log_concentration, out.softened_target())
    return {"ce": out.sum_over_views(value)}


def _second_order(out: Outputs) -> dict[str, Tensor]:
    student, teacher, _ = out.views
    # The temperature, learned or not, enters the first order only (EKD, current release).
    temperature, evidence = out.settings.ekd_temperature, out.settings.evidence
    if is_concentration(out.statistics["teacher_log_prior"]):
        # No student can put less than its prior on a class, and the divergence grows with the
        # inverse of the teacher's concentration, which has no bound in an ensemble of softmaxes.
        teacher = teacher.maximum(out.statistics["log_prior"].detach())
    value = distribution_kd_loss(student, teacher, temperature, evidence=evidence, **out.statistics)
    return {"ekd": out.sum_over_views(value)}


def _prior_kl(out: Outputs) -> dict[str, Tensor]:
    student, _, target = out.views
    prior, evidence = out.statistics["log_prior"], out.settings.prior_kl_evidence
    value = wrong_evidence_kl(
        student, target if out.shares is None else out.shares, prior, evidence
    )
    return {"prior_kl": out.sum_over_views(value)}


_CROSS_ENTROPY = Term(names=("ce",), weight="ce_weight", loss=_cross_entropy)
_SECOND_ORDER_KD = Term(
    names=("ekd",), weight="ekd_weight", warmup="ekd_warmup", loss=_second_order, is_divergence=True
)
_PRIOR_KL = Term(
    names=("prior_kl",), weight="prior_kl_weight", warmup="prior_kl_warmup", loss=_prior_kl
)

# The defaults and ranges of EKD, whatever those of the softmax method are. The first order's
# weights have a step, because no continuous range gives a 0, which leaves that term out.
_EKD: dict[str, dict[str, Any]] = {
    "log_prior": {"search": {"low": -3.0, "high": 1.0, "around_prior": 1.0}},
    "ce_weight": {"default": 1.0, "search": log_range(0.1, 5.0)},
    "kd_weight": {"default": 4.5, "search": {"low": 0.0, "high": 9.0, "step": 0.5}},
    "temperature": {"default": 1.0, "search": log_range(1.0, 4.0)},
}


def evidential(method: Method, **changes: Mapping[str, Any]) -> Method:
    """The evidential form of a softmax method.

    The evidential cross-entropy takes the place of the cross-entropy, the means of Dirichlet
    distributions take that of softmaxes (the method's losses get `log_prior` for
    `standardize`), and the second-order term is added, if there is a teacher. Logits are not
    standardised, because their size says how much evidence there is.

    Args:
        changes: default and range (`default`, `search`) of a setting in this form, by its name.

    EKD (ICCV 2025).
    """
    _, *distillation = method.terms
    own = {entry.name: entry for entry in method.settings if entry.name != "standardize"}
    second_order: tuple[Term, ...] = ()
    settings = {"log_prior": LOG_PRIOR, "ce_weight": own.pop("ce_weight")}
    if method.needs_teacher:
        second_order = (_SECOND_ORDER_KD,)
        settings |= {"kd_weight": own.pop("kd_weight"), "ekd_weight": EKD_WEIGHT}
        changes = _EKD | changes
    settings |= own
    rest = (*(_SECOND_ORDER if method.needs_teacher else ()), *_PRIOR)
    return dataclasses.replace(
        method,
        settings=(
            *(dataclasses.replace(s, **changes.get(s.name, {})) for s in settings.values()),
            *rest,
        ),
        terms=(_CROSS_ENTROPY, *distillation, *second_order, _PRIOR_KL),
        doc=method.doc + (", with EKD" if second_order else ", its logits a Dirichlet's"),
        evidential=True,
    )


register_method("evidential", evidential(NONE))
