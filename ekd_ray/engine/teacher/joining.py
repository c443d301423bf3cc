"""Several teachers' weight files as one, which is given like that of any other teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ekd_ray.config.ensembles import ensemble_name, is_ensemble
from ekd_ray.config.normalization import NORMALIZATIONS, parse_normalization
from ekd_ray.engine.resolve import stated_normalization
from ekd_ray.errors import UserError
from ekd_ray.files import check_file_place
from ekd_ray.models import build_model, load_model, model_normalization, read_metadata, save_weights
from ekd_ray.models.ensemble import Ensemble
from ekd_ray.models.weights import WeightsMetadata

# The images of an ensemble come as they are: every member has its own normalisation.
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class JoinedTeachers:
    """An ensemble's file: its name for `--teacher`, its classes and its members' files."""

    path: Path
    model: str
    num_classes: int
    members: tuple[Path, ...]


def join_teachers(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    model: str | None = None,
    normalization: str | None = None,
) -> JoinedTeachers:
    """Write the weights of several teachers as those of their ensemble.

    Args:
        files: weights of the members, softmax or evidential, of any architectures; 2 or more.
        out: the file to write (safetensors), which must not be there.
        model: architecture of those whose file does not say it.
        normalization: of those whose file does not say it, as `teacher_normalization`.

    Raises:
        UserError: fewer than 2 files, one twice (or the same weights), other numbers of classes or
            data sets, a file that is an ensemble or says too little, or `out` is there or cannot be
            written.
    """
    paths, out = [Path(file) for file in files], Path(out)
    if len(paths) < 2:
        raise UserError(
            f"an ensemble needs at least 2 teachers, got {len(paths)}: one alone has no variance "
            "between members, and is given as --teacher-weights itself."
        )
    if out.exists():
        raise UserError(f"{out} is there already: say with --out FILE where to write.")
    facts = [_read_member(path, model) for path in paths]
    _check_alike(paths, facts)
    networks: list[nn.Module] = []
    names = [str(found.model) for found in facts]
    for path, found in zip(paths, facts, strict=True):
        networks.append(load_model(str(found.model), found.num_classes, path, key=found.key))
        _check_new(paths, names, networks)
    with torch.no_grad():
        ensemble = Ensemble(networks)
        for k, (path, found) in enumerate(zip(paths, facts, strict=True)):
            own = stated_normalization(found)
            text = normalization or model_normalization(names[k])
            if own is None and text is None:
                raise UserError(
                    f"{path} does not say how its images were normalised: give "
                    f"--teacher-normalization ({', '.join(NORMALIZATIONS)} or 'm,m,m/s,s,s')."
                )
            own = own or parse_normalization(str(text))
            ensemble.mean[k], ensemble.std[k] = torch.tensor(own.mean), torch.tensor(own.std)
            ensemble.evidential[k] = found.log_prior is not None
            ensemble.log_prior[k] = found.log_prior or 0.0
    name, classes = ensemble_name(names), facts[0].num_classes
    members = [
        {"model": found.model, "sha256": found.sha256, "log_prior": found.log_prior}
        for found in facts
    ]
    check_file_place(out)
    save_weights(
        ensemble, out, model_name=name, num_classes=classes, mean=NO_MEAN, std=NO_STD,
        dataset=facts[0].dataset, extra={"members": members},
    )  # fmt: skip
    return JoinedTeachers(path=out, model=name, num_classes=classes, members=tuple(paths))


def _read_member(path: Path, model: str | None) -> WeightsMetadata:
    """A file's facts, its architecture among them."""
    found = read_metadata(path, whole_classifier=False)
    if is_ensemble(found.model):
        raise UserError(f"{path} is an ensemble already: name the files of its members.")
    if found.model is not None and found.num_classes:
        return found
    if model is None:
        raise UserError(f"{path} does not say its architecture: give --teacher NAME.")
    if not found.num_classes:
        raise UserError(f"{path} does not say how many classes it has: give a whole classifier.")
    build_model(model, found.num_classes)  # an unknown name is refused here
    return WeightsMetadata(**{**vars(found), "model": model})


def _check_alike(paths: Sequence[Path], facts: Sequence[WeightsMetadata]) -> None:
    """Raise `UserError` for members of other classes, or of which one is another's copy."""
    first = facts[0]
    for path, found in zip(paths[1:], facts[1:], strict=True):
        if found.num_classes != first.num_classes:
            raise UserError(
                f"the teachers of an ensemble must have the same classes, got "
                f"{first.num_classes} in {paths[0]} and {found.num_classes} in {path}: leave one "
                "out."
            )
        if found.dataset and first.dataset and found.dataset != first.dataset:
            raise UserError(
                f"the teachers of an ensemble must be of one data set, got {first.dataset} in "
                f"{paths[0]} and {found.dataset} in {path}: leave one out."
            )


def _check_new(paths: Sequence[Path], names: Sequence[str], networks: Sequence[nn.Module]) -> None:
    """Raise `UserError` if the last network has the weights of one before it, in whatever file."""
    last, own = len(networks) - 1, networks[-1].state_dict()
    for k, other in enumerate(networks[:-1]):
        state = other.state_dict()
        if names[k] == names[last] and all(torch.equal(state[key], own[key]) for key in own):
            raise UserError(
                f"{paths[last]} is the same teacher as {paths[k]}, which would agree with itself: "
                "name each once."
            )
