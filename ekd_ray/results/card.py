"""The model card of a bundle, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from operator import itemgetter
from typing import Any

import yaml

from ekd_ray.config import DistillConfig
from ekd_ray.config.phrases import short_name
from ekd_ray.config.study_config import TESTED_AT
from ekd_ray.data.views import short_side
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.errors import UserError
from ekd_ray.models import ALIASES, WeightsMetadata
from ekd_ray.results.chance import warn_of_chance
from ekd_ray.results.exports import EXPORTS
from ekd_ray.results.inference import varies_in_size
from ekd_ray.results.leaderboard import Leaderboard, mean_sd
from ekd_ray.results.row_names import label
from ekd_ray.results.templating import render
from ekd_ray.results.words import (
    describe_choice,
    describe_lead,
    describe_missed_gain,
    describe_teacher,
    warn_of_teacher,
)

# Names on the hub, where `datasets:` of a card must be found.
HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet": "zh-plus/tiny-imagenet",
    "imagenet": "ILSVRC/imagenet-1k",
}
# Metric -> (type on the hub, name).
FIGURES = {
    "test_top1": ("accuracy", "top-1"),
    "test_top5": ("accuracy", "top-5"),
    "test_nll": ("nll", "negative log-likelihood (nats)"),
    "test_ece": ("ece", "expected calibration error (15 bins)"),
}
MOST_NAMED = 100  # classes that the card lists
# The hub's name for it. Weights depend on what the teacher and the images are under.
UNKNOWN_LICENSE = "unknown"


def check_license(name: str) -> None:
    """Raise `UserError` for what the hub does not take for the name of a license."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UserError(
            f"license must be a name as the hub has it (mit, apache-2.0, cc-by-nc-4.0, other, "
            f"unknown), got {name!r}."
        )


def timm_name(model: str) -> str | None:
    """The name in timm of a model that timm builds; None of any other."""
    library, colon, name = ALIASES.get(model, model).partition(":")
    return name if colon and library == "timm" else None


def model_card(
    config: DistillConfig,
    weights: WeightsMetadata,
    metrics: dict[str, Any],
    board: Leaderboard,
    *,
    license: str = UNKNOWN_LICENSE,
) -> str:
    """README.md of a bundle: YAML front matter, the figures, how to use it.

    Args:
        metrics: the content of `metrics.json`; board: the leaderboard, the winner first; license:
            of the weights, by its name on the hub.
    """
    title = f"{config.student} distilled from {config.teacher or 'no teacher'}"
    front, teacher = _front_matter(config, metrics, title, license), metrics.get("teacher")
    exports = metrics.get("exports") or {}
    return render(
        "card.md.jinja",
        autoescape=False,  # Markdown
        filters={"percent": "{:.2%}".format},
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=title,
        dataset=short_name(config.dataset),
        config=config,
        data_flag=_data_flag(config.dataset),
        timm_name=timm_name(config.student),
        weights=weights,
        class_names=metrics["class_names"],
        top1=metrics["model"]["test_top1"],
        balanced=metrics["model"].get("test_balanced_top1"),
        weakest=min(metrics["classes"], key=itemgetter("recall"), default=None),
        spread=mean_sd(board[0].test),
        rows=[(label(row.name), row.role, *mean_sd(row.test)) for row in board if row.test],
        missed=describe_missed_gain(board),
        chance=warn_of_chance(metrics),
        choice=describe_choice(metrics.get(TESTED_AT, ())),
        lead=describe_lead(board),
        teacher=_describe_teacher(TeacherFigures(**teacher)) if teacher else None,
        log_prior=metrics["log_prior"],
        calibration=metrics.get("calibration"),
        exports=exports,
        crops="resize" if varies_in_size(config) else "square",
        short_side=short_side(config.image_size or 0),
        named=metrics["class_names"][:MOST_NAMED],
        runnable=_is_runnable(exports.get(EXPORTS["onnx"]), config),
    )


def _describe_teacher(found: TeacherFigures) -> str:
    return " ".join([describe_teacher(found), *warn_of_teacher(found)])


def _data_flag(dataset: str) -> str:
    """How `reproduce` is told where the data are."""
    kind, colon, _ = dataset.partition(":")
    return f"--dataset {kind}:PATH" if colon else "--data-root data"


def _is_runnable(program: dict[str, Any] | None, config: DistillConfig) -> bool:
    """Whether the card's example feeds an ONNX program exactly: not where the program expects its
    images resized a second time, to the student's own size."""
    return program is not None and program.get("side", config.image_size) == config.image_size


def _front_matter(
    config: DistillConfig, metrics: dict[str, Any], title: str, license: str
) -> dict[str, Any]:
    dataset = short_name(config.dataset)
    figures = [
        {"type": kind, "value": metrics["model"][name], "name": text}
        for name, (kind, text) in FIGURES.items()
        if name in metrics["model"]
    ]
    hub = HUB.get(config.dataset)
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"name": dataset, "type": hub or dataset, "split": "test"},
        "metrics": figures,
    }
    tags = ["knowledge-distillation", "image-classification", config.student]
    if metrics["log_prior"] is not None:
        tags.append("evidential-deep-learning")
    if timm_name(config.student):
        tags.append("timm")
    return {
        "license": license,
        "library_name": "ekd_ray",
        "pipeline_tag": "image-classification",
        "tags": tags,
        **({"datasets": [hub]} if hub else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": title, "results": [result]}],
    }
