"""All that is measured of uncertainty, against scikit-learn, torchmetrics, SciPy and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.engine.measure.assessment import (
    adaptive_calibration_error,
    assess,
    brier_scores,
    classwise_calibration_error,
)
from ekd_ray.engine.measure.metrics import classification_metrics, log_probabilities
from ekd_ray.engine.measure.ranking import (
    accuracy_at_coverage,
    aurc,
    dense_ranks,
    excess_aurc,
    separate,
)
from ekd_ray.engine.measure.uncertainty import score_images, score_names
from ekd_ray.errors import UserError


def draw(n=300, classes=6, scale=2.0, seed=0, skill=1.0):
    """Logits that know something of the target."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n,), generator=generator)
    logits = scale * torch.randn(n, classes, generator=generator)
    return logits + skill * torch.nn.functional.one_hot(target, classes), target


SCORE_LISTS = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(certain=SCORE_LISTS, uncertain=SCORE_LISTS)
def test_separation_equals_scikit_learn(certain, uncertain):
    from sklearn.metrics import average_precision_score, roc_auc_score

    own, others = np.array(certain) / 4, np.array(uncertain) / 4
    scores, foreign = np.concatenate([own, others]), np.repeat([0, 1], [len(own), len(others)])
    found = separate(torch.tensor(own), torch.tensor(others))
    assert found["auroc"] == pytest.approx(roc_auc_score(foreign, scores))
    assert found["aupr_out"] == pytest.approx(average_precision_score(foreign, scores))
    assert found["aupr_in"] == pytest.approx(average_precision_score(1 - foreign, -scores))
    threshold = min(t for t in scores if (own <= t).mean() >= 0.95)
    assert found["fpr95"] == pytest.approx((others <= threshold).mean())


SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES)
def test_no_order_is_better_than_the_best(samples):
    scores, wrong = (torch.tensor(column) for column in zip(*samples, strict=True))
    errors = int(wrong.sum())
    best = sum(max(0, k - (len(wrong) - errors)) / k for k in range(1, len(wrong) + 1)) / len(wrong)
    found = excess_aurc(scores.double(), wrong)
    assert found == pytest.approx(aurc(scores.double(), wrong) - best)
    assert found >= -1e-12
    assert excess_aurc(wrong.double(), wrong) == 0
    assert accuracy_at_coverage(scores.double(), wrong, 1.0) == pytest.approx(
        1 - errors / len(wrong)
    )


def test_the_accuracy_on_a_share_of_the_images():
    scores = torch.arange(10).double()
    wrong = torch.tensor([False] * 7 + [True] * 3)
    for share, expected in ((0.01, 1), (0.7, 1), (0.71, 7 / 8), (0.8, 7 / 8), (1.0, 0.7)):
        assert accuracy_at_coverage(scores, wrong, share) == pytest.approx(expected)
    assert accuracy_at_coverage(torch.zeros(10), wrong, 0.5) == pytest.approx(0.7)


@pytest.mark.parametrize("log_prior", [None, -1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_brier_and_class_wise_errors_equal_other_libraries(log_prior, temperature):
    from sklearn.metrics import brier_score_loss
    from torchmetrics.functional.classification import binary_calibration_error

    logits, target = draw()
    log_p = log_probabilities(logits, log_prior, temperature)
    p = log_p.exp()
    parts = [brier_score_loss((target == k).numpy(), p[:, k].numpy()) for k in range(6)]
    assert float(brier_scores(log_p, target).mean()) == pytest.approx(sum(parts), rel=1e-5)
    errors = [
        binary_calibration_error(p[:, k], (target == k).long(), n_bins=15, norm="l1")
        for k in range(6)
    ]
    assert classwise_calibration_error(log_p, target) == pytest.approx(
        float(torch.stack(errors).mean()), abs=1e-6
    )
    found = assess(logits, target, log_prior=log_prior, temperature=temperature)
    assert found["brier"] == pytest.approx(sum(parts), rel=1e-5)
    assert found["nll"] == pytest.approx(float(-log_p[range(300), target].mean()), rel=1e-5)


def adaptive(confidence, correct):
    ranks = dense_ranks(confidence)
    return adaptive_calibration_error(ranks, confidence, correct)


def test_adaptive_bins_hold_equally_many_images():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(157, generator=generator).double()
    correct = torch.rand(157, generator=generator) < confidence**2
    order = np.argsort(confidence.numpy())
    bins = np.array_split((correct.double() - confidence).numpy()[order], 15)
    assert max(map(len, bins)) - min(map(len, bins)) == 1
    expected = sum(len(part) * abs(part.mean()) for part in bins) / 157
    assert adaptive(confidence, correct) == pytest.approx(expected)
    shuffled = torch.randperm(157, generator=generator)
    assert adaptive(confidence[shuffled], correct[shuffled]) == pytest.approx(expected)
    tied = torch.full((157,), 0.75).double()
    share = float(correct.double().mean())
    assert adaptive(tied, correct) == pytest.approx(abs(share - 0.75))


@pytest.mark.parametrize("log_prior", [None, -1.0])
def test_figures_of_every_score_are_the_functions_of_it(log_prior):
    logits, target = draw()
    outside = {"other": draw(120, seed=1, scale=0.5)[0], "more": draw(40, seed=2)[0]}
    names = score_names(log_prior)
    found = assess(logits, target, log_prior=log_prior, outside=outside, scores=names)
    plain = classification_metrics(logits, target, log_prior=log_prior)
    assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-5)
    wrong = logits.argmax(1) != target
    for name in names:
        prefix = (
            "" if name == ("max_probability" if log_prior is None else "vacuity") else f"{name}_"
        )
        scores = score_images(name, logits, log_prior)
        assert found[f"{prefix}aurc"] == pytest.approx(aurc(scores, wrong))
        assert found[f"{prefix}top1_at_80"] == pytest.approx(
            accuracy_at_coverage(scores, wrong, 0.8)
        )
        for other, logits_there in outside.items():
            expected = separate(scores, score_images(name, logits_there, log_prior))
            got = {key: found[f"{prefix}ood_{other}_{key}"] for key in expected}
            assert got == pytest.approx(expected)
    assert len([name for name in found if name.endswith("fpr95")]) == 2 * len(names)


def test_intervals_are_those_of_scipy():
    """The percentile interval of a mean, and of a figure of order, by other resamples."""
    from scipy.stats import bootstrap

    logits, target = draw(400)
    outside = draw(40, seed=1, scale=0.5)[0]
    found = assess(logits, target, outside={"o": outside}, resamples=300)
    right = (logits.argmax(1) == target).double().numpy()
    scores = score_images("max_probability", logits, None)
    others = score_images("max_probability", outside, None)

    def auroc_of(own, foreign):
        return separate(torch.tensor(own), torch.tensor(foreign))["auroc"]

    cases = {
        "top1": ((right,), np.mean, True),
        "ood_o_auroc": ((scores.numpy(), others.numpy()), auroc_of, False),
    }
    for name, (data, statistic, vectorized) in cases.items():
        expected = bootstrap(
            data, statistic, n_resamples=300, method="percentile", vectorized=vectorized, rng=0
        ).confidence_interval
        width = expected.high - expected.low
        assert found[f"{name}_low"] == pytest.approx(expected.low, abs=0.25 * width), name
        assert found[f"{name}_high"] == pytest.approx(expected.high, abs=0.25 * width), name
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert found == assess(logits, target, outside={"o": outside}, resamples=300)  # seeded


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.2, 5), evidential=st.booleans())
def test_what_must_hold_for_any_network(seed, temperature, evidential):
    log_prior = -1.0 if evidential else None
    logits, target = draw(60, seed=seed)
    outside = {"o": draw(30, seed=seed + 1)[0]}
    found = assess(
        logits, target, log_prior=log_prior, temperature=temperature, outside=outside, resamples=3
    )
    calm = assess(logits, target, log_prior=log_prior, outside=outside)
    # The order of the classes, and of the images by their scores, is not the temperature's.
    for name in ("top1", "aurc", "eaurc", "ood_o_auroc", "top1_at_50"):
        assert found[name] == calm[name]
    assert 0 <= found["brier"] <= 2
    assert found["top1_at_50"] >= 0 and found["eaurc"] >= -1e-12
    for name in ("ece", "ece_adaptive", "ece_classwise", "ood_o_fpr95", "ood_o_aupr_in"):
        assert -1e-9 <= found[name] <= 1 + 1e-9
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    moved = assess(logits[rows], target[rows], log_prior=log_prior, outside=outside)
    assert moved == pytest.approx(calm, rel=1e-5, abs=1e-7)


def test_logits_that_are_not_finite_and_scores_that_are_not():
    logits, target = draw(20)
    logits[3, 1] = math.nan
    found = assess(logits, target, resamples=5)
    assert found.keys() == classification_metrics(logits, target).keys()
    with pytest.raises(UserError, match="unknown score"):
        assess(*draw(20), scores=["entropi"])
