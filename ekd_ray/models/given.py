"""Models that are given in Python: an `nn.Module`, or a function that builds one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ekd_ray.config.plugins import MAIN, given_in_python, load_plugin
from ekd_ray.errors import UserError
from ekd_ray.files import default_cache_dir, sha256_file
from ekd_ray.models.weights import save_weights
from ekd_ray.models.zoo import Builder, register_model

_names: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def as_model_name(model: str | nn.Module | Builder) -> str:
    """The name under which a model of any form is known to configurations.

    Args:
        model: a name; a function `build(num_classes) -> nn.Module`; or an `nn.Module`, of which
            the architecture alone is taken, because each run draws its weights anew, by the
            `reset_parameters` of its layers.

    Raises:
        UserError: a module some parameters of which no layer can draw anew.
    """
    if isinstance(model, str):
        return model
    if isinstance(model, nn.Module):
        if model not in _names:
            data = _pickle_architecture(model)
            _names[model] = f"{type(model).__name__}-{hashlib.sha256(data).hexdigest()[:8]}"
            with given_in_python():
                register_model(_names[model], Architecture(data))
        return _names[model]
    module, name = model.__module__, getattr(model, "__qualname__", "")
    if module != MAIN and getattr(sys.modules[module], name, None) is model:
        load_plugin(module)
        return f"{module}:{name}"
    if model not in _names:
        _names[model] = f"{getattr(model, '__name__', 'model')}-{len(_names)}"
        with given_in_python():
            register_model(_names[model], model)
    return _names[model]


def write_given_weights(
    model: nn.Module, *, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> Path:
    """Write the weights of a module to the cache, under their hash, as a teacher's checkpoint.

    Args:
        num_classes: of its logits; mean, std: with which its inputs are normalised, per channel.
    """
    name = as_model_name(model)
    new = default_cache_dir() / "given" / f"{name}.safetensors"
    save_weights(model, new, model_name=name, num_classes=num_classes, mean=mean, std=std)
    path = new.with_name(f"{name}-{sha256_file(new)[:12]}.safetensors")
    new.replace(path)
    return path


class Architecture:
    """Builds a module that was given, with new weights.

    Args:
        data: the pickled module, its parameters without their values.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self, num_classes: int) -> nn.Module:
        model: nn.Module = pickle.loads(self.data)
        for layer in model.modules():
            if draw := _drawer(layer):
                draw()
        return model


def _drawer(layer: nn.Module) -> Callable[[], object] | None:
    """The function of a layer that draws its weights; torch's attention has it as private."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(found := getattr(layer, name, None)):
            return found
    return None


def _pickle_architecture(model: nn.Module) -> bytes:
    import cloudpickle  # what is given by name does without

    fixed = [
        f"{path or type(model).__name__}.{name}"
        for path, layer in model.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
        if _drawer(layer) is None
    ]
    if fixed:
        raise UserError(
            f"the weights of this {type(model).__name__} cannot be drawn anew, because "
            f"{fixed[0]} is of a layer without reset_parameters ({len(fixed)} such): give a "
            "function build(num_classes) that makes it, or add that method."
        )

    class Pickler(cloudpickle.Pickler):
        """Leaves the values of parameters out."""

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, nn.Parameter):
                return _empty_parameter, (tuple(obj.shape), obj.dtype, obj.requires_grad)
            return super().reducer_override(obj)

    file = io.BytesIO()
    try:
        with _pickled_by_value(model):
            Pickler(file).dump(model)
    except Exception as error:
        raise UserError(
            f"this {type(model).__name__} cannot be sent to other processes ({error}): give a "
            "function build(num_classes) that makes it, in a FILE.py."
        ) from error
    return file.getvalue()


def _empty_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=requires_grad)


@contextlib.contextmanager
def _pickled_by_value(model: nn.Module) -> Iterator[None]:
    """The classes of layers go with the pickle, unless they are of an installed package."""
    import cloudpickle

    modules: list[ModuleType] = []
    for name in sorted({type(layer).__module__ for layer in model.modules()} - {MAIN}):
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "site-packages" not in file and name.partition(".")[0] != "ekd_ray":
            modules.append(sys.modules[name])
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
