"""Distillation from a teacher whose probabilities are raised to a power, plain and weighted.

Zheng and Yang, "Knowledge distillation based on transformed teacher matching" (TTM and WTTM),
ICLR 2024.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import Scalar, categorical_kl, checked
from ekd_ray.losses.kd import KD_WEIGHT, WHOLE_CE_WEIGHT, log_masses, softmax_inputs
from ekd_ray.losses.methods import Method, Outputs, Term, log_range, register_method

if TYPE_CHECKING:
    from torch import Tensor


@checked
def wttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, exponent: Scalar, *, weighted: bool = True
) -> Tensor:
    """`n * KL(p^g / n || softmax(z_s))`, `p = softmax(z_t)`, `n = sum(p^g)`; mean over the batch.

    g is the `exponent` > 0; the student has no temperature. Without `weighted` (TTM) no row is
    multiplied by its n, which is the larger the less sure the teacher is.

    Logits are [B, C]; returns 0-d, nats. It is not 0 where the student equals the teacher, but
    for g = 1. Inputs and what is raised: `ekd_ray.losses`, and `ValueError` for g <= 0.

    Zheng and Yang, ICLR 2024: the power transform and the sample-adaptive weight.
    """
    if isinstance(exponent, int | float) and not exponent > 0:
        raise ValueError(f"exponent must be > 0, got {exponent}")
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize=False)
    return _power_kl(student, teacher, exponent, weighted)


def _power_kl(student: Tensor, teacher: Tensor, exponent: Scalar, weighted: bool) -> Tensor:
    """`wttm_loss` of log-masses [B, C]."""
    powers = exponent * teacher.log_softmax(dim=1)
    log_n = powers.logsumexp(dim=1, keepdim=True)
    kl = categorical_kl(powers - log_n, student.log_softmax(dim=1))
    return (log_n[:, 0].exp() * kl if weighted else kl).mean()


def _losses(out: Outputs, *, weighted: bool) -> dict[str, Tensor]:
    return {"kd": _power_kl(*log_masses(out, 1.0), out.settings.ttm_exponent, weighted)}


EXPONENT = MethodSetting(
    name="ttm_exponent", kind=float | None, low=0.01, high=10,
    doc="TTM: power of the teacher's probabilities",
    search=log_range(0.05, 0.5),
)  # fmt: skip
# Name, weight, and the power that the authors have with it: for vgg13 -> vgg8, and beside CRD.
for _name, _weighted, _weight, _exponent, _doc in (
    ("ttm", False, 45.0, 0.1, "a power of the teacher's probabilities (TTM, ICLR 2024)"),
    ("wttm", True, 4.0, 0.2, "ttm, weighted by how unsure the teacher is (ICLR 2024)"),
):
    _method = register_method(
        _name,
        Method(
            doc=_doc,
            settings=(
                WHOLE_CE_WEIGHT,
                replace(KD_WEIGHT, default=_weight, search=log_range(_weight / 20, 2 * _weight)),
                replace(EXPONENT, default=_exponent),
            ),
            terms=(
                CROSS_ENTROPY,
                Term(names=("kd",), weight="kd_weight", loss=partial(_losses, weighted=_weighted)),
            ),
        ),
    )
    # No results are published for it: the softmax method's weight with EKD's others.
    register_method(
        f"{_name}+ekd",
        evidential(
            _method,
            kd_weight={
                "default": _weight,
                "search": {"low": 0.0, "high": 2 * _weight, "step": _weight / 20},
            },
        ),
    )
