"""Distillation by the divergence of softmaxes (KD), and logit standardisation.

Hinton et al., "Distilling the knowledge in a neural network", 2015; Sun et al., "Logit
standardization in knowledge distillation", CVPR 2024.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CE_WEIGHT, CROSS_ENTROPY
from ekd_ray.losses.dirichlet import log_concentration, teacher_prior
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import (
    Scalar,
    at_least_float32,
    checked,
    is_one,
    soften,
    softened_kl,
)
from ekd_ray.losses.methods import Method, Outputs, Term, log_range, register_method

if TYPE_CHECKING:
    from torch import Tensor

# Sun et al. 2024, eq. 10 as released: keeps a row of equal logits finite.
STANDARDIZE_EPSILON = 1e-7


@checked
def standardize_logits(logits: Tensor) -> Tensor:
    """`(z - mean(z)) / (1e-7 + std(z))` of each row, sample standard deviation (n - 1).

    Logits [B, C] give float32 [B, C] (float64 for float64). Raises as every loss
    (`ekd_ray.losses`). Sun et al., CVPR 2024, "Z-score pre-process".
    """
    logits = at_least_float32(logits)
    # The shift changes nothing mathematically, but makes a row of equal large logits exactly
    # zero: otherwise the rounding of its mean would be divided by 1e-7.
    logits = logits - logits.detach().amax(dim=1, keepdim=True)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (STANDARDIZE_EPSILON + logits.std(dim=1, keepdim=True))


@checked
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Scalar,
    *,
    standardize: bool = False,
) -> Tensor:
    """`T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, mean over the batch.

    Logits are [B, C] and T > 0; returns 0-d, nats. `standardize` standardises both sides first
    (`standardize_logits`; CVPR 2024). Inputs and what is raised: `ekd_ray.losses`.

    Hinton et al. 2015, section 2: T^2 keeps the gradients' size independent of T.
    """
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize)
    return softened_kl(soften(student, temperature), soften(teacher, temperature), temperature)


def softmax_inputs(
    student_logits: Tensor, teacher_logits: Tensor, standardize: bool
) -> tuple[Tensor, Tensor]:
    """Both sides in at least float32, the teacher's detached, standardised if asked for."""
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if standardize:
        student, teacher = standardize_logits(student), standardize_logits(teacher)
    return student, teacher


def _losses(out: Outputs) -> dict[str, Tensor]:
    return {"kd": softened_kl(*log_masses(out, out.temperature), out.temperature)}


def log_masses(out: Outputs, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [B, C] on the weak view, of which a softmax makes probabilities.

    Softened logits, of an evidential method the logs of the concentrations: a loss that is
    computed from them has both forms. No gradient reaches the teacher.
    """
    if not out.method.evidential:
        standardize = out.statistics.get("standardize", False)
        student, teacher = softmax_inputs(out.student, out.teacher, standardize)
        return soften(student, temperature), soften(teacher, temperature)
    prior = out.statistics["log_prior"]
    teacher_log_prior = teacher_prior(prior, out.statistics["teacher_log_prior"])
    teacher = log_concentration(out.teacher.detach(), teacher_log_prior, temperature)
    if is_one(temperature) and not out.method.strong_view:
        return out.log_concentration, teacher
    return log_concentration(out.student, prior, temperature), teacher


TEMPERATURE = MethodSetting(
    name="temperature", kind=float | None, default=4.0, low=0.01, high=100, neutral=False,
    doc="softening T of both logits",
    search=log_range(1.0, 10.0),
)  # fmt: skip
KD_WEIGHT = MethodSetting(
    name="kd_weight", kind=float | None, default=0.9, low=0, neutral=False,
    doc="weight of KD / first-order expectation KD",
    search=log_range(0.1, 20.0),
)  # fmt: skip
KD_CE_WEIGHT = replace(CE_WEIGHT, default=0.1, search=log_range(0.05, 2.0))
WHOLE_CE_WEIGHT = replace(CE_WEIGHT, search=log_range(0.1, 5.0))  # of methods with a CE of 1
STANDARDIZE = MethodSetting(
    name="standardize", kind=bool, default=False, neutral=False,
    doc="standardise logits per row before KD (softmax methods)",
)  # fmt: skip
KD_TERM = Term(names=("kd",), weight="kd_weight", loss=_losses, is_divergence=True)

KD = register_method(
    "kd",
    Method(
        settings=(TEMPERATURE, KD_CE_WEIGHT, KD_WEIGHT, STANDARDIZE),
        terms=(CROSS_ENTROPY, KD_TERM),
        doc="the teacher's softened probabilities (Hinton 2015)",
    ),
)
register_method(
    "ekd",
    replace(evidential(KD), doc="Dirichlets: their means, and as such (EKD, ICCV 2025)"),
)
