"""Weights in and out: own safetensors with metadata, and the checkpoints of other projects.

Layouts of files, told apart by content, not by suffix; nothing in a file is executed:

- `ekd_ray`: our safetensors, whose header holds JSON under the key `ekd_ray`: the model's name,
  number of classes, input normalisation, data set and the learned prior of an evidential teacher
- `mdistiller`: a torch pickle `{"model": state_dict}` (also the authors of EKD; DeiT shares it)
- `akamaster`: a state_dict of a CIFAR ResNet with a stem of 16 channels whose classifier is called
  `linear`, as a rule inside `{"state_dict": ...}` and with every key prefixed `module.`
- `plain`: any other state_dict, pickled or as safetensors (torchvision, timm)
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ekd_ray.config.normalization import is_normalization
from ekd_ray.errors import UserError, shorten
from ekd_ray.files import atomic_path, check_format, sha256_file
from ekd_ray.models.checkpoints import (
    Claims,
    damaged,
    file_stamp,
    is_safetensors,
    peelings,
    read_checkpoint,
    refusal,
)
from ekd_ray.models.zoo import ALIASES, MODELS, build_model, is_of_library

HEADER_KEY = "ekd_ray"
FORMAT_VERSION = 1
LARGEST_LOG_PRIOR = 80.0  # exp of more overflows float32
# Names under which DistributedDataParallel and torch.compile hold a model, in its keys as well.
_WRAPPERS = ("module", "_orig_mod")
# Counters that checkpoints older than torch 0.4.1 lack; inference and training work without.
_COUNTER = "num_batches_tracked"
# A class count that no own model has as a width: it marks the classifier's sizes.
_PROBE = 1013

Shapes = dict[str, torch.Size]


@dataclass(frozen=True, kw_only=True)
class WeightsMetadata:
    """Facts about a weight file.

    `sha256` is of the file's bytes. `layout` is "ekd_ray", "mdistiller", "akamaster" or "plain"
    (torchvision, timm and other bare state_dicts). `model` is the zoo's name of the
    architecture, None if unknown. `mean` and `std` are the input normalisation per channel, for
    pixels in [0, 1]. `log_prior` is the learned prior of an evidential teacher, in log scale.
    `num_classes` is 0 where nothing tells (a foreign file in a model that is not of the zoo).
    Foreign files leave `mean`, `std`, `log_prior` and `dataset` None: they do not say. Of a foreign
    file, `key` names the set of weights (None where it is the file itself), `other_keys` those that
    were not taken, and `claims` is what it says of its accuracy, classes and architecture.
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
    key: str | None = None
    other_keys: tuple[str, ...] = ()
    claims: Claims = Claims()


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

    Raises UserError if `mean` / `std` / `log_prior` are not finite numbers or `extra` is not
    JSON, OSError if the disk refuses.
    """
    try:
        header = {
            "format_version": FORMAT_VERSION,
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
            f"the metadata for {str(path)!r} must be finite numbers and plain JSON "
            f"({error}): correct log_prior, mean, std or extra."
        ) from error
    # Copies: safetensors refuses tensors that share memory, and a row-major layout is what
    # makes the bytes independent of channels_last.
    state = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in _unwrap(model).state_dict().items()
    }
    # One metadata key only: safetensors writes several in random order.
    data = safetensors.torch.save(state, {HEADER_KEY: text})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_metadata(
    path: str | os.PathLike[str], *, whole_classifier: bool = True, key: str | None = None
) -> WeightsMetadata:
    """The metadata that `load_weights` returns, without a model.

    Of our own files only the header is read. The class count of a foreign file is taken from
    its classifier's shape, and `model` is the own model that its names and shapes fit, if any.
    Raises UserError for a file that is missing, damaged, unsafe, of a newer format, or without
    a recognisable classifier, unless `whole_classifier` is false: then `num_classes` is 0.
    """
    path = Path(path)
    if is_safetensors(path) and key is None and (metadata := _read_header(path)):
        return metadata
    metadata = _read_facts(path, key, file_stamp(path))
    if not metadata.num_classes and whole_classifier:
        raise refusal(
            path,
            "has no classifier under a known name (fc, linear, classifier, head)",
            "give the weights of a whole image classifier",
        )
    return metadata


@functools.lru_cache(maxsize=64)
def _read_facts(path: Path, key: str | None, stamp: object) -> WeightsMetadata:
    """Those of `read_metadata` of a foreign file, which is read again under another stamp."""
    state, metadata = _read_tensors(path, key)
    shapes = _shapes(state)
    num_classes = _class_count(shapes)
    return replace(
        metadata,
        model=_find_own_model(shapes, num_classes) if num_classes else None,
        num_classes=num_classes or 0,
    )


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, key: str | None = None
) -> WeightsMetadata:
    """Load a weight file into `model`, strictly, and return the file's metadata.

    Every parameter and buffer of the model must be in the file with its shape, and nothing
    else; only `num_batches_tracked` may be absent. Values are converted to the model's dtypes
    and stay on its device. Everything is checked before the first value is written: the model
    is unchanged if the call raises. `key` names one of several sets of weights in the file.

    Raises UserError, one line that names the file and the cure: missing, truncated, unsafe or
    newer file, another architecture or class count, tensors that are missing, surplus, of
    another shape, not floating-point, or not finite.
    """
    return _load(model, Path(path), new_classes=False, key=key)


def load_backbone(model: nn.Module, path: str | os.PathLike[str]) -> WeightsMetadata:
    """As `load_weights`, but a file of another number of classes leaves the classifier as it is.

    The metadata's `num_classes` is that of the file.
    """
    return _load(model, Path(path), new_classes=True)


def _load(
    model: nn.Module, path: Path, *, new_classes: bool, key: str | None = None
) -> WeightsMetadata:
    model = _unwrap(model)
    own: dict[str, Tensor] = model.state_dict()
    state, metadata = _read_tensors(path, key, own)
    wanted, found = _shapes(own), _shapes(state)
    classes = _model_classes(model, wanted)
    wrong = [key for key in wanted if key in found and wanted[key] != found[key]]
    if new_classes and _only_classes_differ(model, wanted, found, wrong):
        classes = found[wrong[0]][0]
        for name in wrong:
            del wanted[name], found[name], state[name]
    _check_names_and_shapes(path, model, wanted, found, metadata)
    # Absent counters keep the model's value.
    fitted = own | {name: _convert(path, name, state[name], own[name].dtype) for name in state}
    if metadata.layout != "ekd_ray":
        stated = getattr(model, "ekd_name", None)
        metadata = replace(metadata, model=stated, num_classes=classes)
    model.load_state_dict(fitted, strict=True)
    return metadata


def load_model(
    name: str, num_classes: int, path: str | os.PathLike[str], *, key: str | None = None
) -> nn.Module:
    """A model of the zoo with the weights of a file, in evaluation mode.

    A network of a library, which may be a giant, is first laid out without memory: it is built
    when its parameters are known to be those of the file.

    Raises UserError as `build_model` and `load_weights` do.
    """
    if is_of_library(name):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            layout = build_model(name, num_classes)
        own = _shapes(layout.state_dict())
        state, metadata = _read_tensors(Path(path), key, own)
        _check_names_and_shapes(Path(path), layout, own, _shapes(state), metadata)
    model = build_model(name, num_classes)
    load_weights(model, path, key=key)
    return model.eval()


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel, whose keys have no prefix."""
    while True:
        children = dict(model.named_children())
        if len(children) != 1 or next(iter(children)) not in _WRAPPERS:
            return model
        (model,) = children.values()


# Reading a file, trusted or not, into named tensors on the CPU.


def _read_header(path: Path) -> WeightsMetadata | None:
    """The metadata of an own safetensors file, None for one of others. No tensor is read.

    Raises UserError if the file is damaged or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
        if text is None:
            return None
        header = json.loads(text)
        version = header["format_version"]
        if not isinstance(version, int):
            raise TypeError("format_version")
    except Exception as error:  # damage comes as errors of every kind
        raise damaged(path) from error
    check_format(f"the weights file {str(path)!r}", version, FORMAT_VERSION)

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
        stated = (metadata.mean, metadata.std)
        if stated != (None, None) and not is_normalization(*(part or () for part in stated)):
            raise ValueError("normalization")
        if not abs(metadata.log_prior or 0.0) <= LARGEST_LOG_PRIOR:
            raise ValueError("log_prior")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = "has ekd_ray metadata with missing or impossible values"
        raise refusal(path, problem) from error
    return metadata


def _read_tensors(
    path: Path, key: str | None = None, own: Collection[str] = ()
) -> tuple[dict[str, Tensor], WeightsMetadata]:
    """Tensors of a weight file, names as our models have them, and what it says about itself.

    Names of wrappers (`module.`, `model.`) are taken off, as far as the names of `own` want it, all
    without them, and akamaster's `linear` becomes `fc`. The metadata of a foreign file are without
    model and classes. Raises UserError if the file is missing, damaged, unsafe or holds no
    state_dict.
    """
    if is_safetensors(path) and (metadata := _read_header(path)):
        if key is not None:
            raise refusal(path, f"has one set of weights, got teacher_key {key!r}", "leave it out")
        try:
            state = safetensors.torch.load_file(path)
        except Exception as error:
            raise damaged(path) from error
        return _peel(state, own), metadata
    found = read_checkpoint(path, key)
    state, layout = _peel(found.state, own), found.layout
    if _is_akamaster(state):
        layout = "akamaster"
        state = {re.sub(r"^linear\.", "fc.", name): value for name, value in state.items()}
    return state, WeightsMetadata(
        sha256=sha256_file(path),
        layout=layout,
        model=None,
        num_classes=0,
        key=found.key,
        other_keys=found.others,
        claims=found.claims,
    )


def _peel(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Without wrappers: of all peelings the one that has most of the names `own`; where none has
    all, what lies below the only prefix that has, whatever else the file holds."""
    found = peelings(state)
    wanted = [name for name in own if not name.endswith(_COUNTER)]
    if not wanted:
        return found[-1]
    best = max(reversed(found), key=lambda peeled: len(peeled.keys() & own))
    if best.keys() >= {*wanted}:
        return best
    prefixes = [key.removesuffix(wanted[0]) for key in state if key.endswith(f".{wanted[0]}")]
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in wanted)]
    if len(whole) != 1:
        return best
    (prefix,) = whole
    below = (key for key in state if key.startswith(prefix))
    return {key.removeprefix(prefix): state[key] for key in below}


def _is_akamaster(state: Mapping[str, Tensor]) -> bool:
    """Whether the classifier `linear` is what our CIFAR ResNets call `fc`.

    The ResNets and ShuffleNets of mdistiller, whose classifier is rightly `linear`, have the same
    names in front; their stems have 64 and 24 channels.
    """
    stem = state.get("conv1.weight")
    return (
        stem is not None
        and stem.shape == (16, 3, 3, 3)
        and "linear.weight" in state
        and "layer1.0.conv1.weight" in state
        and "fc.weight" not in state
    )


# Whether the tensors of a file are those of a model.


def _check_names_and_shapes(
    path: Path, model: nn.Module, own: Shapes, found: Shapes, metadata: WeightsMetadata
) -> None:
    name, stated = getattr(model, "ekd_name", None), metadata.model
    if stated and name and ALIASES.get(stated, stated) != ALIASES.get(name, name):
        cure = "build the model that the file names, or give other weights"
        raise refusal(path, f"holds a {stated!r}, the model is a {name!r}", cure)
    missing = [key for key in own if key not in found and not key.endswith(_COUNTER)]
    surplus = [key for key in found if key not in own]
    wrong = [key for key in own if key in found and own[key] != found[key]]
    if not (missing or surplus or wrong):
        return
    if missing or surplus:
        # Names before shapes: they tell architectures apart, shapes then only follow.
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of the model's tensors (first: {missing[0]!r})")
        if surplus:
            parts.append(f"has {len(surplus)} that the model lacks (first: {surplus[0]!r})")
        problem = " and ".join(parts)
    elif _only_classes_differ(model, own, found, wrong):
        raise refusal(
            path,
            f"has {found[wrong[0]][0]} classes, the model {own[wrong[0]][0]}",
            "build the model with the file's number of classes, or give weights trained on this "
            "data set",
        )
    else:
        key = wrong[0]
        problem = f"has {key!r} with shape {list(found[key])}, the model {list(own[key])}"
    classes = _class_count(found)
    fitting = _find_own_model(found, classes) if classes else None
    cure = (
        f"use {fitting!r} with {classes} classes, whose weights these are"
        if fitting
        else f"build the model that the weights were made for{describe_nearest(found, metadata)}"
    )
    raise refusal(path, problem, cure)


def _only_classes_differ(
    model: nn.Module, own: Shapes, found: Shapes, wrong: Sequence[str]
) -> bool:
    """Whether all differing shapes differ in the first size alone, and that one is the classes."""
    if any(not found[key] or own[key][1:] != found[key][1:] for key in wrong):
        return False
    sizes = {(own[key][0], found[key][0]) for key in wrong}
    return len(sizes) == 1 and own[wrong[0]][0] == _model_classes(model, own)


def _convert(path: Path, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the model's dtype; UserError unless it is an ordinary, finite tensor."""
    value = value.detach()
    ordinary = (
        value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )
    # Integer buffers (counters, index tables) may be of any real dtype: old tools wrote floats.
    if not ordinary or (dtype.is_floating_point and not value.dtype.is_floating_point):
        kind = f"{value.dtype} ({value.layout}), which is not an ordinary floating-point tensor"
        raise refusal(path, f"has {key!r} as {kind}", f"convert the weights to {dtype}")
    converted = value.to(dtype)
    # After the conversion, which may overflow; integers would hide a NaN, so those before it.
    if not torch.isfinite(converted if dtype.is_floating_point else value.double()).all():
        cure = "its training diverged or the file is damaged, give other weights"
        raise refusal(path, f"has NaN or infinite values in {key!r}", cure)
    return converted


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: value.shape for key, value in state.items()}


def _class_count(shapes: Shapes) -> int | None:
    """Rows of the last classifier layer, None if no layer has a classifier's usual name."""
    usual = re.compile(r"(fc|linear|classifier|heads?)\.(.*\.)?weight")
    layers = [key for key, shape in shapes.items() if usual.fullmatch(key) and len(shape) in (2, 4)]
    # Numbers compare as numbers (classifier.6 before classifier.10); the order in a file is free.
    layers.sort(key=lambda key: [(len(part), part) for part in key.split(".")])
    return shapes[layers[-1]][0] if layers else None


def _model_classes(model: nn.Module, own: Shapes) -> int:
    """Class count of a model: what the zoo noted, else its classifier's rows, else 0 (unknown)."""
    return getattr(model, "ekd_num_classes", None) or _class_count(own) or 0


def _find_own_model(found: Shapes, num_classes: int) -> str | None:
    """The own model whose parameter names and shapes are these, None if there is none."""
    wanted = _without_counters(found)
    for name in MODELS:
        own = {
            key: torch.Size(num_classes if size == _PROBE else size for size in shape)
            for key, shape in _zoo_shapes(name).items()
        }
        if own == wanted:
            return name
    return None


def describe_nearest(found: Shapes, metadata: WeightsMetadata) -> str:
    """The end of a sentence on weights of an unknown network: what it may be."""
    if stated := metadata.claims.architecture:
        return f" (the file calls it {shorten(stated)})"
    shapes = Counter(_without_counters(found).values())

    def likeness(name: str) -> float:
        own = Counter(_zoo_shapes(name).values())
        return (own & shapes).total() / (own | shapes).total()

    nearest = max(MODELS, key=likeness)
    share = likeness(nearest)
    return f" (the nearest of the zoo is {nearest}: {share:.0%} of the shapes)" * (share >= 0.3)


@functools.cache
def _zoo_shapes(name: str) -> Shapes:
    """Shapes of an own model of `_PROBE` classes, without its counters.

    Cached, because building the whole zoo takes 2 s.
    """
    # Real memory, not the meta device, which is not faster; the caller's draws stay.
    with torch.random.fork_rng(devices=[]):
        return _without_counters(_shapes(build_model(name, _PROBE).state_dict()))


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}
