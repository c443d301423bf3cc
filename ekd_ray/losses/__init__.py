"""Distillation methods and their losses, which are pure functions of tensors.

Every loss is a 0-d tensor in at least float32 (inside autocast too), a mean over the batch
with the temperature squared already applied; no gradient reaches the teacher. The batch and
class alignments of `mlkd_terms` are the exception: they compare samples with each other.
"""

# isort: off
# The files that register methods, in the order in which tables show them.
from ekd_ray.losses.kd import kd_loss, standardize_logits
from ekd_ray.losses.dkd import dkd_loss, expectation_dkd_loss
from ekd_ray.losses.mlkd import mlkd_terms
from ekd_ray.losses.ctkd import adversarial_temperature

# isort: on
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
from ekd_ray.losses.inputs import at_least_float32
from ekd_ray.losses.methods import METHODS, Method, register_method, resolve_method
from ekd_ray.losses.objective import Objective

__all__ = [
    # methods
    "METHODS",
    "Method",
    "Objective",
    "register_method",
    "resolve_method",
    # softmax statistics
    "kd_loss",
    "dkd_loss",
    "mlkd_terms",
    "adversarial_temperature",
    "standardize_logits",
    # evidential
    "evidential_cross_entropy",
    "expectation_kd_loss",
    "expectation_dkd_loss",
    "distribution_kd_loss",
    "prior_kl_loss",
    "dirichlet_kl",
    # what they are made of
    "log_concentration",
    "log_expectation",
    "evidence",
    "EVIDENCE_FUNCTIONS",
    "vacuity",
    "at_least_float32",
]
