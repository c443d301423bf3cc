"""Pretrained weights where torchvision and timm keep those that they have downloaded."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import torch

from ekd_ray.config.distill_config import CACHED
from ekd_ray.config.normalization import Triple
from ekd_ray.errors import UserError
from ekd_ray.models.zoo import ALIASES


def cached_weights(name: str) -> Path | None:
    """The default weights of a `torchvision:` or `timm:` model in its library's cache.

    Nothing is fetched. None where there are none, or the model is not of a library.
    """
    library, _, own_name = ALIASES.get(name, name).partition(":")
    find = {"torchvision": _in_torch_hub, "timm": _of_timm}.get(library)
    return find(own_name) if find else None


def locate_weights(name: str, weights: str) -> str:
    """The file that the setting `student_weights` names, for the model `name`.

    Raises:
        UserError: `cached`, and there is none.
    """
    if weights != CACHED:
        return weights
    found = cached_weights(name)
    if found is None:
        raise UserError(
            f"no weights of {name} are cached on this machine (torchvision's lie in "
            f"{_hub_folder()}, timm's there or in the cache of the Hugging Face hub): name a file "
            "of its own (student_weights=FILE; --teacher-weights for a teacher that is trained "
            "already), or download them first.",
            keys=("student_weights",),
        )
    return str(found)


def library_normalization(name: str) -> tuple[Triple, Triple] | None:
    """Mean and deviation [3] of the images that a library's weights were trained on; None where
    it does not say."""
    library, _, own_name = ALIASES.get(name, name).partition(":")
    if library == "timm" and (facts := _timm_facts(own_name)):
        return tuple(facts.mean), tuple(facts.std)
    if library == "torchvision" and (entry := _torchvision_weights(own_name)):
        transforms = entry.transforms()
        return tuple(transforms.mean), tuple(transforms.std)
    return None


def _torchvision_weights(name: str) -> Any:
    from torchvision import models  # slow import

    with contextlib.suppress(ValueError):  # no such model, which building it says better
        return getattr(models.get_model_weights(name), "DEFAULT", None)
    return None


def _timm_facts(name: str) -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module("timm").get_pretrained_cfg(name)
    return None


def _in_torch_hub(name: str) -> Path | None:
    entry = _torchvision_weights(name)
    return _downloaded(entry.url) if entry else None


def _of_timm(name: str) -> Path | None:
    facts = _timm_facts(name)
    if facts is None:
        return None
    if facts.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache  # which timm needs itself

        for file in ("model.safetensors", facts.hf_hub_filename or "pytorch_model.bin"):
            found = try_to_load_from_cache(facts.hf_hub_id, file)
            if isinstance(found, str):
                return Path(found)
    return _downloaded(facts.url) if facts.url else None


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _downloaded(url: str) -> Path | None:
    path = _hub_folder() / url.rpartition("/")[2]
    return path if path.is_file() else None
