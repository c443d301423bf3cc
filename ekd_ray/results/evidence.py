"""`metrics.json` and `environment.json` of a bundle: what they hold, and reading them back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ekd_ray import __version__
from ekd_ray.config import StudyConfig
from ekd_ray.data import load_dataset
from ekd_ray.errors import UserError
from ekd_ray.models import WeightsMetadata
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.records import TrialRecord
from ekd_ray.results.study import Study

FORMAT_VERSION = 1


def evidence(
    study: Study,
    board: list[Row],
    result: dict[str, Any],
    final: list[dict[str, Any]],
    weights: WeightsMetadata,
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        board: the leaderboard, the winner first; result: the record of the run that made the
            weights; final: the winner's rows of the final step, one a seed.
    """
    winner = board[0]
    arrays = load_dataset(winner.config.dataset, "train", data_root=study.config.data_root)
    shown = ("test_", "train_")
    return {
        "format_version": FORMAT_VERSION,
        "ekd_ray": __version__,
        "study": study.config.fingerprint(),
        "class_names": list(arrays.class_names),
        "log_prior": weights.log_prior,
        "seeds": [row["seed"] for row in final],
        "workers": study.config.workers_per_trial,
        "seconds": result["seconds"],
        # These weights; then the winner in the search (one seed, the validation split), over
        # fresh seeds on the same split, and over these seeds on the test split, read once each.
        "model": {k: v for k, v in result["metrics"].items() if k.startswith(shown)},
        "search": _search_scores(study, winner),
        "validation": _spreads(winner.val_metrics),
        "test": _spreads(winner.test_metrics),
        "leaderboard": [_board_entry(row, study.config) for row in board],
        # Search scores: of one seed each, on the validation split.
        "pareto_front": [
            _front_entry(record, study.config)
            for record in (study.pareto() if study.config.objectives else ())
        ],
        # The winner's test top-1 minus each baseline's.
        "differences": {name: asdict(found) for name, found in study.differences().items()},
    }


def _search_scores(study: Study, winner: Row) -> dict[str, float]:
    number = int(winner.name.split()[-1])
    record = next((r for r in study.records() if r.number == number), None)
    last = record.last if record else {}
    return {name: value for name, value in last.items() if name.startswith("val_")}


def _spreads(seeds: tuple[dict[str, float], ...]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and n of every metric that all seeds have."""
    names = [name for name in (seeds[0] if seeds else {}) if all(name in found for found in seeds)]
    spread = {name: mean_sd([found[name] for found in seeds]) for name in names}
    return {name: {"mean": m, "sd": sd, "n": n} for name, (m, sd, n) in spread.items()}


def _front_entry(record: TrialRecord, config: StudyConfig) -> dict[str, Any]:
    figures = {name: record.last[name] for name in config.watched}
    return {"trial": record.number, **figures, "params": record.params}


def _board_entry(row: Row, config: StudyConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": row.name, "winner": row.winner}
    further = [(name, row.figures(name)) for name in config.watched if name != config.metric]
    for name, values in (("val", row.val), *further, ("test_top1", row.test)):
        if values:
            mean, deviation, count = mean_sd(values)
            entry[name] = {"mean": mean, "sd": deviation, "n": count, "values": list(values)}
    return entry


def read_evidence(path: Path) -> dict[str, Any]:
    """`metrics.json` of a bundle; raises `UserError` if it is damaged, foreign or newer."""
    metrics = _read_mapping(path)
    version = metrics.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"bundle {path.parent} has format version {version}, this ekd_ray reads <= "
            f"{FORMAT_VERSION}: upgrade ekd_ray."
        )
    names, model, test = (metrics.get(key) for key in ("class_names", "model", "test"))
    sound = (
        version == FORMAT_VERSION
        and isinstance(names, list)
        and len(names) > 1
        and all(isinstance(name, str) for name in names)
        and isinstance(model, dict)
        and _is_number(model.get("test_top1"))
        and isinstance(test, dict)
        and all(isinstance(entry, dict) for entry in test.values())
        and isinstance(metrics.get("workers"), int)
    )
    if not sound:
        raise _damaged(path)
    return metrics


def read_environment(path: Path) -> dict[str, Any]:
    """`environment.json` of a bundle; raises `UserError` if it is damaged."""
    found = _read_mapping(path)
    threads = found.get("threads")
    if not (isinstance(threads, int) and threads > 0 and isinstance(found.get("packages"), dict)):
        raise _damaged(path)
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        raise _damaged(path) from None
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: copy or export the bundle again.")
