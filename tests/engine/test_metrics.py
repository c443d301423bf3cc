"""Metrics against scikit-learn, torchmetrics, torch.distributions and plain float64."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.engine.measure.metrics import (
    CALIBRATION_BINS,
    class_recalls,
    classification_metrics,
    expected_calibration_error,
)

EVIDENTIAL = {"vacuity", "dissonance", "aleatoric_entropy", "epistemic_entropy"}
RECALLS = ("balanced_top1", "worst_recall")


def sample(n=200, classes=10, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


def dirichlet_mean(logits, log_prior):
    concentration = logits.double().exp() + math.exp(log_prior)
    return torch.distributions.Dirichlet(concentration).mean


def guo_ece(confidence, correct):
    """The definition, bin by bin: bins (m / 15, (m + 1) / 15], weighted |accuracy - confidence|."""
    total = 0.0
    for m in range(CALIBRATION_BINS):
        inside = (confidence > m / CALIBRATION_BINS) & (confidence <= (m + 1) / CALIBRATION_BINS)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].double().mean()
            total += float(gap.abs()) * float(inside.double().mean())
    return total


@pytest.mark.parametrize("classes", [6, 10, 100])
@pytest.mark.parametrize("log_prior", [None, -1.22, 1.5])
def test_accuracy_and_likelihood_equal_scikit_learn(classes, log_prior):
    from sklearn.metrics import log_loss, top_k_accuracy_score

    logits, target = sample(classes=classes)
    mean = logits.double().softmax(1) if log_prior is None else dirichlet_mean(logits, log_prior)
    probs = mean.numpy()
    probs /= probs.sum(1, keepdims=True)
    labels = range(classes)
    found = classification_metrics(logits, target, log_prior=log_prior)
    top = {k: top_k_accuracy_score(target.numpy(), probs, k=k, labels=labels) for k in (1, 5)}
    assert found["top1"] == pytest.approx(top[1], abs=1e-12)
    assert found["top5"] == pytest.approx(top[5], abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(target.numpy(), probs, labels=labels), rel=1e-5)
    assert 0 < found["top1"] < found["top5"] < 1


@pytest.mark.parametrize("missing", [(), (2, 4)])
def test_recalls_equal_scikit_learn(missing):
    from sklearn.metrics import balanced_accuracy_score, recall_score

    logits, target = sample(classes=7)
    target = torch.where(torch.isin(target, torch.tensor(missing, dtype=torch.int64)), 0, target)
    predicted = logits.argmax(dim=1)
    found = classification_metrics(logits, target)
    there = sorted(set(range(7)) - {*missing})
    recalls = recall_score(target, predicted, labels=there, average=None)
    with warnings.catch_warnings(action="ignore"):  # predicted, but not there
        balanced = balanced_accuracy_score(target, predicted)
    assert found["balanced_top1"] == pytest.approx(balanced, abs=1e-12)
    assert found["worst_recall"] == pytest.approx(min(recalls), abs=1e-12)
    by_class = class_recalls(predicted == target, target, 7)
    assert by_class[there].tolist() == pytest.approx(recalls.tolist())
    assert by_class.isnan().nonzero().flatten().tolist() == [*missing]


@pytest.mark.parametrize(("log_prior", "more"), [(None, set()), (-1.22, EVIDENTIAL)])
def test_the_metrics_of_a_student(log_prior, more):
    logits, target = sample()
    expected = {"top1", "top5", *RECALLS, "nll", "ece", "aurc", "error_auroc"} | more
    found = classification_metrics(logits, target, log_prior=log_prior)
    assert set(found) == expected
    with_ood = classification_metrics(logits, target, log_prior=log_prior, ood_logits=logits[:9])
    new = {"ood_auroc", *(["mi_auroc"] if more else [])}
    assert with_ood.items() - found.items() == {(name, with_ood[name]) for name in new}


def test_logits_of_a_diverged_student_give_nan_and_no_error():
    found = classification_metrics(torch.full((4, 10), math.nan), torch.arange(4), log_prior=0.0)
    numbers = {name for name, value in found.items() if not math.isnan(value)}
    assert numbers == {"top1", "top5", *RECALLS}


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_ece_equals_torchmetrics(scale):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, target = sample(n=500, scale=scale)
    theirs = multiclass_calibration_error(
        logits.softmax(1), target, num_classes=10, n_bins=CALIBRATION_BINS, norm="l1"
    )
    assert classification_metrics(logits, target)["ece"] == pytest.approx(float(theirs), abs=1e-6)


def test_confidence_one_shares_the_last_bin():
    """Guo et al. close bins above; torchmetrics would give 1.0 a bin of its own (0.525)."""
    confidence = torch.tensor([1.0, 0.95])
    predicted, target = torch.tensor([1, 1]), torch.tensor([0, 1])
    found = expected_calibration_error(confidence, predicted, target)
    assert float(found) == pytest.approx(abs(1.95 - 1) / 2)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    """Guo et al. close bins above: 3 / 15, as it is rounded, lies in one bin with 0.19."""
    edge = torch.linspace(0, 1, CALIBRATION_BINS + 1)[3]
    confidence, ones = torch.stack([edge, torch.tensor(0.19)]), torch.tensor([1, 1])
    found = expected_calibration_error(confidence, ones, torch.tensor([1, 0]))
    assert float(found) == pytest.approx((0.8 - 0.19) / 2)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.floats(2**-7, 1.0, width=32), st.booleans()), min_size=1, max_size=40
    )
)
def test_ece_equals_the_definition(pairs):
    confidence = torch.tensor([p for p, _ in pairs])
    edges = torch.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS
    near = (confidence[:, None] - edges).abs().min(1).values < 1e-6
    confidence = torch.where(near, confidence + 1e-4, confidence)  # which side is rounding
    correct = torch.tensor([c for _, c in pairs])
    found = expected_calibration_error(confidence, torch.ones(len(pairs)).long(), correct.long())
    assert float(found) == pytest.approx(guo_ece(confidence.double(), correct), abs=1e-9)
    assert found.dtype == torch.float64
