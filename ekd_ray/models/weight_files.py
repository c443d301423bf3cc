"""Reading weight files, trusted or not, into named CPU tensors. Nothing in them is executed.

Layouts, told apart by content, not by suffix:

- `ekd_ray`: our safetensors, with JSON under the header key `ekd_ray`
- `mdistiller`: a torch pickle `{"model": state_dict}` (also the authors of EKD; DeiT shares it)
- `akamaster`: a state_dict of a CIFAR ResNet with a stem of 16 channels whose classifier is called
  `linear`, as a rule inside `{"state_dict": ...}` and with every key prefixed `module.`
- `plain`: any other state_dict, pickled or as safetensors (torchvision, timm)
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ekd_ray.errors import UserError

HEADER_KEY = "ekd_ray"
FORMAT_VERSION = 1
_FETCH = "copy or download it again"


def shown(path: Path) -> str:
    """`path` for a one-line message: quoted, control characters escaped."""
    return repr(str(path))


def is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors do: a length of 8 bytes, then a JSON object.

    Raises UserError if the file is missing, a folder, unreadable or empty.
    """
    if path.is_dir():
        raise UserError(f"the weights {shown(path)} are a folder: name the file inside it.")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"the weights file {shown(path)} does not exist: check the path.") from None
    except OSError as error:
        raise UserError(
            f"the weights file {shown(path)} cannot be read ({error.strerror}): "
            "check its permissions and its disk."
        ) from error
    if not head:
        raise UserError(f"the weights file {shown(path)} is empty: {_FETCH}.")
    # Tested before the pickle marks: a header length may begin with the same byte as a pickle.
    if head[8:9] == b"{":
        return True
    if head.startswith((b"PK", b"\x80")):
        return False
    what = "truncated" if path.suffix == ".safetensors" else "no checkpoint"
    raise UserError(
        f"the weights file {shown(path)} is {what}, it begins neither as safetensors nor as "
        f"a file of torch.save: {_FETCH}."
    )


def read_header(path: Path) -> dict[str, Any] | None:
    """Our metadata from a safetensors header; None for files of others. No tensor is read.

    Raises UserError if the file is damaged or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except Exception as error:
        raise _damaged(path) from error
    if text is None:
        return None
    try:
        header = json.loads(text)
        version = header["format_version"]
        if not isinstance(version, int):
            raise TypeError("format_version")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"the weights file {shown(path)} has format version {version}, and this ekd_ray "
            f"reads up to {FORMAT_VERSION}: upgrade ekd_ray."
        )
    return header


def read_tensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Layout and tensors of a weight file, names as our models have them, on the CPU.

    Prefixes of wrappers (`module.`, `_orig_mod.`) are taken off, and akamaster's `linear`
    becomes `fc`. Raises UserError if the file is missing, damaged, unsafe or holds no state_dict.
    """
    if is_safetensors(path):
        layout = "plain" if read_header(path) is None else "ekd_ray"
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise _damaged(path) from error
    else:
        layout, state = _unwrapped(path, _unpickled(path))
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if _is_akamaster(state):
        layout = "akamaster"
        state = {re.sub(r"^linear\.", "fc.", key): value for key, value in state.items()}
    return layout, state


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


def _unpickled(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # Torch warns of odd pickle protocols; whether the file is good is what we answer.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what the file asked for, in one of two wordings.
        found = re.search(r"(?:GLOBAL |safe_globals\(\[)([\w.]+)", str(error))
        asked = f" ({found[1]})" if found else ""
        raise UserError(
            f"the weights file {shown(path)} was refused and not executed, because its pickle "
            f"holds more than tensors{asked} or is damaged: ask its owner for the state_dict "
            "alone, best as safetensors."
        ) from error
    except Exception as error:  # the unpickler meets damage with errors of every kind
        raise _damaged(path) from error


def _unwrapped(path: Path, content: object) -> tuple[str, dict[str, Tensor]]:
    """The state_dict inside what a pickle held, and which project's wrapper it had."""
    layout = "plain"
    if isinstance(content, Mapping):
        for key, wrapped_layout in (("model", "mdistiller"), ("state_dict", "plain")):
            if isinstance(content.get(key), Mapping):
                layout, content = wrapped_layout, content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"the weights file {shown(path)} holds a {type(content).__name__} and no state_dict: "
            "give a file with named tensors, bare or under 'model' or 'state_dict'."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"the weights file {shown(path)} holds no state_dict, its entry {str(key)!r} is a "
                f"{type(value).__name__} and no tensor: give a file with named tensors, bare or "
                "under 'model' or 'state_dict'."
            )
    return layout, dict(content)


def _damaged(path: Path) -> UserError:
    return UserError(
        f"the weights file {shown(path)} is truncated, damaged or no checkpoint: {_FETCH}."
    )
