"""Finding a teacher's weight file in a folder of teachers.

Such a folder is laid out as mdistiller's `cifar_teachers`, as the evidential teachers of the EKD
authors unpack, or both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ekd_ray.errors import UserError, nearest_names

_SUFFIXES = (".pth", ".pt", ".th", ".safetensors")
_VANILLA = "_vanilla"
# The evidential teachers of the EKD authors: folder -> (model, file).
_EVIDENTIAL = {
    "ResNet56": ("resnet56", "student_200"),
    "ResNet110": ("resnet110", "student_best"),
    "ResNet32x4": ("resnet32x4", "student_best"),
    "ResNet50": ("ResNet50", "student_best"),
    "WRN_40_2": ("wrn_40_2", "student_best"),
    "VGG13": ("vgg13", "student_240"),
}


def find_teacher(
    folder: str | os.PathLike[str], model_name: str, *, evidential: bool = False
) -> Path:
    """The weight file of `model_name` in `folder`; the first that exists of:

    - if `evidential`, the EKD authors' file (`ResNet56/student_200`), which else comes last
    - `<name>_vanilla/`, then `<name>/`: the `ckpt_epoch_<n>` of the highest epoch, else the file
      with a weight suffix (.pth, .pt, .th, .safetensors) that was modified last
    - `<name>.pth`, `<name>.pt`, `<name>.th`, `<name>.safetensors`

    The colon of a library's name is an underscore on the disk: `timm:deit_tiny_patch16_224` is
    looked for as `timm_deit_tiny_patch16_224`. Upper and lower case differ, on every file
    system. The file is not opened. Raises UserError if there is none or no such folder.
    """
    teachers = list_teachers(folder, evidential=evidential)
    if model_name in teachers:
        return teachers[model_name]
    usual = f"{model_name.replace(':', '_')}{_VANILLA}/ckpt_epoch_240.pth"
    if evidential:
        published = [
            f"{name}/{file}" for name, (key, file) in _EVIDENTIAL.items() if key == model_name
        ]
        usual = " or ".join([*published, usual])
    raise UserError(
        f"the folder {str(folder)!r} has no weights of {model_name!r}."
        f"{nearest_names(model_name, teachers)} Put them at {usual} below it, or name a weights "
        "file."
    )


def find_softmax_teacher(folder: str | os.PathLike[str], model_name: str) -> Path | None:
    """The newest weight file in `<name>_vanilla/`, as `find_teacher` orders them; None without."""
    found = find_teacher(folder, model_name)
    return found if found.parent.name.endswith(_VANILLA) else None


def list_teachers(folder: str | os.PathLike[str], *, evidential: bool = False) -> dict[str, Path]:
    """Every model with weights in `folder`, by name in alphabetical order, as `find_teacher` finds.

    A name is what the folder or file is called; whether the zoo knows it is not checked. Raises
    UserError if the folder is missing or cannot be read.
    """
    try:
        # A listing, not a look-up by name: some file systems take resnet18 for ResNet18.
        entries = [entry for entry in Path(folder).iterdir() if not entry.name.startswith(".")]
        found = [ranked for entry in entries for ranked in _weights_of(entry, evidential)]
    except OSError as error:
        raise UserError(
            f"the teachers' folder {str(folder)!r} cannot be read ({error.strerror}: "
            f"{str(error.filename)!r}): check the path and its permissions."
        ) from error
    # By name, then by rank: the last of equal keys stays.
    return {name: path for name, _, path in sorted(found)}


def _weights_of(entry: Path, evidential: bool) -> Iterator[tuple[str, int, Path]]:
    """(model name, rank, weight file) of what is in an entry of the folder; higher ranks win."""
    if entry.is_dir():
        files = [*entry.iterdir()]
        model, published = _EVIDENTIAL.get(entry.name, ("", ""))
        for file in files:
            if file.name == published and file.is_file():
                yield model, 6 if evidential else -1, file
        vanilla = entry.name.endswith(_VANILLA)
        name = _model_name(entry.name.removesuffix(_VANILLA))
        if newest := max(filter(_is_weights, files), key=_age, default=None):
            yield name, 5 if vanilla else 4, newest
    elif _is_weights(entry):
        yield _model_name(entry.stem), len(_SUFFIXES) - 1 - _SUFFIXES.index(entry.suffix), entry


def _is_weights(file: Path) -> bool:
    return file.suffix in _SUFFIXES and not file.name.startswith(".") and file.is_file()


def _age(file: Path) -> tuple[int, int, str]:
    """Sorts a folder's weight files: numbered epochs last, then by time, then by name."""
    numbered = re.fullmatch(r"ckpt_epoch_(\d+)", file.stem)
    return int(numbered[1]) if numbered else -1, file.stat().st_mtime_ns, file.name


def _model_name(on_disk: str) -> str:
    return re.sub(r"^(timm|torchvision)_", r"\1:", on_disk)
