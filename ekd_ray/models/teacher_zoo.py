"""Finding a teacher's weight file in a folder laid out as mdistiller's `cifar_teachers`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ekd_ray.errors import UserError, nearest_names

_SUFFIXES = (".pth", ".pt", ".th", ".safetensors")
_VANILLA = "_vanilla"


def find_teacher(folder: str | os.PathLike[str], model_name: str) -> Path:
    """The weight file of `model_name` in `folder`; the first that exists of:

    - `<name>_vanilla/`, then `<name>/`: the `ckpt_epoch_<n>` of the highest epoch, else the file
      with a weight suffix (.pth, .pt, .th, .safetensors) that was modified last
    - `<name>.pth`, `<name>.pt`, `<name>.th`, `<name>.safetensors`

    The colon of a library's name is an underscore on the disk: `timm:deit_tiny_patch16_224` is
    looked for as `timm_deit_tiny_patch16_224`. Upper and lower case differ, on every file
    system. The file is not opened. Raises UserError if there is none or no such folder.
    """
    teachers = list_teachers(folder)
    if model_name in teachers:
        return teachers[model_name]
    usual = f"{model_name.replace(':', '_')}{_VANILLA}/ckpt_epoch_240.pth"
    raise UserError(
        f"the folder {str(folder)!r} has no weights of {model_name!r}."
        f"{nearest_names(model_name, teachers)} Put them at {usual} below it, or name a weights "
        "file."
    )


def list_teachers(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Every model with weights in `folder`, by name in alphabetical order, as `find_teacher` finds.

    A name is what the folder or file is called; whether the zoo knows it is not checked. Raises
    UserError if the folder is missing or cannot be read.
    """
    try:
        # A listing, not a look-up by name: some file systems take resnet18 for ResNet18.
        entries = [entry for entry in Path(folder).iterdir() if not entry.name.startswith(".")]
        found = [ranked for entry in entries if (ranked := _weights_of(entry))]
    except OSError as error:
        raise UserError(
            f"the teachers' folder {str(folder)!r} cannot be read ({error.strerror}: "
            f"{str(error.filename)!r}): check the path and its permissions."
        ) from error
    # By name, then by rank: the last of equal keys stays.
    return {name: path for name, _, path in sorted(found)}


def _weights_of(entry: Path) -> tuple[str, int, Path] | None:
    """(model name, rank, weight file) of an entry of the folder; the higher rank wins."""
    if entry.is_dir():
        newest = max(
            (file for file in entry.iterdir() if _is_weights(file)), key=_age, default=None
        )
        vanilla = entry.name.endswith(_VANILLA)
        name = _model_name(entry.name.removesuffix(_VANILLA))
        return (name, 5 if vanilla else 4, newest) if newest else None
    if _is_weights(entry):
        rank = len(_SUFFIXES) - 1 - _SUFFIXES.index(entry.suffix)
        return _model_name(entry.stem), rank, entry
    return None


def _is_weights(file: Path) -> bool:
    return file.suffix in _SUFFIXES and not file.name.startswith(".") and file.is_file()


def _age(file: Path) -> tuple[int, int, str]:
    """Sorts a folder's weight files: numbered epochs last, then by time, then by name."""
    numbered = re.fullmatch(r"ckpt_epoch_(\d+)", file.stem)
    return int(numbered[1]) if numbered else -1, file.stat().st_mtime_ns, file.name


def _model_name(on_disk: str) -> str:
    return re.sub(r"^(timm|torchvision)_", r"\1:", on_disk)
