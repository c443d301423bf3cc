"""How images are normalised before a network sees them: by name, or by mean and deviation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ekd_ray.errors import UserError, shorten, unknown_name

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Per-channel mean and standard deviation of images in [0, 1]."""

    mean: Triple
    std: Triple

    def as_text(self) -> str:
        """The form that `teacher_normalization` takes: 'mean,mean,mean/std,std,std'."""
        return "/".join(",".join(str(value) for value in part) for part in (self.mean, self.std))


# Beyond these, images in [0, 1] leave what float32 can hold apart.
LARGEST_MEAN, LEAST_STD, LARGEST_STD = 1e3, 1e-6, 1e3


def is_normalization(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether these are three means and three deviations with which images can be normalised."""
    within = [abs(value) <= LARGEST_MEAN for value in mean]  # no NaN is
    within += [LEAST_STD <= value <= LARGEST_STD for value in std]
    return len(mean) == len(std) == 3 and all(within)


NORMALIZATIONS = {
    "imagenet": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "cifar10": Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "half": Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


def parse_normalization(text: str, *, setting: str = "teacher_normalization") -> Normalization:
    """A named normalisation or 'm,m,m/s,s,s'; raises `UserError` naming the legal forms.

    Args:
        setting: what the error calls it.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        parts = [tuple(float(v) for v in part.split(",")) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) != 2 or not is_normalization(*parts):
        if re.fullmatch(r"\w+", text):
            raise unknown_name(setting, text, NORMALIZATIONS, keys=(setting,))
        raise UserError(
            f"{setting} must be a name or 'mean,mean,mean/std,std,std' with std of {LEAST_STD:g} "
            f"to {LARGEST_STD:g} and mean of at most {LARGEST_MEAN:g}, got {shorten(text)}.",
            keys=(setting,),
        )
    return Normalization(mean=parts[0], std=parts[1])  # type: ignore[arg-type]
