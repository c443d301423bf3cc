"""A teacher's passes over validation images, which give its figures and what speaks against it."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekd_ray.config import DistillConfig
from ekd_ray.config.ensembles import is_ensemble
from ekd_ray.config.normalization import NORMALIZATIONS
from ekd_ray.config.phrases import short_name
from ekd_ray.data import check_dataset, dataset_info
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.measure.cost import model_cost
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.measure.predictions import TEACHER_BATCH
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.measure.teacher_judgement import (
    TRAIN_AGAIN,
    judge_accuracy,
    judge_normalizations,
    judge_order,
)
from ekd_ray.engine.precision import cpu_threads, pick_device, resolve_precision
from ekd_ray.engine.resolve import split_sizes
from ekd_ray.engine.rundata import RunData, load_run_data
from ekd_ray.engine.teacher.source import LiveTeacher, live_teacher
from ekd_ray.engine.teacher.tried import try_teacher
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import method_of
from ekd_ray.models import read_metadata

# ImageNet's split holds out 128,000; from 10,000 an accuracy is known to half a point.
MOST_IMAGES = 10_000
# Enough to tell 5 points apart; fewer than the least tell nothing.
FIRST_IMAGES, LEAST_IMAGES = 500, 50
# What the first look may take on the CPU of a thread, and the other normalisations at the start.
LOOK_FLOPS, NORMALIZATION_FLOPS = 5e10, 1e12
CERTAIN = 0.95  # no other normalisation is 5 points better


def measure_teacher(
    config: DistillConfig, *, candidates: int, data_root: str | None, threads: int
) -> TeacherFigures:
    """One pass of the teacher over the validation split; the test split is not opened.

    Args:
        config: resolved, with a teacher and a validation split; of more than `MOST_IMAGES`
            images so many are taken, evenly spaced.
    """
    device = pick_device()
    budget = math.inf if device.type != "cpu" else NORMALIZATION_FLOPS * threads
    return _measure(
        config, candidates, data_root, threads, device,
        images=MOST_IMAGES, others=_affordable(_cost(config, data_root), budget),
    )  # fmt: skip


def can_look(config: DistillConfig, data_root: str | None) -> bool:
    """Whether there are validation images now: some are held out, and none has to be fetched."""
    try:
        check_dataset(config.dataset, data_root=data_root)
    except UserError:  # whoever plans with --download has been told
        return False
    return split_sizes(config, data_root)[1] > 0


def look_at_teacher(config: DistillConfig, data_root: str | None, threads: int) -> TeacherFigures:
    """The figures on up to `FIRST_IMAGES` images, as many as take some seconds on the CPU.

    Args:
        config: resolved, with the weights of a given teacher, and a validation split.
    """
    cost = _cost(config, data_root)
    images = max(_affordable(cost, LOOK_FLOPS * threads), LEAST_IMAGES)
    # The second half of the time is for the other normalisations.
    others = _affordable(cost, LOOK_FLOPS * threads / len(NORMALIZATIONS))
    return _look(config, data_root, threads, images, others)


@functools.lru_cache(maxsize=4)
def _look(
    config: DistillConfig, data_root: str | None, threads: int, images: int, others: int
) -> TeacherFigures:
    # The study's precision may be one that this machine's CPU has not.
    config, device = config.replace(precision="float32"), torch.device("cpu")
    return _measure(config, 0, data_root, threads, device, images=images, others=others)


def check_teacher(config: DistillConfig, data_root: str | None) -> None:
    """Try a given teacher before anything else: its weights, one batch, and the least accuracy
    that was asked for.

    Raises:
        UserError: the file cannot be loaded, or the teacher is worse than that, beyond what the
            number of images leaves open.
    """
    if not method_of(config).needs_teacher:
        return
    try_teacher(config, data_root)
    if config.min_teacher_accuracy is not None and can_look(config, data_root):
        found = look_at_teacher(config, data_root, torch.get_num_threads())
        top1 = found.metrics["val_top1"]
        refuse_weak_teacher(config, found, open_to=2 * math.sqrt(top1 * (1 - top1) / found.images))


class WeakTeacher(UserError):
    """A teacher has less than `min_teacher_accuracy`."""


def refuse_weak_teacher(
    config: DistillConfig, found: TeacherFigures, *, open_to: float = 0.0
) -> None:
    """Raise `WeakTeacher` if the teacher has less than was asked for, by more than `open_to`."""
    least, top1 = config.min_teacher_accuracy, found.metrics["val_top1"]
    if least is not None and top1 + open_to < least:
        reasons = "".join(f" Warning: {warning}." for warning in found.warnings)
        raise WeakTeacher(
            f"the teacher {found.model} must have an accuracy of at least {least:g} "
            f"(min_teacher_accuracy), got {top1:.4f} on {found.images} validation images."
            f"{reasons} Give other weights, or lower --min-teacher-accuracy.",
            keys=("min_teacher_accuracy",),
        )


def _cost(config: DistillConfig, data_root: str | None) -> int:
    """FLOPs of the teacher for one image."""
    info = dataset_info(config.dataset, data_root=data_root)
    size = config.image_size or info.image_size
    return max(1, model_cost(str(config.teacher), info.num_classes, size)[1])


def _affordable(cost: int, flops: float) -> int:
    """Images of the first ones that can be seen for so many FLOPs."""
    return int(min(FIRST_IMAGES, flops / cost))


def _measure(
    config: DistillConfig, candidates: int, data_root: str | None, threads: int,
    device: torch.device, *, images: int, others: int,
) -> TeacherFigures:  # fmt: skip
    """Figures and judgement from `images` of the validation split.

    Args:
        others: of them, those on which the known normalisations are compared.
    """
    assert config.teacher and config.teacher_weights and config.teacher_sha256
    data = load_run_data(config, data_root=data_root, device=device)
    held_out = data.validation_ids
    count = min(len(held_out), images)
    ids = _spaced(held_out, count)
    labels = data.images.labels.cpu()[ids]
    with cpu_threads(threads), arithmetic(deterministic=False):
        precision = resolve_precision(config.precision, device)
        network = live_teacher(config, data.num_classes, precision=precision, device=device)
        logits = _logits(network, data, ids)
        learned, prior = teacher_priors(config)
        found: dict[str, Any] = classification_metrics(logits, labels, log_prior=prior)
        if candidates:  # its normalisation and classes are the study's own
            warnings = judge_accuracy(logits.argmax(dim=1).numpy(), labels.numpy())
        else:
            warnings = _judge(config, network, data, ids, logits, labels, min(others, count))
    return TeacherFigures(
        model=config.teacher,
        sha256=config.teacher_sha256,
        candidates=candidates,
        images=count,
        # A damaged teacher's may be NaN, which JSON does not have.
        metrics={f"val_{name}": value for name, value in found.items() if math.isfinite(value)},
        log_prior=learned,
        warnings=tuple(warnings),
    )


def _judge(
    config: DistillConfig, network: LiveTeacher, data: RunData, ids: np.ndarray, logits: Tensor,
    labels: Tensor, others: int,
) -> list[str]:  # fmt: skip
    facts = read_metadata(
        str(config.teacher_weights), whole_classifier=False, key=config.teacher_key
    )
    predicted, classes = logits.argmax(dim=1).numpy(), labels.numpy()
    # A file of ours knows its normalisation, and the order of the classes of its data set.
    own = facts.layout == "ekd_ray" and facts.dataset == short_name(config.dataset)
    warnings = judge_accuracy(predicted, classes, facts.claims, TRAIN_AGAIN if own else None)
    if (predicted == classes).mean() < CERTAIN and others >= LEAST_IMAGES:
        some = _spaced(np.arange(len(ids)), others)
        tried = {}
        for name, normalization in NORMALIZATIONS.items():
            if normalization != network.normalization:
                other = copy.copy(network)
                other.normalization = normalization
                tried[name] = _logits(other, data, ids[some]).argmax(dim=1).numpy()
        warnings += judge_normalizations(predicted[some], tried, classes[some])
    return warnings + judge_order(
        predicted, classes, data.num_classes, facts.claims.class_names, data.class_names
    )


def _spaced(values: np.ndarray, count: int) -> np.ndarray:
    """So many of the values, evenly spaced."""
    return values[[index * len(values) // count for index in range(count)]]


@torch.no_grad()
def _logits(network: LiveTeacher, data: RunData, ids: np.ndarray) -> Tensor:
    """Logits float32 [N, C] on the CPU, of unaugmented images."""
    parts = data.images.evaluation(ids, TEACHER_BATCH)
    return torch.cat([network(images).cpu() for images, _ in parts])


def teacher_priors(config: DistillConfig) -> tuple[float | None, float | None]:
    """The log prior in the teacher's file, and the one that makes its class probabilities.

    Either is None where there is none: the latter for a softmax, and for an ensemble, the softmax
    of whose logits is its mean.
    """
    path, key = config.teacher_weights, config.teacher_key
    learned = read_metadata(str(path), whole_classifier=False, key=key).log_prior
    if learned is not None or not method_of(config).evidential or is_ensemble(config.teacher):
        return learned, learned
    settings: Any = config  # the settings of methods are found by name
    own = settings.teacher_log_prior
    return None, settings.log_prior if own is None else own
