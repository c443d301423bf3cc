"""Weights in and out: own safetensors with metadata, and the checkpoints of other projects.

Own files are safetensors whose header holds JSON under the key `ekd_ray`: the model's name,
number of classes, input normalisation, data set and the learned prior of an evidential teacher,
so that whoever distils from the file needs nothing else. Foreign layouts are listed in
`ekd_ray.models.weight_files`; pickles are read with `weights_only=True` or refused.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, sha256_file
from ekd_ray.models import weight_files
from ekd_ray.models.weight_files import shown
from ekd_ray.models.zoo import ALIASES, MODELS, build_model

# Counters that checkpoints older than torch 0.4.1 lack; inference and training work without.
_COUNTER = "num_batches_tracked"
# A class count that is no width inside an own model: it marks the classifier's sizes.
_PROBE = 1013


@dataclass(frozen=True, kw_only=True)
class WeightsMetadata:
    """What is known about a weight file.

    `sha256` is of the file's bytes. `layout` is "ekd_ray", "mdistiller", "akamaster" or "plain"
    (torchvision, timm and other bare state_dicts). `model` is the zoo's name of the
    architecture, None if unknown. `mean` and `std` are the input normalisation per channel, for
    pixels in [0, 1]. `log_prior` is the learned prior of an evidential teacher, in log scale.
    `num_classes` is 0 where nothing tells (a foreign file in a model that is not of the zoo).
    Foreign files leave `mean`, `std`, `log_prior` and `dataset` None: they do not say.
    """

    sha256: str
    layout: str
    model: str | None
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    log_prior: float | None = None
    dataset: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    model_name: str,
    num_classes: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    log_prior: float | None = None,
    dataset: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's parameters and buffers, dtypes kept, as safetensors with metadata.

    The file appears atomically; equal tensors and metadata give equal bytes, whatever the
    device or memory format. A model inside torch.compile or DDP is saved without the wrapper.
    `extra` is for the caller and must be JSON without NaN.

    Raises UserError if `mean` / `std` / `log_prior` are not finite numbers or `extra` is no
    JSON, OSError if the disk refuses.
    """
    try:
        header = {
            "format_version": weight_files.FORMAT_VERSION,
            "model": model_name,
            "num_classes": num_classes,
            "mean": None if mean is None else [float(value) for value in mean],
            "std": None if std is None else [float(value) for value in std],
            "log_prior": None if log_prior is None else float(log_prior),
            "dataset": dataset,
            "extra": dict(extra or {}),
        }
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the metadata for {shown(Path(path))} must be finite numbers and plain JSON "
            f"({error}): correct log_prior, mean, std or extra."
        ) from error
    # Copies: safetensors refuses tensors that share memory, and a row-major layout is what
    # makes the bytes independent of channels_last.
    state = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in _bare(model).state_dict().items()
    }
    # One metadata key only: safetensors writes several in random order.
    data = safetensors.torch.save(state, {weight_files.HEADER_KEY: text})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_metadata(path: str | os.PathLike[str]) -> WeightsMetadata:
    """What `load_weights` would report, without a model; of our own files only the header is read.

    The class count of a foreign file is taken from its classifier's shape, and `model` is the
    own model that its names and shapes fit, if any. Raises UserError for a file that is
    missing, damaged, unsafe, of a newer format, or without a recognisable classifier.
    """
    path = Path(path)
    header = weight_files.read_header(path) if weight_files.is_safetensors(path) else None
    if header is not None:
        return _from_header(path, header)
    layout, state = weight_files.read_tensors(path)
    num_classes = _class_count(_shapes(state))
    if num_classes is None:
        raise UserError(
            f"the weights file {shown(path)} has no classifier under a known name (fc, linear, "
            "classifier, head): give the weights of a whole image classifier."
        )
    return WeightsMetadata(
        sha256=sha256_file(path),
        layout=layout,
        model=_fitting_model(_shapes(state), num_classes),
        num_classes=num_classes,
    )


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> WeightsMetadata:
    """Load a weight file into `model`, strictly, and return what is known about the file.

    Every parameter and buffer of the model must be in the file with its shape, and nothing
    else; only `num_batches_tracked` may be absent. Values are converted to the model's dtypes
    and stay on its device. Everything is checked before the first value is written: the model
    is unchanged if the call raises.

    Raises UserError, one line that names the file and the cure: missing, truncated, unsafe or
    newer file, another architecture or class count, tensors that are missing, surplus, of
    another shape, not floating-point, or not finite.
    """
    path = Path(path)
    model = _bare(model)
    layout, state = weight_files.read_tensors(path)
    header = weight_files.read_header(path) if layout == "ekd_ray" else None
    metadata = _from_header(path, header) if header is not None else None
    own: dict[str, Tensor] = model.state_dict()
    _check_names_and_shapes(path, model, _shapes(own), _shapes(state), metadata)
    # Absent counters keep the model's value.
    fitted = own | {key: _checked(path, key, state[key], own[key].dtype) for key in state}
    metadata = metadata or WeightsMetadata(
        sha256=sha256_file(path),
        layout=layout,
        model=getattr(model, "ekd_name", None),
        num_classes=_model_classes(model, _shapes(own)),
    )
    model.load_state_dict(fitted, strict=True)
    return metadata


def _from_header(path: Path, header: dict[str, Any]) -> WeightsMetadata:
    def numbers(value: Any) -> tuple[float, ...] | None:
        return None if value is None else tuple(float(number) for number in value)

    try:
        metadata = WeightsMetadata(
            sha256=sha256_file(path),
            layout="ekd_ray",
            model=str(header["model"]),
            num_classes=int(header["num_classes"]),
            mean=numbers(header["mean"]),
            std=numbers(header["std"]),
            log_prior=None if header["log_prior"] is None else float(header["log_prior"]),
            dataset=None if header["dataset"] is None else str(header["dataset"]),
            extra=dict(header["extra"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _bad_header(path) from error
    values = (metadata.log_prior or 0.0, *(metadata.mean or ()), *(metadata.std or ()))
    if not all(math.isfinite(value) for value in values):
        raise _bad_header(path)
    return metadata


def _bad_header(path: Path) -> UserError:
    return UserError(
        f"the weights file {shown(path)} has ekd_ray metadata with missing or impossible values: "
        "copy or download it again."
    )


def _check_names_and_shapes(
    path: Path,
    model: nn.Module,
    own: dict[str, torch.Size],
    found: dict[str, torch.Size],
    metadata: WeightsMetadata | None,
) -> None:
    built_as = getattr(model, "ekd_name", None)
    if metadata and built_as and _same_name(metadata.model) != _same_name(built_as):
        raise UserError(
            f"the weights file {shown(path)} holds a {metadata.model!r}, the model is a "
            f"{built_as!r}: build the model that the file names, or give other weights."
        )
    missing = [key for key in own if key not in found and not key.endswith(_COUNTER)]
    surplus = [key for key in found if key not in own]
    wrong = [key for key in own if key in found and own[key] != found[key]]
    if not (missing or surplus or wrong):
        return
    if wrong and not (missing or surplus) and _only_classes_differ(model, own, found, wrong):
        raise UserError(
            f"the weights file {shown(path)} has {found[wrong[0]][0]} classes, the model "
            f"{own[wrong[0]][0]}: build the model with the file's number of classes, or give "
            "weights trained on this data set."
        )
    if missing or surplus:
        # Names before shapes: they tell architectures apart, shapes then only follow.
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of the model's tensors (first: {missing[0]!r})")
        if surplus:
            parts.append(f"has {len(surplus)} that the model lacks (first: {surplus[0]!r})")
        problem = " and ".join(parts)
    else:
        key = wrong[0]
        problem = f"has {key!r} with shape {list(found[key])}, the model {list(own[key])}"
    classes = _class_count(found)
    fitting = _fitting_model(found, classes) if classes else None
    cure = (
        f"use {fitting!r} with {classes} classes, whose weights these are"
        if fitting
        else "build the model that the weights were made for"
    )
    raise UserError(f"the weights file {shown(path)} {problem}: {cure}.")


def _same_name(model_name: str | None) -> str | None:
    """One name for an alias and what it stands for."""
    return ALIASES.get(model_name, model_name) if model_name else None


def _checked(path: Path, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the model's dtype, refused unless it is an ordinary tensor of finite numbers."""
    value = value.detach()
    ordinary = (
        value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )
    # Integer buffers (counters, index tables) may be of any real dtype: old tools wrote floats.
    if not ordinary or (dtype.is_floating_point and not value.dtype.is_floating_point):
        raise UserError(
            f"the weights file {shown(path)} has {key!r} as {value.dtype} ({value.layout}), which "
            f"is no ordinary floating-point tensor: convert the weights to {dtype}."
        )
    converted = value.to(dtype)
    # After the conversion, which may overflow; integers would hide a NaN, so those before it.
    if not torch.isfinite(converted if dtype.is_floating_point else value.double()).all():
        raise UserError(
            f"the weights file {shown(path)} has NaN or infinite values in {key!r}: its training "
            "diverged or the file is damaged, give other weights."
        )
    return converted


def _bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel, whose names have no prefix."""
    while True:
        # The compiler's wrapper is known by its attribute: naming its class imports the compiler.
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _class_count(shapes: Mapping[str, torch.Size]) -> int | None:
    """Rows of the last classifier layer, None if no layer has a classifier's usual name."""
    layers = [
        key
        for key, shape in shapes.items()
        if re.match(r"(fc|linear|classifier|heads?)\.(.*\.)?weight$", key) and len(shape) in (2, 4)
    ]
    # Numbers compare as numbers (classifier.6 before classifier.10); the order in a file is free.
    natural = [[(len(part), part) for part in key.split(".")] for key in layers]
    return shapes[layers[natural.index(max(natural))]][0] if layers else None


def _model_classes(model: nn.Module, own: Mapping[str, torch.Size]) -> int:
    """Class count of a model: what the zoo noted, else its classifier's rows, else 0 (unknown)."""
    return getattr(model, "ekd_num_classes", None) or _class_count(own) or 0


def _only_classes_differ(
    model: nn.Module,
    own: Mapping[str, torch.Size],
    found: Mapping[str, torch.Size],
    wrong: Sequence[str],
) -> bool:
    """Whether all differing shapes differ in the first size alone, and that one is the classes."""
    if any(not found[key] or own[key][1:] != found[key][1:] for key in wrong):
        return False
    sizes = {(own[key][0], found[key][0]) for key in wrong}
    return len(sizes) == 1 and own[wrong[0]][0] == _model_classes(model, own)


def _fitting_model(found: Mapping[str, torch.Size], num_classes: int) -> str | None:
    """The own model whose parameter names and shapes are these, None if there is none."""
    wanted = {key: shape for key, shape in found.items() if not key.endswith(_COUNTER)}
    for name in MODELS:
        own = {
            key: torch.Size(num_classes if size == _PROBE else size for size in shape)
            for key, shape in _zoo_shapes(name).items()
        }
        if own == wanted:
            return name
    return None


@functools.cache
def _zoo_shapes(name: str) -> dict[str, torch.Size]:
    """Shapes of an own model of `_PROBE` classes, without its counters.

    Cached, building the whole zoo takes 2 s.
    """
    # Real memory, not the meta device, which is no faster; the caller's draws stay.
    with torch.random.fork_rng(devices=[]):
        shapes = _shapes(build_model(name, _PROBE).state_dict())
    return {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}
