"""Temperature scaling and prediction sets, fitted on images that a network was not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.errors import UserError
from ekd_ray.files import read_json, write_json

FILE = "calibration.json"
# Shares of images whose class is to be in its set, for which there are thresholds.
SET_COVERAGES = tuple(round(0.5 + step / 200, 3) for step in range(100))
TEMPERATURES = (0.01, 100.0)
MOST_FITTED = 20_000  # images, evenly spaced, for one number: more would only take memory


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted on N `images`.

    `temperature` of the probabilities, see `log_probabilities`; `set_thresholds` for
    `SET_COVERAGES`: a set holds the classes whose `-log p` (nats, p without the temperature) does
    not exceed it; None where N images are too few for a promise.
    """

    images: int
    temperature: float
    set_thresholds: tuple[float | None, ...]

    @classmethod
    def fit(cls, logits: Tensor, target: Tensor, log_prior: float | None) -> Self:
        """From logits [N, C] float and target [N] int64 of images that are as those to come."""
        log_probs = log_probabilities(logits.detach().cpu().float(), log_prior)
        target = target.cpu()
        every = -(-len(target) // MOST_FITTED)
        return cls(
            images=len(target),
            temperature=fit_temperature(log_probs[::every].double(), target[::every]),
            set_thresholds=fit_thresholds(log_probs, target),
        )

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Back from `asdict`; other keys are ignored. Raises `ValueError` for other content."""
        found = values if isinstance(values, Mapping) else {}
        images, temperature = found.get("images"), found.get("temperature")
        thresholds = found.get("set_thresholds")
        sound = (
            type(images) is int
            and images > 0
            and type(temperature) is float
            and TEMPERATURES[0] <= temperature <= TEMPERATURES[1]
            and isinstance(thresholds, list)
            and len(thresholds) == len(SET_COVERAGES)
            and all(t is None or (type(t) is float and 0 <= t < math.inf) for t in thresholds)
        )
        if not sound:
            raise ValueError("no calibration")
        assert images is not None and temperature is not None and thresholds is not None
        return cls(images=images, temperature=temperature, set_thresholds=tuple(thresholds))

    def save(self, folder: Path) -> None:
        """Write to the folder of a run, atomically."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; raises `UserError` for any other content."""
        try:
            return cls.from_dict(read_json(folder / FILE))
        except ValueError:
            raise UserError(f"{folder / FILE} is damaged: remove it.") from None

    def threshold(self, coverage: float) -> float:
        """The one for sets that are to hold the class of this share of images, rounded up to the
        next of `SET_COVERAGES`.

        Raises:
            UserError: a share out of their bounds, or one that so few images cannot promise.
        """
        if not SET_COVERAGES[0] <= coverage <= SET_COVERAGES[-1]:
            raise UserError(
                f"the coverage of sets must be {SET_COVERAGES[0]} to {SET_COVERAGES[-1]}, got "
                f"{coverage}."
            )
        step = next(i for i, share in enumerate(SET_COVERAGES) if share >= coverage - 1e-9)
        found = self.set_thresholds[step]
        if found is None:
            known = (t is not None for t in self.set_thresholds)
            most = max(
                (s for s, there in zip(SET_COVERAGES, known, strict=True) if there), default=0
            )
            raise UserError(
                f"sets of coverage {coverage} need more than the {self.images} validation images "
                f"that the bundle was calibrated on: give at most {most}."
            )
        return found


def fit_temperature(log_probs: Tensor, target: Tensor) -> float:
    """The T in `TEMPERATURES` of least negative log-likelihood of `softmax(log p / T)`.

    It is 1 where every image is recognised: the likelihood then has no minimum but certainty.

    Args:
        log_probs: [N, C] float64; target: [N] int64.

    Guo et al., "On calibration of modern neural networks", ICML 2017. In 1 / T it is convex.
    """
    if (log_probs.argmax(dim=1) == target).all():
        return 1.0
    from scipy.optimize import minimize_scalar  # only a run of the confirm stage needs it

    def loss(log_temperature: float) -> float:
        scaled = log_probs * math.exp(-log_temperature)
        return float(torch.nn.functional.cross_entropy(scaled, target))

    bounds = tuple(map(math.log, TEMPERATURES))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(min(max(math.exp(found.x), TEMPERATURES[0]), TEMPERATURES[1]))


def fit_thresholds(log_probs: Tensor, target: Tensor) -> tuple[float | None, ...]:
    """For each of `SET_COVERAGES` the `ceil((N + 1) coverage)`-th smallest `-log p` of a target.

    So the class of one more image like these is in its set with at least this probability
    (split conformal prediction). None where that is more than N.

    Args:
        log_probs: [N, C] float; target: [N] int64.

    Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels",
    JASA 2019; Papadopoulos et al., ECML 2002.
    """
    scores = -log_probs.gather(1, target[:, None]).squeeze(1)
    ordered = scores.double().clamp(min=0).sort().values.tolist()
    wanted = [math.ceil((len(ordered) + 1) * share - 1e-9) for share in SET_COVERAGES]
    return tuple(ordered[rank - 1] if rank <= len(ordered) else None for rank in wanted)


def make_sets(log_probs: Tensor, threshold: float) -> Tensor:
    """Which classes are in the set of each image: bool [N, C].

    The most probable one always is, which can only raise the coverage.

    Args:
        log_probs: [N, C] float, without a temperature.
    """
    likely = -log_probs <= threshold
    return likely.scatter(1, log_probs.argmax(dim=1, keepdim=True), True)


def measure_sets(
    log_probs: Tensor, target: Tensor, thresholds: Mapping[float, float]
) -> dict[str, float]:
    """`set_coverage_95`, the share of images whose class is in its set of this coverage, and
    `set_size_95`, the mean number of classes in it; and so on.

    Args:
        log_probs: [N, C] float, without a temperature; target: [N] int64; thresholds: by coverage.
    """
    found = {}
    for share, threshold in thresholds.items():
        sets = make_sets(log_probs, threshold)
        inside = sets.gather(1, target[:, None]).double().mean()
        found[f"set_coverage_{100 * share:g}"] = float(inside)
        found[f"set_size_{100 * share:g}"] = float(sets.sum(dim=1).double().mean())
    return found
