"""Configurations of every method, and batches, for the tests of the objective."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ekd_ray.config import DistillConfig
from ekd_ray.losses.methods import METHODS, resolve_method
from ekd_ray.losses.objective import Objective

torch.set_num_threads(1)

FIELDS = {field.name: field for field in DistillConfig.fields()}
HINTS = typing.get_type_hints(DistillConfig)
# Terms between student and target; all others are between student and teacher.
TARGET_TERMS = {"ce", "prior_kl"}
# Terms that compare samples with each other, and their factor when every sample comes twice:
# a batch alignment has 4 times the pairs over 2 B, a class alignment doubled entries over C.
PAIRWISE_TERMS = {"batch": 2.0, "class": 4.0}
# The setting that ramps a weight up -> the weight.
RAMPS = {
    term.warmup: term.weight for method in METHODS.values() for term in method.terms if term.warmup
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Logits [B, C] of both views, and targets [B]."""

    student: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    student_strong: torch.Tensor
    teacher_strong: torch.Tensor

    def map(self, function):
        """`function` on every tensor."""
        return Batch(**{name: function(value) for name, value in vars(self).items()})

    def to(self, dtype):
        return self.map(lambda value: value.to(dtype) if value.is_floating_point() else value)

    def replace(self, **values):
        return dataclasses.replace(self, **values)

    def with_gradients(self):
        """Fresh leaves; the targets stay."""
        return self.map(
            lambda value: (
                value.detach().clone().requires_grad_() if value.is_floating_point() else value
            )
        )

    def students(self, method):
        """The student's logits that the method looks at."""
        return [self.student, *([self.student_strong] if METHODS[method].strong_view else [])]


def draw(seed=0, batch=6, classes=7, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, student_strong, teacher_strong = (
        scale * torch.randn(4, batch, classes, generator=generator, dtype=torch.float64)
    ).to(dtype)
    target = torch.randint(classes, (batch,), generator=generator)
    return Batch(student, teacher, target, student_strong, teacher_strong)


def run(objective, batch, epoch=1):
    """Total and terms; the strong view is given only to methods that ask for it."""
    strong = {}
    if objective.method.strong_view:
        strong = {"student_strong": batch.student_strong, "teacher_strong": batch.teacher_strong}
    return objective(batch.student, batch.teacher, batch.target, epoch, **strong)


def build(method, **values):
    return Objective(resolve_method(DistillConfig(method=method, **values)))


def settings_of(method):
    return METHODS[method].setting_names


def weights_of(method):
    return list(dict.fromkeys(term.weight for term in METHODS[method].terms))


def terms_of(method, weight):
    """The terms of a method that one weight multiplies."""
    return [n for term in METHODS[method].terms if term.weight == weight for n in term.names]


def everything_on(method):
    """Distinct non-zero weights for every term of a method, without ramps."""
    uses = settings_of(method)
    weights = {name: 0.5 + 0.25 * i for i, name in enumerate(weights_of(method))}
    return weights | {name: 0 for name in uses if name.endswith("_warmup")}


def _options():
    """Settings to vary; a method gets those whose every setting it uses."""
    evidence = FIELDS["evidence"].metadata["choices"]
    yield {}
    yield {"standardize": True}
    yield from ({"evidence": kind} for kind in evidence)
    yield from ({"standardize": True, "evidence": kind} for kind in evidence)
    yield from ({"prior_kl_evidence": kind} for kind in evidence)
    yield {"learn_log_prior": True}
    yield {"learn_log_prior": True, "log_prior": -1.2}
    yield {"log_prior": -1.2, "teacher_log_prior": 0.4}
    yield {"temperature": 3.0}
    yield {"ekd_temperature": 2.0}
    yield {"dkd_alpha": 0.5, "dkd_beta": 2.0}
    yield {"ctkd_t_start": 0.5, "ctkd_t_end": 5.0}


def variants():
    """(method, settings): every option that the method uses, and its defaults, ramps on."""
    for (method, entry), option in itertools.product(METHODS.items(), _options()):
        if set(option) <= set(entry.setting_names):
            yield method, {**everything_on(method), **option}
    yield from ((method, {}) for method in METHODS)


def _variant_id(value):
    if isinstance(value, str):
        return value
    shown = {k: v for k, v in value.items() if not k.endswith(("_weight", "_warmup"))}
    return ",".join(f"{k}={v}" for k, v in shown.items()) or ("plain" if value else "defaults")


def variants_where(keep):
    """Parametrise over the variants whose settings satisfy `keep`."""
    kept = [(method, values) for method, values in variants() if keep(values)]
    return pytest.mark.parametrize(("method", "values"), kept, ids=_variant_id)


every_variant = variants_where(lambda values: True)
every_method = pytest.mark.parametrize("method", METHODS)
every_weight = pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in METHODS for name in weights_of(method)]
)


def methods_where(flag, value=True):
    """Parametrise over the methods whose entry says so, e.g. `strong_view`."""
    return pytest.mark.parametrize(
        "method", [name for name, entry in METHODS.items() if bool(getattr(entry, flag)) == value]
    )


class AutocastRecorder(TorchFunctionMode):
    """Notes whether autocast is on, for every operation of that name that makes a tensor."""

    def __init__(self, name=""):
        super().__init__()
        self.name = name
        self.enabled = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self.name in getattr(function, "__name__", ""):
            self.enabled.append(torch.is_autocast_enabled("cpu"))
        return result
