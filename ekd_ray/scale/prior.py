"""The user's own belief of where a good value lies, which fades with the trials.

The acquisition is multiplied by `pi(x) ** (STRENGTH / n)` after n trials (Hvarfner et al., piBO:
Augmenting acquisition functions with user beliefs for Bayesian optimization, 2022, equations 6 and
7). A part of each belief is even over the range, so that a wrong one excludes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from ekd_ray.errors import UserError, shorten, unknown_name

# Of a number the standard deviation, as a share of its range; of a choice how many times as likely
# the centre is as each other value.
SPREAD = {"low": 0.4, "medium": 0.25, "high": 0.12}
ODDS = {"low": 2.0, "medium": 4.0, "high": 8.0}
EVEN = 0.5  # of the belief
STRENGTH = 2.0
EVERY = 2  # one in so many start-up trials is drawn from it
DEFAULT = "medium"
_KEYS = ("center", "confidence")

Rng = np.random.Generator | np.random.RandomState


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A belief of a parameter, over its places: [0, 1] along a range, or the number of a choice.

    Attributes:
        center: the place of the most likely value; `value` is that itself.
        choices: how many there are, None of a range.
    """

    center: float
    value: Any
    confidence: str
    choices: int | None = None

    def log_density(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log density at places [N], 0 where it is that of an even draw."""
        if self.choices is not None:
            odds = np.where(places == self.center, ODDS[self.confidence], 1.0)
            own = odds * self.choices / (ODDS[self.confidence] + self.choices - 1)
        else:
            spread = SPREAD[self.confidence]
            low, high = self._ends()
            away = (places - self.center) / spread
            own = np.exp(-0.5 * away**2) / np.sqrt(2 * np.pi) / spread / (high - low)
        return np.asarray(np.log(EVEN + (1 - EVEN) * own))

    def draw(self, rng: Rng) -> float:
        """A place drawn from it."""
        if self.choices is not None:
            weights = np.exp(self.log_density(np.arange(float(self.choices))))
            return float(rng.choice(self.choices, p=weights / weights.sum()))
        even, at = rng.uniform(size=2)
        if even < EVEN:
            return float(at)
        low, high = self._ends()
        place = self.center + SPREAD[self.confidence] * ndtri(low + at * (high - low))
        return float(np.clip(place, 0.0, 1.0))

    def _ends(self) -> tuple[float, float]:
        """Shares of the normal distribution below the ends of the range."""
        spread = SPREAD[self.confidence]
        return float(ndtr(-self.center / spread)), float(ndtr((1 - self.center) / spread))

    def describe(self) -> str:
        """For plans: `probably near 4 (confidence high)`."""
        return f"probably near {self.value} (confidence {self.confidence})"


def fade(trials: int) -> float:
    """The exponent of a prior after so many trials."""
    return STRENGTH / max(1, trials)


def begins_by_prior(number: int) -> bool:
    """Whether the start-up trial of this number is drawn from the priors."""
    return number % EVERY == 0


def check_prior(name: str, entry: Any) -> Mapping[str, Any]:
    """The `prior:` of a parameter with its confidence filled in.

    Raises:
        UserError: it is no mapping with a center, or has an unknown key or confidence.
    """
    if not isinstance(entry, Mapping) or "center" not in entry:
        raise UserError(
            f"space.{name}.prior must be {{center: VALUE, confidence: {' | '.join(SPREAD)}}}, "
            f"got {shorten(entry)}.",
            keys=("prior",),
        )
    for key in entry:
        if key not in _KEYS:
            raise unknown_name(f"key of space.{name}.prior:", key, _KEYS, keys=("prior", key))
    confidence = entry.get("confidence", DEFAULT)
    if not isinstance(confidence, str) or confidence not in SPREAD:
        keys = ("prior", "confidence")
        raise unknown_name(f"confidence of space.{name}.prior:", str(confidence), SPREAD, keys=keys)
    return {"center": entry["center"], "confidence": confidence}
