"""Configurations of every method, and batches, for the tests of the objective."""

from __future__ import annotations

import itertools
import typing

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ekd_ray.config import DistillConfig
from ekd_ray.losses.method_checks import everything_on
from ekd_ray.losses.methods import METHODS, resolve_method
from ekd_ray.losses.objective import Objective

torch.set_num_threads(1)

FIELDS = {field.name: field for field in DistillConfig.fields()}
HINTS = typing.get_type_hints(DistillConfig)
# The setting that ramps a weight up -> the weight.
RAMPS = {
    term.warmup: term.weight for method in METHODS.values() for term in method.terms if term.warmup
}


def build(method, **values):
    return Objective(resolve_method(DistillConfig(method=method, **values)))


def settings_of(method):
    return METHODS[method].setting_names


def terms_of(method, weight):
    """The terms of a method that one weight multiplies."""
    return [n for term in METHODS[method].terms if term.weight == weight for n in term.names]


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
    yield {"rld_alpha": 0.5, "rld_beta": 2.0, "rld_confidence_temperature": 2.0}
    yield {"ttm_exponent": 0.4}
    yield {"dist_inter": 0.5, "dist_intra": 3.0}
    yield {"wkd_sharpen": 2.0, "wkd_epsilon": 0.1, "wkd_iterations": 3, "wkd_decay": 2}


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
