"""Distillation methods and their losses, which are pure functions of tensors.

Logits are [B, C] of any float dtype, targets int64 [B] class indices, a temperature T is a
number > 0 or a 0-d tensor (learned), whose gradient comes from both sides. `log_prior` is lambda,
the log of the prior mass per class: a number, or a 0-d tensor, which gets a gradient;
`teacher_log_prior` is the teacher's, without gradient, and None follows `log_prior`.

Every loss is 0-d, in nats, times T^2, and a mean over the batch (but for the batch and class
alignments of `mlkd_terms`, which compare samples with each other). It is computed in float32, in
float64 if an input is that, inside autocast too. No gradient reaches the teacher.

Every loss raises `ValueError` for logits whose shapes differ or are not a floating [B, C] with
B >= 1 and C >= 2, a target that is not int64 [B], T <= 0, and a prior that is not finite or not
0-d (but the teacher's may be `-inf`: its logits are the log of a concentration); and `UserError`
for an unknown evidence function.
"""

from typing import TYPE_CHECKING, Any

# isort: off
# The files that register methods, in the order in which tables show them.
from ekd_ray.losses.kd import kd_loss, standardize_logits
from ekd_ray.losses.dkd import dkd_loss, expectation_dkd_loss
from ekd_ray.losses.mlkd import mlkd_terms
from ekd_ray.losses.ctkd import adversarial_temperature
from ekd_ray.losses.rld import rld_loss
from ekd_ray.losses.ttm import wttm_loss
from ekd_ray.losses.dist import dist_loss
from ekd_ray.losses.wkd import class_cosines, class_cost, wasserstein_kd_loss

# isort: on
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CE_WEIGHT, CROSS_ENTROPY
from ekd_ray.losses.dirichlet import (
    EVIDENCE_FUNCTIONS,
    dirichlet_kl,
    distribution_kd_loss,
    evidence,
    evidential_cross_entropy,
    expectation_kd_loss,
    log_concentration,
    log_expectation,
    prior_kl_loss,
    vacuity,
)
from ekd_ray.losses.evidential import EKD_WEIGHT, LOG_PRIOR, evidential
from ekd_ray.losses.inputs import Scalar, at_least_float32, checked
from ekd_ray.losses.kd import KD_CE_WEIGHT, KD_TERM, KD_WEIGHT, STANDARDIZE, TEMPERATURE
from ekd_ray.losses.methods import (
    METHODS,
    Method,
    Outputs,
    Term,
    log_range,
    register_method,
    resolve_method,
    share_of_epochs,
)
from ekd_ray.losses.moments import ensemble_log_concentration

if TYPE_CHECKING:
    from ekd_ray.losses.objective import Objective

__all__ = [
    # methods
    "METHODS",
    "Objective",
    "resolve_method",
    # a method of one's own
    "register_method",
    "Method",
    "Term",
    "Outputs",
    "MethodSetting",
    "log_range",
    "share_of_epochs",
    "evidential",
    "CROSS_ENTROPY",
    "KD_TERM",
    "CE_WEIGHT",
    "KD_CE_WEIGHT",
    "KD_WEIGHT",
    "EKD_WEIGHT",
    "TEMPERATURE",
    "STANDARDIZE",
    "LOG_PRIOR",
    # softmax statistics
    "kd_loss",
    "dkd_loss",
    "mlkd_terms",
    "adversarial_temperature",
    "rld_loss",
    "wttm_loss",
    "dist_loss",
    "wasserstein_kd_loss",
    "class_cosines",
    "class_cost",
    "standardize_logits",
    # evidential
    "evidential_cross_entropy",
    "expectation_kd_loss",
    "expectation_dkd_loss",
    "distribution_kd_loss",
    "prior_kl_loss",
    "dirichlet_kl",
    "ensemble_log_concentration",
    # what they are made of
    "log_concentration",
    "log_expectation",
    "evidence",
    "EVIDENCE_FUNCTIONS",
    "vacuity",
    "at_least_float32",
    "checked",
    "Scalar",
]


def __getattr__(name: str) -> Any:
    if name == "Objective":  # a module of torch's
        from ekd_ray.losses.objective import Objective

        return Objective
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
