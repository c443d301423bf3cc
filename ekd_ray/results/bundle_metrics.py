"""The content of `metrics.json`: the evidence that goes with a bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ekd_ray import __version__
from ekd_ray.config import StudyConfig
from ekd_ray.config.study_config import TESTED_AT
from ekd_ray.data import load_dataset
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.measure.calibration import Calibration, measure_sets
from ekd_ray.engine.measure.metrics import class_recalls, classification_metrics, log_probabilities
from ekd_ray.engine.measure.predictions import FILE as PREDICTIONS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.resolve import describe_images
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.models import read_metadata
from ekd_ray.results.leaderboard import Leaderboard, Row, gain_values, mean_sd, select_metrics
from ekd_ray.results.prediction_table import coverage_thresholds
from ekd_ray.results.records import DATA, FORMAT_VERSION, RunRecord
from ekd_ray.results.study_reader import StudyReader

STATED_COVERAGES = (0.9, 0.95)  # of sets of classes, which the card has


def bundle_metrics(
    study: StudyReader, board: Leaderboard, run: RunRecord, *, seeds: Sequence[int]
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        board: the leaderboard, the winner first; run: the run that made the weights; seeds: of
            all final runs of the winner.
    """
    winner, config, teacher = board[0], study.config, study.teacher()
    arrays = load_dataset(winner.config.dataset, "train", data_root=config.data_root)
    searched = next((t for t in study.ranked() if t.number == winner.number), None)
    front = study.pareto() if config.objectives else []
    said = _read_predictions(run.folder)
    return {
        "format_version": FORMAT_VERSION,
        "ekd_ray": __version__,
        "study": config.fingerprint(),
        "class_names": list(arrays.class_names),
        DATA: study.header.get(DATA),  # of the study's splits
        "pictures": describe_images(config.distill, config.data_root),  # skipped, left out, odd
        "log_prior": read_metadata(run.folder / WEIGHTS).log_prior,
        # The labels of the test images have no part in them.
        "coverage_thresholds": None if said is None else coverage_thresholds(said.uncertainty),
        "calibration": _find_calibration(study, winner, run, said),
        "seeds": list(seeds),
        TESTED_AT: study.header.get(TESTED_AT, []),
        "workers": config.workers_per_trial,
        "seconds": run.seconds,
        "teacher": asdict(teacher) if teacher else None,  # on the validation split
        # These weights, and their recall by class; then the winner in the search (one seed, the
        # validation split), over fresh seeds on the same split, and over these seeds on the test
        # split, read once each.
        "model": select_metrics(run.metrics, "test_", "train_"),
        "classes": [] if said is None else _list_classes(said),
        "search": select_metrics(searched.last, "val_") if searched else {},
        "validation": _spreads(winner.val_metrics),
        "test": _spreads(winner.test_metrics),
        "leaderboard": [_board_entry(row, config) for row in board],
        # Search scores: of one seed each, on the validation split.
        "pareto_front": [
            {"trial": t.number, **{n: t.last[n] for n in config.watched}, "params": t.params}
            for t in front
        ],
        # The winner's lead on validation; its gain over what needs no search; its metric on
        # validation minus each champion's; its test top-1 minus each champion's and baseline's.
        "lead": asdict(board.lead) if board.lead else None,
        "gain": gain_values(board),
        "validation_differences": {
            name: asdict(found) for name, found in study.validation_differences().items()
        },
        "differences": {name: asdict(found) for name, found in study.differences().items()},
    }


def _read_predictions(folder: Path) -> Predictions | None:
    """A final run's predictions of the test images; None where they are lost or damaged."""
    with contextlib.suppress(UserError):
        return Predictions.load(folder / PREDICTIONS)
    return None


def _find_calibration(
    study: StudyReader, winner: Row, run: RunRecord, said: Predictions | None
) -> dict[str, Any] | None:
    """The calibration of the run of the same configuration and seed that has held the validation
    images out (another seed's where its file is lost), and what it gives on the test images of
    which the logits were kept; None without one."""
    twins = [
        other for other in study.confirm_runs
        if other.stage is RunStage.SELECT and other.name == winner.name
    ]  # fmt: skip
    for twin in sorted(twins, key=lambda other: other.seed != run.seed):
        with contextlib.suppress(UserError, OSError):
            found = Calibration.load(twin.folder)
            measured = None if said is None else _measure_calibration(found, said, run)
            return {**asdict(found), "seed": twin.seed, "measured": measured}
    return None


def _measure_calibration(found: Calibration, said: Predictions, run: RunRecord) -> dict[str, float]:
    prior, labels = read_metadata(run.folder / WEIGHTS).log_prior, said.labels[said.kept]
    logits = said.logits.float()
    measured: dict[str, float] = {"images": len(labels)}
    for suffix, temperature in (("", 1.0), ("_calibrated", found.temperature)):
        figures = classification_metrics(logits, labels, log_prior=prior, temperature=temperature)
        measured |= {f"{name}{suffix}": figures[name] for name in ("nll", "ece")}
    log_probs = log_probabilities(logits, prior)
    for share in STATED_COVERAGES:
        with contextlib.suppress(UserError):  # too few validation images for that
            threshold = found.threshold(share)
            measured |= measure_sets(log_probs, labels, {share: threshold})
    return measured


def _list_classes(found: Predictions) -> list[dict[str, Any]]:
    """The `recall` of each class that the test split has, by `name`, with its `images`."""
    count = len(found.class_names)
    recalls = class_recalls(found.predicted == found.labels, found.labels, count)
    images = torch.bincount(found.labels, minlength=count)
    rows = zip(found.class_names, images.tolist(), recalls.tolist(), strict=True)
    return [{"name": n, "images": i, "recall": r} for n, i, r in rows if i]


def _spreads(seeds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and n of every metric that all seeds have."""
    names = seeds[0] if seeds else {}
    return {n: _spread([found[n] for found in seeds]) for n in names if all(n in s for s in seeds)}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, deviation, count = mean_sd(values)
    return {"mean": mean, "sd": deviation, "n": count}


def _board_entry(row: Row, config: StudyConfig) -> dict[str, Any]:
    further = {name: row.figures(name) for name in config.watched if name != config.metric}
    figures = {"val": row.val, **further, "test_top1": row.test}
    spreads = {name: {**_spread(v), "values": list(v)} for name, v in figures.items() if v}
    names = {"name": row.name, "role": row.role, "equals": row.equals, "winner": row.winner}
    return {**names, **spreads}
