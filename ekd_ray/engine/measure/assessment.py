"""Everything that is measured of a network's uncertainty on one split, with intervals.

What a final evaluation and `evaluate` say; an epoch's validation has less, see
`classification_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ekd_ray.engine.measure.calibration import measure_sets
from ekd_ray.engine.measure.metrics import (
    CALIBRATION_BINS,
    classification_metrics,
    expected_calibration_error,
    log_probabilities,
)
from ekd_ray.engine.measure.ranking import (
    accuracy_at_coverage,
    aurc,
    auroc,
    dense_ranks,
    excess_aurc,
    expected_in_order,
    separate,
)
from ekd_ray.engine.measure.uncertainty import default_score, score_images
from ekd_ray.engine.precision import cpu_threads

COVERAGES = (0.5, 0.8, 0.9, 0.95)
INTERVAL = (0.025, 0.975)


def brier_scores(log_probs: Tensor, target: Tensor) -> Tensor:
    """`sum_k (p_k - [k = y])^2` of each image: [N] float64 in [0, 2]. Brier 1950.

    Args:
        log_probs: [N, C] float; target: [N] int64.
    """
    p = log_probs.exp()
    of_target = p.gather(1, target[:, None]).squeeze(1).double()
    return p.square().sum(dim=1, dtype=torch.float64) - 2 * of_target + 1


def adaptive_calibration_error(ranks: Tensor, confidence: Tensor, correct: Tensor) -> float:
    """Calibration error with 15 bins of equally many images (Nguyen and O'Connor, EMNLP 2015).

    Equal confidences share their mean gap, so that the order given does not matter.

    Args:
        ranks: int64 [N], of the confidences; confidence: [N]; correct: bool [N].
    """
    gap = expected_in_order(ranks, correct.double() - confidence.double())
    return sum(abs(float(part.sum())) for part in gap.tensor_split(CALIBRATION_BINS)) / len(gap)


def classwise_calibration_error(log_probs: Tensor, target: Tensor) -> float:
    """Mean over the classes of the calibration error of "it is this class", 15 equal-width bins.

    Args:
        log_probs: [N, C] float; target: [N] int64.

    Kull et al., "Beyond temperature scaling", NeurIPS 2019.
    """
    errors = [
        expected_calibration_error(log_p.exp(), torch.ones_like(target), (target == k).long())
        for k, log_p in enumerate(log_probs.unbind(1))
    ]
    return float(torch.stack(errors).mean())


@dataclass(frozen=True, kw_only=True)
class _Images:
    """N images of the data set, a tensor [N] for each fact; scores are int64 ranks."""

    wrong: Tensor
    nll: Tensor
    brier: Tensor
    confidence: Tensor
    confidence_rank: Tensor
    scores: dict[str, Tensor]

    def take(self, index: Tensor) -> _Images:
        """The images `index` int64 [M], which may repeat."""
        own = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "scores"}
        return _Images(**own, scores={name: rank[index] for name, rank in self.scores.items()})


def assess(
    logits: Tensor,
    target: Tensor,
    *,
    log_prior: float | None = None,
    temperature: float = 1.0,
    outside: Mapping[str, Tensor] | None = None,
    scores: Sequence[str] = (),
    coverages: Sequence[float] = COVERAGES,
    resamples: int = 0,
    set_thresholds: Mapping[float, float] | None = None,
) -> dict[str, float]:
    """All metrics of one split, from the logits of all of its images.

    Args:
        logits: [N, C] float; target: [N] int64; log_prior: as of `classification_metrics`.
        temperature: of the probabilities, see `log_probabilities`; scores have none.
        outside: logits [M, C] of the images of each out-of-distribution set, by its name.
        scores: further ones that rank the images, of `SCORES`; `default_score` always does.
        coverages: shares of the images, in (0, 1], on which the accuracy is given.
        resamples: of the images, with replacement, for the 95 % intervals (percentile bootstrap);
            0 gives none.
        set_thresholds: of sets of classes by their coverage, see `measure_sets`.

    Returns:
        What `classification_metrics` gives; `brier`; `ece_adaptive` and `ece_classwise` (bins of
        equally many images; the mean over the classes); `eaurc`; `top1_at_90` and so on; of each
        set `ood_<set>_auroc`, `_aupr_in`, `_aupr_out` and `_fpr95`, see `separate`; what
        `measure_sets` gives. Those of a further score begin with its name: `entropy_aurc`.
        `<name>_low` and `<name>_high` are the ends of intervals. Where a logit is not finite, only
        what `classification_metrics` gives.

    Raises:
        UserError: a score that there is not.
        ValueError: as `classification_metrics`.
    """
    logits = logits.detach().cpu().float()
    target = target.cpu()
    found = classification_metrics(logits, target, log_prior=log_prior, temperature=temperature)
    outside = {name: other.detach().cpu().float() for name, other in (outside or {}).items()}
    if not all(part.isfinite().all() for part in (logits, *outside.values())):
        return found
    log_probs = log_probabilities(logits, log_prior, temperature)
    default = default_score(log_prior)
    ranked = dict.fromkeys((default, *scores))
    values = {name: score_images(name, logits, log_prior) for name in ranked}
    confidence, predicted = log_probs.exp().max(dim=1)
    images = _Images(
        wrong=predicted != target,
        nll=functional.nll_loss(log_probs.double(), target, reduction="none"),
        brier=brier_scores(log_probs, target),
        confidence=confidence,
        confidence_rank=_ranked(confidence),
        scores={name: _ranked(value) for name, value in values.items()},
    )
    prefixes = {name: "" if name == default else f"{name}_" for name in ranked}
    pairs = {
        (score, name): _ranked(torch.cat((values[score], score_images(score, other, log_prior))))
        for name, other in outside.items()
        for score in ranked
    }
    found |= _figures(images, prefixes, coverages)
    if set_thresholds:
        found |= measure_sets(log_probabilities(logits, log_prior), target, set_thresholds)
    found["ece_classwise"] = classwise_calibration_error(log_probs, target)
    own = torch.arange(len(logits))
    found |= _separations(
        pairs, prefixes, own, {n: torch.arange(len(o)) for n, o in outside.items()}
    )
    if resamples:
        sizes = {name: len(other) for name, other in outside.items()}
        rows: dict[str, list[float]] = {}
        with cpu_threads(1):  # more would wait for each other at operations this small
            for index, others in _resample(len(logits), sizes, resamples):
                drawn = _figures(images.take(index), prefixes, coverages)
                for name, value in (drawn | _separations(pairs, prefixes, index, others)).items():
                    rows.setdefault(name, []).append(value)
        for name, row in rows.items():
            low, high = np.quantile(row, INTERVAL)
            found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _ranked(scores: Tensor) -> Tensor:
    ranks = dense_ranks(scores)
    assert ranks is not None  # finite logits give no NaN
    return ranks


def _resample(
    count: int, sizes: Mapping[str, int], resamples: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Indices of the images and of those of each set, drawn with replacement, seeded."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(resamples):
        index = torch.randint(count, (count,), generator=draw)
        yield index, {n: torch.randint(m, (m,), generator=draw) for n, m in sizes.items()}


def _figures(
    images: _Images, prefixes: Mapping[str, str], coverages: Sequence[float]
) -> dict[str, float]:
    wrong, right = images.wrong, ~images.wrong
    found = {
        "top1": float(right.double().mean()),
        "nll": float(images.nll.mean()),
        "brier": float(images.brier.mean()),
        "ece": float(
            expected_calibration_error(
                images.confidence, right.long(), torch.ones_like(wrong).long()
            )
        ),
        "ece_adaptive": adaptive_calibration_error(
            images.confidence_rank, images.confidence, right
        ),
    }
    for name, ranks in images.scores.items():
        prefix = prefixes[name]
        found[f"{prefix}aurc"] = aurc(ranks, wrong)
        found[f"{prefix}eaurc"] = excess_aurc(ranks, wrong)
        if wrong.any() and right.any():
            found[f"{prefix}error_auroc"] = auroc(ranks[right], ranks[wrong])
        for share in coverages:
            found[f"{prefix}top1_at_{100 * share:g}"] = accuracy_at_coverage(ranks, wrong, share)
    return found


def _separations(
    pairs: Mapping[tuple[str, str], Tensor],
    prefixes: Mapping[str, str],
    own: Tensor,
    others: Mapping[str, Tensor],
) -> dict[str, float]:
    found = {}
    for (score, name), ranks in pairs.items():
        first, second = ranks.split([len(own), len(others[name])])
        for figure, value in separate(first[own], second[others[name]]).items():
            found[f"{prefixes[score]}ood_{name}_{figure}"] = value
    return found
