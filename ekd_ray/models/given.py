"""Models that are given in Python: an `nn.Module`, or a function that builds one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ekd_ray.config.plugins import MAIN, given_in_python, load_plugin
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, default_cache_dir, make_private
from ekd_ray.models.zoo import REGISTERED, Builder, register_model


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
        return _register(type(model).__name__, Architecture(_pickle_architecture(model)))
    module, name = model.__module__, getattr(model, "__qualname__", "")
    if module != MAIN and getattr(sys.modules.get(module), name, None) is model:
        load_plugin(module)
        return f"{module}:{name}"
    return _register(getattr(model, "__name__", ""), model)


def _register(title: str, build: Builder) -> str:
    """The name of a builder, made of its title and its content; registered once."""
    import cloudpickle  # what is given by name does without

    digest = hashlib.sha256(cloudpickle.dumps(build)).hexdigest()[:8]
    name = f"{re.sub(r'[^A-Za-z0-9_]+', '-', title).strip('-') or 'model'}-{digest}"
    if name not in REGISTERED:
        with given_in_python():
            register_model(name, build)
    return name


def write_given_weights(model: nn.Module) -> Path:
    """Write the weights of a module to the cache, under their hash, as a teacher's checkpoint.

    Raises:
        UserError: as `as_model_name`.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = safetensors.torch.save({name: value.clone() for name, value in state.items()})
    path = default_cache_dir() / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    make_private(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
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
                return _empty_parameter, (tuple(obj.shape), obj.dtype)
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


def _empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))  # trained, though it may have been frozen


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
