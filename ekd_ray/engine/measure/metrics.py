"""Metrics of a classifier on a split: accuracy, likelihood, calibration, uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ekd_ray.engine.measure.uncertainty import uncertainty_metrics
from ekd_ray.losses.dirichlet import log_expectation

CALIBRATION_BINS = 15


def classification_metrics(
    logits: Tensor,
    target: Tensor,
    *,
    log_prior: float | None = None,
    ood_logits: Tensor | None = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Metrics of one split, from the logits of all of its images.

    Args:
        logits: [N, C] float; target: [N] int64.
        log_prior: log of the prior mass per class, for an evidential student, whose
            class probabilities are the expectation of its Dirichlet; None for a softmax one.
        ood_logits: [M, C] float, of images from outside the data set.
        temperature: of the probabilities, see `log_probabilities`.

    Returns:
        `top1` and `top5` (fractions in [0, 1]; `top5` only with more than 5 classes),
        `balanced_top1` and `worst_recall` (mean and least of `class_recalls`),
        `nll` (nats), `ece` (15 equal-width bins, L1; Guo et al., 2017), what
        `uncertainty_metrics` gives (`aurc`, `error_auroc` unless it is undefined, for an
        evidential student the means `vacuity`, `dissonance`, `aleatoric_entropy` and
        `epistemic_entropy`, and `ood_auroc` with `ood_logits`). NaN logits make all but
        accuracies and recalls NaN.

    Raises:
        ValueError: logits that are not a floating [N, C] with N >= 1 and C >= 2, or that
            differ in C; a target that is not int64 [N]; a prior that is not finite.
    """
    logits = logits.float()
    uncertain = uncertainty_metrics(logits, target, log_prior=log_prior, ood_logits=ood_logits)
    log_probs = log_probabilities(logits, log_prior, temperature)
    num_classes = logits.shape[1]
    ranked = log_probs.topk(min(5, num_classes), dim=1).indices == target[:, None]
    recalls = class_recalls(ranked[:, 0], target, num_classes)
    values = {
        "top1": ranked[:, 0].double().mean(),
        "balanced_top1": recalls.nanmean(),
        "worst_recall": recalls.nan_to_num(nan=1.0).min(),
        "nll": functional.nll_loss(log_probs.double(), target),
        "ece": expected_calibration_error(*log_probs.exp().max(dim=1), target),
    }
    if num_classes > 5:
        values["top5"] = ranked.any(dim=1).double().mean()
    return {name: float(value) for name, value in values.items()} | uncertain


def class_recalls(correct: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """The share of each class's images that are recognised, NaN of a class without images.

    Args:
        correct: bool [N]; target: int64 [N].

    Returns:
        float64 [C] in [0, 1].
    """
    # `bincount` and a mask would each wait for the device.
    zeros = torch.zeros(num_classes, dtype=torch.float64, device=target.device)
    counts = zeros.index_add(0, target, torch.ones_like(target, dtype=torch.float64))
    return zeros.index_add(0, target, correct.double()) / counts


def log_probabilities(logits: Tensor, log_prior: float | None, temperature: float = 1.0) -> Tensor:
    """Log of a softmax's probabilities, or of a Dirichlet's mean with a prior: [N, C], nats.

    Another temperature T than 1 gives `softmax(log p / T)` of these, which of a softmax network is
    `softmax(z / T)`; the order of the classes stays.
    """
    if log_prior is None:
        found = functional.log_softmax(logits, dim=1)
    else:
        found = log_expectation(logits, 1.0, log_prior)
    return found if temperature == 1.0 else functional.log_softmax(found / temperature, dim=1)


def expected_calibration_error(confidence: Tensor, predicted: Tensor, target: Tensor) -> Tensor:
    """Mean gap between confidence and accuracy over 15 equal-width bins (Guo et al., 2017).

    Ours and not torchmetrics', whose import takes longer than many a trial; a test holds
    the two equal.

    Args:
        confidence: [N], in [0, 1]; predicted, target: [N] int64.

    Returns:
        0-d float64.
    """
    confidence = confidence.double()
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, device=confidence.device)[1:-1].double()
    gap = (predicted == target).double() - confidence
    bins = confidence.new_zeros(CALIBRATION_BINS)
    bins.index_add_(0, torch.bucketize(confidence, edges), gap)
    return bins.abs().sum() / len(confidence)
