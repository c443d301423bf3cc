"""The model card of a bundle, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

import yaml

from ekd_ray.config import DistillConfig
from ekd_ray.data import short_name
from ekd_ray.models import WeightsMetadata
from ekd_ray.results.leaderboard import Row, mean_sd

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


def model_card(
    config: DistillConfig, weights: WeightsMetadata, metrics: dict[str, Any], board: list[Row]
) -> str:
    """README.md of a bundle: YAML front matter, the figures, how to use it.

    Args:
        metrics: the content of `metrics.json`; board: the leaderboard, the winner first.
    """
    front = yaml.safe_dump(_front_matter(config, metrics), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n" + "\n".join(_body(config, weights, metrics, board))


def _front_matter(config: DistillConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    dataset = short_name(config.dataset)
    figures = [
        {"type": kind, "value": metrics["model"][name], "name": title}
        for name, (kind, title) in FIGURES.items()
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
    return {
        "library_name": "ekd_ray",
        "pipeline_tag": "image-classification",
        "tags": tags,
        **({"datasets": [hub]} if hub else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": _title(config), "results": [result]}],
    }


def _title(config: DistillConfig) -> str:
    return f"{config.student} distilled from {config.teacher or 'no teacher'}"


def _body(
    config: DistillConfig, weights: WeightsMetadata, metrics: dict[str, Any], board: list[Row]
) -> list[str]:
    mean, deviation, count = mean_sd(board[0].test)
    rows = [
        f"| {row.name} | {mean:.2%} | {deviation:.2%} | {count} |"
        for row, (mean, deviation, count) in ((r, mean_sd(r.test)) for r in board if r.test)
    ]
    return [
        f"# {_title(config)}",
        "",
        f"Data set {short_name(config.dataset)} ({len(metrics['class_names'])} classes), method "
        f"`{config.method}`. Top-1 on the test split: **{metrics['model']['test_top1']:.2%}** "
        f"(these weights, seed {config.seed}); mean {mean:.2%}, standard deviation "
        f"{deviation:.2%} over {count} seed(s).",
        "",
        "The configuration was chosen on a validation split; the test split was read once,",
        "after the choice. All rows have the same budget.",
        "",
        "| configuration | test top-1 | sd | n |",
        "|---|---|---|---|",
        *rows,
        "",
        "## Use",
        "",
        "```python",
        "from ekd_ray.results import Bundle",
        "",
        'found = Bundle.load("best").predict("picture.jpg")',
        "print(found.names, found.probabilities, found.uncertainty)",
        "```",
        "",
        f"Images are {config.image_size} x {config.image_size} RGB; in [0, 1] they are normalised "
        f"with mean {weights.mean} and std {weights.std}.",
        *_uncertainty(metrics["log_prior"]),
        *_exports(metrics.get("exports") or {}, config),
        "",
        "## Evidence",
        "",
        "`distill.yaml` is the complete configuration (teacher by hash, data by fingerprint),",
        "`metrics.json` the figures of every seed and baseline, `history.jsonl` each epoch of",
        "these weights, `environment.json` what they were trained on. `MANIFEST` holds the",
        "SHA-256 of every file.",
        "",
        "```",
        "python launchers/reproduce.py best --data-root data --teacher-weights FILE",
        "```",
        "",
        "trains it again and says `bit-identical`, `within-tolerance` or `different`.",
        "",
    ]


def _uncertainty(log_prior: float | None) -> list[str]:
    if log_prior is None:
        return ["Uncertainty is 1 minus the largest probability."]
    return [
        f"The student is evidential (log prior {log_prior:.4g}): its probabilities are the mean of",
        "a Dirichlet distribution, its uncertainty the vacuity, the share of the prior in it.",
    ]


def _exports(exports: dict[str, dict[str, Any]], config: DistillConfig) -> list[str]:
    """What the exported programs take and give."""
    if not exports:
        return []
    size = config.image_size
    lines = [
        "",
        "## Exported programs",
        "",
        "| file | input | largest difference |",
        "|---|---|---|",
    ]
    for name, entry in exports.items():
        pixels = "normalised" if entry["normalized_input"] else "in [0, 1]"
        side = entry.get("side", size)
        lines.append(
            f"| `{name}` | `images` float32 [B, 3, {side}, {side}], {pixels} | "
            f"{entry['largest_difference']:.1e} |"
        )
    return [
        *lines,
        "",
        "Any batch size B. They return `logits` [B, C], `probabilities` [B, C] and",
        "`uncertainty` [B], and were compared with the PyTorch model in batches of 1, 3 and 8.",
    ]
