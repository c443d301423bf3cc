"""Reliability and confusion as TensorBoard images, beside a finished run's scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ekd_ray.engine.distill import TrainedStudent
from ekd_ray.engine.evaluate import predict
from ekd_ray.engine.measure.calibration import Calibration
from ekd_ray.engine.measure.metrics import CALIBRATION_BINS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.engine.runlog import metric_tag

MOST_NAMED_CLASSES = 25
_ACCENT, _GREY = "#2454c6", "#98a1ab"


def validation_predictions(
    result: TrainedStudent, *, data_root: str | None
) -> tuple[Predictions, Calibration]:
    """The predictions of a run's model on its validation split, and its calibration there."""
    data = load_run_data(result.config, data_root=data_root, device=pick_device())
    logits, labels = predict(
        result.model.eval(), data, data.images, data.validation_ids, result.config,
        result.precision,
    )  # fmt: skip
    prior = result.log_prior
    predictions = Predictions.of(logits, labels, log_prior=prior, class_names=data.class_names)
    return predictions, Calibration.fit(logits, labels, prior)


def reliability_bins(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, mean confidence, accuracy) of the 15 equal-width bins of the ECE.

    Args:
        confidence: [N], in [0, 1]; correct: [N] bool.

    Returns:
        [15] each; NaN in the latter two where a bin is empty.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, confidence, minlength=CALIBRATION_BINS) / count
        accuracy = np.bincount(bins, correct.astype(float), minlength=CALIBRATION_BINS) / count
    return count, mean, accuracy


def confusion(predictions: Predictions) -> np.ndarray:
    """[C, C] counts: rows are labels, columns predictions."""
    classes = len(predictions.class_names)
    cells = predictions.labels * classes + predictions.predicted
    return np.bincount(cells.numpy(), minlength=classes**2).reshape(classes, classes)


def write_pictures(
    folder: Path, predictions: Predictions, *, split: str, scalars: Mapping[str, float], step: int
) -> None:
    """Add `<split>/reliability` and `<split>/confusion` to a run's events, and figures of the
    final evaluation.

    Args:
        scalars: by metric name, e.g. `test_top1`; step: the epoch that they belong to.
    """
    correct = (predictions.predicted == predictions.labels).numpy()
    with SummaryWriter(str(folder), filename_suffix=".pictures") as events:
        for name, value in scalars.items():
            events.add_scalar(metric_tag(name), value, step)
        reliability = _reliability(predictions.confidence.numpy(), correct, split)
        events.add_image(f"{split}/reliability", reliability, step, dataformats="HWC")
        confused = _confusion(predictions, split)
        events.add_image(f"{split}/confusion", confused, step, dataformats="HWC")


def _reliability(confidence: np.ndarray, correct: np.ndarray, split: str) -> np.ndarray:
    from matplotlib.figure import Figure

    count, mean, accuracy = reliability_bins(confidence, correct)
    used = count > 0
    figure = Figure(figsize=(5, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    width = 1 / CALIBRATION_BINS
    axes.bar(np.arange(CALIBRATION_BINS)[used] * width, accuracy[used], width * 0.94,
             align="edge", color=_ACCENT, label="accuracy")  # fmt: skip
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="calibrated")
    axes.plot(mean[used], accuracy[used], "o", color="black", markersize=3)
    ece = float(np.abs((accuracy - mean)[used] * count[used]).sum() / count.sum())
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy",
             title=f"{split}: ECE {ece:.3f}, {count.sum()} images")  # fmt: skip
    axes.legend(frameon=False, loc="upper left")
    return _pixels(figure)


def _confusion(predictions: Predictions, split: str) -> np.ndarray:
    from matplotlib.figure import Figure

    names, counts = predictions.class_names, confusion(predictions)
    rates = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure = Figure(figsize=(6, 5.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rates, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label", title=f"{split}: share of each label")
    if len(names) <= MOST_NAMED_CLASSES:
        # A class may be called anything: a dollar would begin a formula.
        shown = [name.replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), shown, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return _pixels(figure)


def _pixels(figure: object) -> np.ndarray:
    """RGB uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
