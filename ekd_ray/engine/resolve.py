"""Checks and completes a configuration before any compute is spent."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.config.ensembles import is_ensemble
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.normalization import NORMALIZATIONS, Normalization, parse_normalization
from ekd_ray.config.phrases import several
from ekd_ray.config.plugins import check_loaded, load_installed, stamps_of
from ekd_ray.data import (
    DatasetInfo,
    check_dataset,
    check_outside,
    check_view_scheme,
    dataset_info,
    held_out_size,
    load_dataset,
    look_again,
    num_train,
    steps_per_epoch,
)
from ekd_ray.data.scan import Say, Scan, scan_dataset
from ekd_ray.data.sources import SPLITS
from ekd_ray.engine.features import find_classifier, record_features
from ekd_ray.errors import UserError, error_context
from ekd_ray.losses.methods import method_of, resolve_method
from ekd_ray.models import (
    WeightsMetadata,
    build_model,
    is_of_library,
    is_own_model,
    library_normalization,
    load_backbone,
    load_weights,
    locate_weights,
    model_normalization,
    read_metadata,
)

# Of the images that an ensemble gets, whose members normalise them.
_AS_IT_IS = Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def resolve(
    config: DistillConfig, *, data_root: str | None = None, download: bool = False
) -> DistillConfig:
    """The configuration with every None that has a default filled in, fully checked.

    Names (method, models, data set, view scheme) are looked up, the data's files are
    probed, the teacher's checkpoint is read and hashed: its learned prior and its
    normalisation enter the configuration unless that says otherwise. Idempotent.

    Raises:
        UserError: anything that would stop the run later, in one sentence.
    """
    config = resolve_method(config)
    config = config.replace(plugins=used_plugins(config))
    info = dataset_info(config.dataset, data_root=data_root)
    config = config.replace(
        augment=config.augment or info.view_scheme,
        image_size=config.image_size or info.image_size,
    )
    assert config.augment and config.image_size
    with error_context("augment"):
        check_view_scheme(info, config.augment, config.image_size)
    if config.compile == "on":
        check_compiler()
    method = method_of(config)
    if method.features:
        _check_feature_limits(config)
    with error_context("student"):
        if is_ensemble(config.student):
            raise UserError(f"a student must be one network, got {config.student}: name a model.")
        size = student_size(config)
        layers = method.student_layers
        check_model(config.student, info.num_classes, size, "student_image_size", layers)
        config = _resolve_start(config, info.num_classes)
    check_dataset(config.dataset, data_root=data_root, download=download)
    if config.ood_dataset is not None:
        with error_context("ood_dataset"):
            _check_ood(config, data_root)
    if method.needs_teacher:
        config = _resolve_teacher(config, info.num_classes)
    else:
        config = without_teacher(config)
        if method.evidential:
            config = config.replace(**_resolve_priors(config, None))
    _check_sizes(config, info, data_root)
    return config


def used_plugins(config: DistillConfig, space: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The stamps of the plugins that a configuration names, and of those that its parts are of.

    Args:
        space: a search space, which may have other parts to choose from.
    """
    load_installed()
    check_loaded(config.plugins)
    kinds = {"student": "model", "teacher": "model", "method": "method", "dataset": "dataset",
             "ood_dataset": "dataset"}  # fmt: skip
    parts = []
    for name, kind in kinds.items():
        spec = (space or {}).get(name)
        choices = spec.get("choices") if isinstance(spec, Mapping) else None
        parts += [(kind, part) for part in (getattr(config, name), *(choices or ()))]
    return tuple(sorted({*config.plugins, *stamps_of(parts)}))


def check_compiler() -> None:
    """On a CPU torch.compile needs a C++ compiler; on a GPU Triton brings its own.

    Raises:
        UserError: there is none.
    """
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not torch.cuda.is_available() and not any(map(shutil.which, names)):
        raise UserError(
            f"compile needs a C++ compiler ({', '.join(names)}) and none is installed: install "
            "one, or set compile=off."
        )


def _check_feature_limits(config: DistillConfig) -> None:
    """Raise `UserError` for what cannot go with a method that reads layers."""
    for name, reason in (
        ("teacher_cache", "which the teacher's cache does not keep"),
        ("compile", "and a compiled program has no way to read them"),
    ):
        if getattr(config, name) == "on":
            raise UserError(
                f"{name}=on is not for method {config.method!r}, which compares the outputs of "
                f"layers, {reason}: set {name}=auto, or choose another method.",
                keys=(name,),
            )


def check_workers(config: DistillConfig, workers: int) -> None:
    """Raise `UserError` unless every worker gets a row of every batch, or of its every part.

    And for `compile=on`, which would do nothing (`wants_compilation`).
    """
    if workers > 1 and config.compile == "on":
        raise UserError(
            f"compile=on is for one worker, got {workers}, whose batch norms exchange values in "
            "the midst of a step: set compile=auto.",
            keys=("compile",),
        )
    rows = config.batch_size // config.accumulation_steps
    if rows < workers:
        raise UserError(
            f"workers must be <= {rows}, the rows that are computed together (batch_size "
            f"{config.batch_size}, accumulation_steps {config.accumulation_steps}), got {workers}: "
            "take fewer, or a larger batch_size."
        )


def student_size(config: DistillConfig, data_root: str | None = None) -> int:
    """Side of the images that the student sees, in pixels."""
    size = config.student_image_size or config.image_size
    return size or dataset_info(config.dataset, data_root=data_root).image_size


def _check_ood(config: DistillConfig, data_root: str | None) -> None:
    assert config.ood_dataset is not None
    if config.ood_dataset == config.dataset:
        raise UserError(
            f"ood_dataset must be another data set than dataset, got {config.ood_dataset!r} twice."
        )
    check_dataset(config.ood_dataset, data_root=data_root)
    names = (config.ood_dataset, config.dataset)
    check_outside(
        config.ood_dataset,
        *(dataset_info(name, data_root=data_root).class_names for name in names),
    )


def without_teacher(config: DistillConfig) -> DistillConfig:
    """The configuration with every teacher setting cleared (methods that need none)."""
    names = (
        "teacher", "teacher_weights", "teacher_sha256", "teacher_normalization", "teacher_key",
        "min_teacher_accuracy",
    )  # fmt: skip
    return config.replace(**dict.fromkeys(names))


def check_teacher_settings(config: DistillConfig) -> None:
    """Raise `UserError` for settings of a teacher that a configuration does not have."""
    needed = method_of(config).needs_teacher
    settings = {
        "teacher_key": needed and config.teacher_weights is not None,
        "min_teacher_accuracy": needed,
    }
    for name, served in settings.items():
        if getattr(config, name) is not None and not served:
            lack = f"method {config.method} has none" if not needed else "no --teacher-weights are"
            raise UserError(
                f"--{name.replace('_', '-')} is about a teacher, but {lack}"
                f"{' given' * needed}: leave it out, or "
                f"{'give the file' if needed else 'choose another --method'}.",
                keys=(name,),
            )


def with_teacher(config: DistillConfig, weights: str | None) -> DistillConfig:
    """The configuration with other weights of its teacher (None: they are still to be trained).

    The images are normalised as that file says, or as before where it does not say.
    """
    config = config.replace(teacher_weights=weights, teacher_sha256=None, teacher_key=None)
    if (
        weights is None
        or stated_normalization(read_metadata(weights, whole_classifier=False)) is None
    ):
        return config
    return config.replace(teacher_normalization=None)


def _resolve_start(config: DistillConfig, num_classes: int) -> DistillConfig:
    """The student's first weights, if it has any: found, hashed, and how their images are."""
    if config.student_normalization is not None:
        parse_normalization(config.student_normalization, setting="student_normalization")
    if config.student_weights is None:
        if config.student_sha256 is None:
            return config
        raise UserError(
            f"the student of this configuration starts from weights of SHA-256 "
            f"{config.student_sha256}: give --student-weights FILE.",
            keys=("student_weights",),
        )
    path = locate_weights(config.student, config.student_weights)
    weights = read_start(config.student, num_classes, path)
    if config.student_sha256 not in (None, weights.sha256):
        raise UserError(
            f"{path} is not what the student of this configuration starts from: its SHA-256 must "
            f"be {config.student_sha256}, got {weights.sha256}.",
            keys=("student_weights",),
        )
    normalization = config.student_normalization
    if normalization is None and (own := _weights_normalization(config.student, weights)):
        normalization = own.as_text()
    return config.replace(
        student_weights=path, student_sha256=weights.sha256, student_normalization=normalization
    )


def read_start(model: str, num_classes: int, path: str) -> WeightsMetadata:
    """The facts of weights that a model starts from, which are tried on it."""
    facts = os.stat(path) if os.path.exists(path) else None
    return _try_start(model, num_classes, path, facts and (facts.st_mtime_ns, facts.st_size))


@functools.lru_cache(maxsize=16)
def _try_start(model: str, num_classes: int, path: str, stamp: object) -> WeightsMetadata:
    """See `read_start`; a file of another stamp is read again."""
    with torch.random.fork_rng(devices=[]):
        return load_backbone(build_model(model, num_classes), path)


def _weights_normalization(model: str, weights: WeightsMetadata) -> Normalization | None:
    """The normalisation that a file, or the model's library or plugin, states."""
    if stated := stated_normalization(weights):
        return stated
    if registered := model_normalization(model):
        return parse_normalization(registered)
    library = library_normalization(model)
    return Normalization(mean=library[0], std=library[1]) if library else None


def input_normalization(config: DistillConfig, info: DatasetInfo) -> Normalization:
    """How the student's images are normalised: as configured, else as the data set's are."""
    if config.student_normalization is None:
        return Normalization(mean=info.mean, std=info.std)
    return parse_normalization(config.student_normalization, setting="student_normalization")


def without_start(config: DistillConfig) -> DistillConfig:
    """The configuration of a student whose weights are drawn."""
    return config.replace(student_weights=None, student_sha256=None, student_normalization=None)


def _resolve_teacher(config: DistillConfig, num_classes: int) -> DistillConfig:
    if config.teacher is None:
        raise UserError(
            f"method {config.method!r} needs a teacher: give --teacher NAME and --teacher-weights."
        )
    assert config.image_size
    with error_context("teacher"):
        method = method_of(config)
        check_model(
            config.teacher, num_classes, config.image_size, "image_size", method.teacher_layers,
            classifier=method.class_cosines,
        )  # fmt: skip
    if config.teacher_weights is None:
        raise UserError(
            f"no weights for teacher {config.teacher!r}: give --teacher-weights FILE, or train "
            "one with ekd-ray train-teacher."
        )
    if config.teacher_top is not None and config.teacher_top >= num_classes:
        raise UserError(
            f"teacher_top must be < {num_classes}, the classes of {config.dataset}, got "
            f"{config.teacher_top}: leave it out to keep every logit."
        )
    path, key = config.teacher_weights, config.teacher_key
    if is_ensemble(config.teacher):
        _check_ensemble(config)
    if any(of(config.teacher) for of in (is_of_library, is_own_model, is_ensemble)):
        weights = read_metadata(path, key=key)
    else:  # of a plugin: only the network itself says what its weights look like
        weights = load_weights(build_model(config.teacher, num_classes), path, key=key)
    _check_teacher(config, weights, num_classes)
    given = config.teacher_normalization
    own = _own_normalization(config, weights) if given is None else parse_normalization(given)
    changes: dict[str, object] = {
        "teacher_sha256": weights.sha256,
        "teacher_normalization": own.as_text(),
    }
    if method.evidential:
        changes |= _resolve_priors(config, weights.log_prior)
    return config.replace(**changes)


def _check_ensemble(settings: Any) -> None:
    """Raise `UserError` for what only a single teacher can have."""
    normalization, prior = settings.teacher_normalization, settings.teacher_log_prior
    if normalization is not None and parse_normalization(normalization) != _AS_IT_IS:
        raise UserError(
            f"the members of an ensemble have each their own normalisation, got "
            f"teacher_normalization {normalization}: leave it out, or give 0,0,0/1,1,1 in the "
            "place of a recipe's.",
            keys=("teacher_normalization",),
        )
    if prior is not None:
        raise UserError(
            f"the members of an ensemble have each their own prior, got teacher_log_prior {prior}: "
            "leave it out; log_prior is the student's.",
            keys=("teacher_log_prior",),
        )


def _resolve_priors(settings: Any, teacher_prior: float | None) -> dict[str, object]:
    """An explicit log_prior serves both sides; else both take what the teacher learned.

    Without either, log_prior is 0: one pseudo-count per class, the uniform Dirichlet.
    """
    if settings.log_prior is not None:
        return {}
    low, high = REGISTRY["log_prior"].low, REGISTRY["log_prior"].high
    if teacher_prior is not None and not low <= teacher_prior <= high:  # type: ignore[operator]
        raise UserError(
            f"the log prior that {settings.teacher_weights} has learned must be {low} to {high}, "
            f"got {teacher_prior:g}: give a log_prior, or train the teacher again."
        )
    if settings.learn_log_prior:
        own = teacher_prior if settings.teacher_log_prior is None else settings.teacher_log_prior
        return {"log_prior": 1.0, "teacher_log_prior": own}
    return {"log_prior": 0.0 if teacher_prior is None else teacher_prior}


def stated_normalization(weights: WeightsMetadata) -> Normalization | None:
    """The normalisation that a file names, or that all of its layout have."""
    if weights.mean is not None and weights.std is not None:
        return Normalization(mean=weights.mean, std=weights.std)  # type: ignore[arg-type]
    return parse_normalization("imagenet") if weights.layout == "akamaster" else None


def _own_normalization(config: DistillConfig, weights: WeightsMetadata) -> Normalization:
    if stated := stated_normalization(weights):
        return stated
    if registered := model_normalization(str(config.teacher)):
        return parse_normalization(registered)
    raise UserError(
        f"{config.teacher_weights} does not say how its images were normalised: give "
        f"--teacher-normalization ({', '.join(NORMALIZATIONS)} or 'm,m,m/s,s,s')."
    )


def _check_teacher(config: DistillConfig, weights: WeightsMetadata, num_classes: int) -> None:
    path = config.teacher_weights
    if weights.num_classes != num_classes:
        raise UserError(
            f"teacher {path} has {weights.num_classes} classes but dataset "
            f"{config.dataset!r} has {num_classes}: choose a teacher trained for it."
        )
    if weights.model is not None and weights.model != config.teacher:
        raise UserError(
            f"{path} holds a {weights.model!r}, not a {config.teacher!r}: "
            f"give --teacher {weights.model}."
        )
    if weights.model is None and is_own_model(str(config.teacher)):
        # Says what is missing, and what the weights may be of.
        load_weights(build_model(str(config.teacher), num_classes), str(path), key=weights.key)
    if config.teacher_sha256 not in (None, weights.sha256):
        raise UserError(
            f"{path} is not the teacher of this configuration: its SHA-256 must be "
            f"{config.teacher_sha256}, got {weights.sha256}."
        )


@functools.lru_cache(maxsize=64)
def check_model(
    name: str,
    num_classes: int,
    size: int,
    setting: str,
    layers: tuple[str, ...] = (),
    *,
    classifier: bool = False,
) -> None:
    """Build the model and show it an image; `setting` names the size's setting.

    Args:
        layers: those whose outputs the method compares.
        classifier: whether the method reads the rows of its classifier.

    Raises:
        UserError: an unknown name, a model that does not take images of `size` pixels, or one
            without these layers or this classifier, or whose layers do not give a tensor with a row
            for each image.
    """
    # Those of libraries may be large, and take no memory on `meta`. What is done there imports
    # torch's tracer, 2 s and 80 MB in every process, as the libraries do anyway; our own are small.
    device = "meta" if is_of_library(name) else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = build_model(name, num_classes).eval()
    if classifier:
        find_classifier(model, num_classes)
    rows = 2 if layers else 1  # of one image no dimension could be told from that of the batch
    with record_features(model, layers) as features:
        try:
            with torch.no_grad():
                logits = model(torch.zeros(rows, 3, size, size, device=device))
        except Exception as error:  # each library refuses a size in its own way
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UserError(
                f"{name} does not take images of {size} x {size} pixels ({reason}): set "
                f"{setting}, 224 for most models of torchvision and timm."
            ) from None
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [rows, num_classes]:
        raise UserError(
            f"{name} must give logits of shape [B, {num_classes}], one for each class, got {shape} "
            f"for {several(rows, 'image')}."
        )
    for layer, feature in zip(layers, features, strict=True):
        if feature.shape[:1] != (rows,):
            raise UserError(
                f"the method reads the layer {layer!r} of {name}, which must give [B, ...], a row "
                f"for each image, got {tuple(feature.shape)} for {rows}: choose another layer.",
                keys=(),
            )


def scan_images(
    config: DistillConfig, data_root: str | None, say: Say = lambda done, total: None
) -> Scan | None:
    """Look at a configuration's pictures; None where nobody could have put others there, unless a
    setting asks."""
    every = config.check_images or config.skip_damaged
    info = dataset_info(config.dataset, data_root=data_root)
    if not (every or config.exclude_duplicates or info.encoded or not info.num_test):
        return None
    return scan_dataset(config.dataset, data_root=data_root, every=every, say=say)


def check_images(
    config: DistillConfig, data_root: str | None, say: Say = lambda done, total: None
) -> None:
    """Raise `UserError` for damaged pictures that are not to be left out.

    First looks whether pictures of class folders were written over since they were indexed.
    """
    look_again(config.dataset, data_root=data_root)
    found = scan_images(config, data_root, say)
    if found is not None and not config.skip_damaged:
        found.check(config.dataset)
    for split in SPLITS:
        left_out(config, split, data_root)


def describe_images(config: DistillConfig, data_root: str | None) -> list[str]:
    """Sentences on what is skipped, left out or odd among a configuration's pictures."""
    found = scan_images(config, data_root)
    if found is None:
        return []
    info = dataset_info(config.dataset, data_root=data_root)
    return found.lines(
        size=config.image_size or info.image_size,
        skip_damaged=config.skip_damaged,
        exclude_duplicates=config.exclude_duplicates,
    )


def left_out(config: DistillConfig, split: str, data_root: str | None) -> np.ndarray:
    """Positions int64, sorted, of a split's images that the configuration leaves out.

    Raises UserError where a class has nothing left to train on, or no image is left to test on.
    """
    if not (config.skip_damaged or config.exclude_duplicates):
        return np.empty(0, np.int64)
    every = config.skip_damaged
    found = scan_dataset(config.dataset, data_root=data_root, every=every).left_out(
        split, skip_damaged=every, exclude_duplicates=config.exclude_duplicates
    )
    if len(found):
        images = load_dataset(config.dataset, split, data_root=data_root)
        _check_left(images.labels, found, images.class_names, config.dataset, split)
    return found


def _check_left(
    labels: np.ndarray, out: np.ndarray, names: Sequence[str], dataset: str, split: str
) -> None:
    """Refuse what makes another task of it: a class without images, a test without any."""
    had, left = (np.bincount(of, minlength=len(names)) for of in (labels, np.delete(labels, out)))
    emptied = [name for name, n, kept in zip(names, had, left, strict=True) if n and not kept]
    if emptied and (split == "train" or not left.any()):
        raise UserError(
            f"skip_damaged and exclude_duplicates would leave out all {split} images of "
            f"{len(emptied)} of {len(names)} classes of {dataset} (first: {emptied[0]!r}): restore "
            "the images, or remove these classes on both sides."
        )


def count_kept(config: DistillConfig, data_root: str | None) -> int:
    """Training images that are used, before a subset is drawn."""
    left = len(left_out(config, "train", data_root))
    return num_train(config.dataset, data_root=data_root) - left


def split_sizes(config: DistillConfig, data_root: str | None = None) -> tuple[int, int]:
    """(training, validation) images of a configuration, as `stratified_split` rounds them."""
    drawn = config.train_subset or count_kept(config, data_root)
    held = held_out_size(drawn, config.validation_fraction)
    return drawn - held, held


def _name_remedy(drawn: int, there: int, classes: int) -> str:
    """How a split comes to have every class on both sides."""
    if drawn >= 2 * classes:
        return (
            f"validation_fraction must be from {classes / drawn:.3g} to {1 - classes / drawn:.3g}"
        )
    return "raise --train-subset" if drawn < there else "each class needs 2 images or more"


def _check_sizes(config: DistillConfig, info: DatasetInfo, data_root: str | None) -> None:
    """Enough images for every class on both sides of the split, and for one batch."""
    there = count_kept(config, data_root)
    kept, held = split_sizes(config, data_root)
    drawn = kept + held
    if not info.num_classes <= drawn <= there:
        raise UserError(
            f"train_subset must be {info.num_classes} to {there} ({config.dataset}), got {drawn}."
        )
    if config.validation_fraction and not info.num_classes <= held <= drawn - info.num_classes:
        raise UserError(
            f"validation_fraction {config.validation_fraction:g} holds out {held} of {drawn} "
            f"images, but each side needs one of each of the {info.num_classes} classes: "
            f"{_name_remedy(drawn, there, info.num_classes)}."
        )
    steps_per_epoch(kept, config.batch_size)
