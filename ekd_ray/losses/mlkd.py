"""Multi-level logit distillation, on softmax statistics and on Dirichlet expectations.

Jin et al., "Multi-level logit distillation", CVPR 2023: predictions are aligned by
instance, by batch and by class, at several temperatures, on a weak and a strong view.

The form here is what the released code computes in effect, because the published figures
are its figures. It differs from the paper in three ways. The confidence masks multiply a
loss that is already a mean, so that they act as two plain factors: `m`, the share of
samples, and `c`, the share of classes whose teacher confidence is at or below the median.
Two of the five "strong" instance terms read the weak view. Class and batch alignment see
the weak view alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from ekd_ray.losses.cross_entropy import CROSS_ENTROPY, cross_entropy
from ekd_ray.losses.dirichlet import evidential_cross_entropy, prior_like, teacher_prior
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import (
    Scalar,
    categorical_kl,
    checked,
    scalar_like,
)
from ekd_ray.losses.kd import KD_CE_WEIGHT, KD_WEIGHT, STANDARDIZE, TEMPERATURE, softmax_inputs
from ekd_ray.losses.late_torch import torch
from ekd_ray.losses.methods import Method, Outputs, Term, log_range, register_method

if TYPE_CHECKING:
    from torch import Tensor

# The temperatures that go with T in every sum of the released code. The instance terms that it
# calls strong take the first three, T, 3 and 5, on the strong view, and 2 and 6 on the weak one.
TEMPERATURES = (3.0, 5.0, 2.0, 6.0)
_STRONG = 3

# Log-probabilities [2, K, B, C] of (teacher, student) at K temperatures, from logits [B, C].
_Predictions: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


def _softmaxes(student: Tensor, teacher: Tensor, temperatures: Tensor) -> Tensor:
    logits = torch.stack([teacher, student])[:, None]
    return torch.nn.functional.log_softmax(logits / temperatures[:, None, None], dim=3)


def _expectations(log_prior: Scalar, teacher_log_prior: Scalar | None) -> _Predictions:
    priors = teacher_prior(log_prior, teacher_log_prior), log_prior

    def predictions(student: Tensor, teacher: Tensor, temperatures: Tensor) -> Tensor:
        logits = torch.stack([teacher, student])[:, None] / temperatures[:, None, None]
        log_priors = torch.stack([prior_like(prior, logits) for prior in priors])
        log_a = torch.logaddexp(logits, log_priors[:, None, None, None])
        return torch.nn.functional.log_softmax(log_a, dim=3)

    return predictions


def _confident_share(confidence: Tensor) -> Tensor:
    """Share of entries at or below their median, 0-d; no value is read by the host."""
    return (confidence <= confidence.median()).to(confidence.dtype).mean()


def sample_share(probabilities: Tensor) -> Tensor:
    """`m`: share of samples at or below the median confidence, 0-d.

    `probabilities` [B, C] are the teacher's, of the weak view at T = 1.
    """
    return _confident_share(probabilities.amax(dim=1))


def class_share(probabilities: Tensor) -> Tensor:
    """`c`: share of classes whose summed probability is at or below the median; as `m`."""
    return _confident_share(probabilities.sum(dim=0))


def _instance_alignment(
    weak: Tensor, strong: Tensor, temperatures: Tensor, share: Tensor
) -> Tensor:
    """`m * sum_T kd(weak, T) + kd(strong, {T0, 3, 5}) + kd(weak, {2, 6})`, 0-d, nats.

    Predictions are [2, 5, B, C] of the weak view and [2, 3, B, C] of the strong one, and `share`
    is `m`, of the teacher's logits as they are. Jin et al. 2023, eq. 3, as released.
    """
    squares = temperatures.square()
    on_weak = squares * categorical_kl(*weak).mean(dim=1)
    on_strong = squares[:_STRONG] * categorical_kl(*strong).mean(dim=1)
    return share * on_weak.sum() + on_weak[_STRONG:].sum() + on_strong.sum()


def _gram_gaps(rows: Tensor) -> Tensor:
    """`sum_T ||X_t X_t' - X_s X_s'||^2 / K` of [2, T, K, L], 0-d."""
    teacher, student = (rows @ rows.mT).unbind()
    return (teacher - student).square().sum() / rows.shape[2]


def _alignments(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: Scalar,
    standardize: bool,
    predictions: _Predictions,
) -> dict[str, Tensor]:
    """The alignments of `mlkd_terms` without their weight."""
    weak = softmax_inputs(student_weak, teacher_weak, standardize=False)
    strong = softmax_inputs(student_strong, teacher_strong, standardize)
    values = (temperature, *TEMPERATURES)
    temperatures = torch.stack([scalar_like(value, weak[0]) for value in values])
    on_weak = aligned = predictions(*weak, temperatures)
    if standardize:
        standardized = softmax_inputs(student_weak, teacher_weak, standardize)
        aligned = predictions(*standardized, temperatures)
    on_strong = predictions(*strong, temperatures[:_STRONG])
    confidence = predictions(*weak, torch.ones_like(temperatures[:1]))[0, 0].exp()
    m, c = sample_share(confidence), class_share(confidence)
    probabilities = on_weak.exp()
    return {
        "instance": _instance_alignment(aligned, on_strong, temperatures, m),
        "class": c * _gram_gaps(probabilities.mT),
        "batch": m * _gram_gaps(probabilities),
    }


@checked
def mlkd_terms(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    ce_weight: float,
    kd_weight: float,
    standardize: bool = False,
    log_prior: Scalar | None = None,
    teacher_log_prior: Scalar | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of multi-level logit distillation, in their effective released form.

    With T over {T0, 3, 5, 2, 6}, m and c as in the module's docstring:

    - `ce`: `ce_weight * (CE(weak) + CE(strong))`
    - `instance`: `kd_weight * (m * sum_T kd(weak, T) + kd(strong, T0) + kd(strong, 3) +
      kd(strong, 5) + kd(weak, 2) + kd(weak, 6))`
    - `class`: `kd_weight * c * sum_T ||P_t' P_t - P_s' P_s||^2 / C`
    - `batch`: `kd_weight * m * sum_T ||P_t P_t' - P_s P_s'||^2 / B`

    Args:
        student_weak: logits [B, C] of the weak view; likewise the other three.
        teacher_weak: gets no gradient.
        student_strong: of the strong view.
        teacher_strong: gets no gradient.
        target: [B] int64 class indices.
        temperature: T0 > 0.
        ce_weight: 0 leaves `ce` out.
        kd_weight: 0 leaves the three alignments out.
        standardize: standardise the logits of the instance alignment (CVPR 2024), as the
            released code does; class and batch alignment read the plain logits.
        log_prior: with it (MLKD+EKD), evidential cross-entropy and the means of the Dirichlets
            `exp(z / T) + e^lambda` take the place of cross-entropy and softmax.
        teacher_log_prior: the teacher's; None follows `log_prior`.

    Returns:
        0-d terms by name; the total is their sum. The second-order term of MLKD+EKD is
        `distribution_kd_loss` on each view, the caller's to add.

    Raises:
        ValueError: as every loss (`ekd_ray.losses`), and for `standardize` with a prior.

    Jin et al., CVPR 2023, eq. 3 to 8; with EKD (ICCV 2025), first order.
    """
    if standardize and log_prior is not None:
        raise ValueError("standardize must be False with a log_prior, got True")
    terms = {}
    if ce_weight:
        on_weak, on_strong = (
            cross_entropy(student, target)
            if log_prior is None
            else evidential_cross_entropy(student, target, log_prior)
            for student in (student_weak, student_strong)
        )
        terms["ce"] = ce_weight * (on_weak + on_strong)
    if kd_weight:
        alignments = _alignments(
            student_weak, teacher_weak, student_strong, teacher_strong, temperature, standardize,
            _softmaxes if log_prior is None else _expectations(log_prior, teacher_log_prior),
        )  # fmt: skip
        terms |= {name: kd_weight * value for name, value in alignments.items()}
    return terms


def _losses(out: Outputs) -> dict[str, Tensor]:
    values = dict(out.statistics)
    standardize = values.pop("standardize", False)
    predictions = _expectations(**values) if out.method.evidential else _softmaxes
    logits = (out.student, out.teacher, out.student_strong, out.teacher_strong)
    return _alignments(*logits, out.temperature, standardize, predictions)


MLKD = register_method(
    "mlkd",
    Method(
        doc="by sample, class and batch, on two views (MLKD, CVPR 2023)",
        settings=(
            TEMPERATURE,
            KD_CE_WEIGHT,
            replace(KD_WEIGHT, search=log_range(0.05, 10.0)),
            STANDARDIZE,
        ),
        terms=(
            CROSS_ENTROPY,
            Term(
                names=("instance", "class", "batch"), weight="kd_weight", loss=_losses,
                is_divergence=True, couples_samples=True,
            ),
        ),
        strong_view=True,
    ),
)  # fmt: skip
# No results are published for it: the softmax method's weight, whose five temperatures already
# sum to many times a single KD term, with EKD's others.
register_method(
    "mlkd+ekd",
    evidential(MLKD, kd_weight={"default": 0.9, "search": {"low": 0.0, "high": 3.0, "step": 0.1}}),
)
