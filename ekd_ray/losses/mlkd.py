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
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ekd_ray.losses.dirichlet import evidential_cross_entropy, log_expectation, teacher_prior
from ekd_ray.losses.kd import (
    Scalar,
    at_least_float32,
    categorical_kl,
    check_logits,
    check_target,
    check_temperature,
    softmax_inputs,
    without_autocast,
)

# The temperatures that go with T in every sum of the released code, and the ones of the
# instance terms that it calls strong: T, 3 and 5 on the strong view, 2 and 6 on the weak.
TEMPERATURES = (3.0, 5.0, 2.0, 6.0)
STRONG_TEMPERATURES = (3.0, 5.0)
WEAK_AGAIN = (2.0, 6.0)

# Log-probabilities [B, C] of (student, teacher) at a temperature.
_Predictions = Callable[[Scalar], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """Student and teacher on a weak and on a strong view, as log-probabilities by temperature."""

    weak: _Predictions
    strong: _Predictions
    temperature: Scalar

    @property
    def temperatures(self) -> tuple[Scalar, ...]:
        """T and the four fixed ones."""
        return (self.temperature, *TEMPERATURES)


def softmax_views(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: Scalar,
    *,
    standardize: bool = False,
) -> tuple[TwoViews, TwoViews]:
    """The views of `mlkd_terms`: for instance alignment, and for class and batch alignment.

    They differ only by `standardize`, which the released code of Sun et al. (CVPR 2024)
    applies to the instance alignment and not to the other two.
    """
    _check(student_weak, teacher_weak, student_strong, teacher_strong, temperature)

    def predictions(student: Tensor, teacher: Tensor, standardized: bool) -> _Predictions:
        s, t = softmax_inputs(student, teacher, standardized)
        return lambda at: (functional.log_softmax(s / at, 1), functional.log_softmax(t / at, 1))

    def views(standardized: bool) -> TwoViews:
        return TwoViews(
            weak=predictions(student_weak, teacher_weak, standardized),
            strong=predictions(student_strong, teacher_strong, standardized),
            temperature=temperature,
        )

    plain = views(False)
    return (views(True) if standardize else plain), plain


def expectation_views(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: Scalar,
    *,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
) -> TwoViews:
    """As `softmax_views`, with the means of the Dirichlets `exp(z / T) + e^lambda` (MLKD+EKD)."""
    _check(student_weak, teacher_weak, student_strong, teacher_strong, temperature)
    prior = teacher_prior(log_prior, teacher_log_prior)

    def predictions(student: Tensor, teacher: Tensor) -> _Predictions:
        return lambda at: (
            log_expectation(student, at, log_prior),
            log_expectation(teacher.detach(), at, prior),
        )

    return TwoViews(
        weak=predictions(student_weak, teacher_weak),
        strong=predictions(student_strong, teacher_strong),
        temperature=temperature,
    )


def _check(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: Scalar,
) -> None:
    check_logits(
        student_weak=student_weak,
        teacher_weak=teacher_weak,
        student_strong=student_strong,
        teacher_strong=teacher_strong,
    )
    check_temperature(temperature)


def _confident_share(confidence: Tensor) -> Tensor:
    """Share of entries at or below their median, 0-d; no value is read by the host."""
    return (confidence <= confidence.median()).to(confidence.dtype).mean()


def sample_share(views: TwoViews) -> Tensor:
    """`m`: share of samples whose teacher confidence (at T = 1) is at or below the median."""
    return _confident_share(views.weak(1.0)[1].exp().amax(dim=1))


def class_share(views: TwoViews) -> Tensor:
    """`c`: share of classes whose summed teacher probability is at or below the median."""
    return _confident_share(views.weak(1.0)[1].exp().sum(dim=0))


def _kd(predictions: _Predictions, temperature: Scalar) -> Tensor:
    student, teacher = predictions(temperature)
    return temperature**2 * categorical_kl(teacher, student).mean()


def instance_alignment(views: TwoViews, share: Tensor) -> Tensor:
    """`m * sum_T kd(weak, T) + kd(strong, {T0, 3, 5}) + kd(weak, {2, 6})`, 0-d, nats.

    Args:
        views: the log-probabilities; share: `m`, from the teacher's unstandardised view.

    Jin et al. 2023, eq. 3, as released.
    """
    weak = {at: _kd(views.weak, at) for at in TEMPERATURES}
    masked = _kd(views.weak, views.temperature) + sum(weak.values())
    strong = sum(_kd(views.strong, at) for at in (views.temperature, *STRONG_TEMPERATURES))
    return share * masked + strong + sum(weak[at] for at in WEAK_AGAIN)


def batch_alignment(views: TwoViews) -> Tensor:
    """`m * sum_T ||P_t P_t' - P_s P_s'||^2 / B` on the weak view, 0-d (Jin et al. 2023, eq. 5)."""
    pairs = (views.weak(at) for at in views.temperatures)
    return sample_share(views) * sum(_gram_gap(s.exp(), t.exp()) for s, t in pairs)


def class_alignment(views: TwoViews) -> Tensor:
    """`c * sum_T ||P_t' P_t - P_s' P_s||^2 / C` on the weak view, 0-d (Jin et al. 2023, eq. 7)."""
    pairs = (views.weak(at) for at in views.temperatures)
    return class_share(views) * sum(_gram_gap(s.exp().T, t.exp().T) for s, t in pairs)


@without_autocast
def _gram_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """`||X_t X_t' - X_s X_s'||^2 / K` of two [K, L], 0-d."""
    return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


@without_autocast
def two_view_cross_entropy(weak: Tensor, strong: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of both views, summed: logits [B, C] each, target [B] int64 -> 0-d, nats."""
    ce = functional.cross_entropy
    return ce(at_least_float32(weak), target) + ce(at_least_float32(strong), target)


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
) -> dict[str, Tensor]:
    """The weighted terms of multi-level logit distillation, in their effective released form.

    With T over {T0, 3, 5, 2, 6}, m and c as in the module's docstring:

    - `ce`: `ce_weight * (CE(weak) + CE(strong))`
    - `instance`: `kd_weight * (m * sum_T kd(weak, T) + kd(strong, T0) + kd(strong, 3) +
      kd(strong, 5) + kd(weak, 2) + kd(weak, 6))`
    - `class`: `kd_weight * c * sum_T ||P_t' P_t - P_s' P_s||^2 / C`
    - `batch`: `kd_weight * m * sum_T ||P_t P_t' - P_s P_s'||^2 / B`

    Args:
        student_weak: [B, C], any float dtype; computed in float32, in float64 if it is that.
        teacher_weak: likewise; gets no gradient.
        student_strong: likewise, of the strong view.
        teacher_strong: likewise; gets no gradient.
        target: [B] int64 class indices.
        temperature: T0 > 0.
        ce_weight: applied here, once.
        kd_weight: applied here, once.
        standardize: standardise the logits of the instance alignment (CVPR 2024), as the
            released code does; class and batch alignment read the plain logits.

    Returns:
        0-d terms by name; the total is their sum.

    Raises:
        ValueError: shapes that differ or are not [B, C] with B >= 1, C >= 2; a target that
            is not int64 [B]; T <= 0.

    Jin et al., CVPR 2023, eq. 3 to 8.
    """
    check_target(target, student_weak)
    logits = (student_weak, teacher_weak, student_strong, teacher_strong)
    views, plain = softmax_views(*logits, temperature, standardize=standardize)
    ce = two_view_cross_entropy(student_weak, student_strong, target)
    return _weighted(ce, views, plain, ce_weight, kd_weight)


def expectation_mlkd_terms(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    ce_weight: float,
    kd_weight: float,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
) -> dict[str, Tensor]:
    """`mlkd_terms` with evidential cross-entropy and Dirichlet means (MLKD+EKD).

    Args:
        log_prior: lambda, log of the prior mass per class; a 0-d tensor gets a gradient.
        teacher_log_prior: the teacher's lambda, no gradient; None follows `log_prior`.

    The other arguments, what is returned and what is raised are those of `mlkd_terms`; also
    ValueError for a prior that is not finite or not 0-d. The second-order term is
    `distribution_kd_loss` on each view, the caller's to add.

    EKD (ICCV 2025), first order, in Jin et al., CVPR 2023.
    """
    logits = (student_weak, teacher_weak, student_strong, teacher_strong)
    views = expectation_views(
        *logits, temperature, log_prior=log_prior, teacher_log_prior=teacher_log_prior
    )
    ce = evidential_cross_entropy(student_weak, target, log_prior)
    ce = ce + evidential_cross_entropy(student_strong, target, log_prior)
    return _weighted(ce, views, views, ce_weight, kd_weight)


def _weighted(
    ce: Tensor, views: TwoViews, plain: TwoViews, ce_weight: float, kd_weight: float
) -> dict[str, Tensor]:
    return {
        "ce": ce_weight * ce,
        "instance": kd_weight * instance_alignment(views, sample_share(plain)),
        "class": kd_weight * class_alignment(plain),
        "batch": kd_weight * batch_alignment(plain),
    }
