"""Telling MLflow of every run of a study, through the callback that Ray has for it."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback

from ekd_ray.config import StudyConfig
from ekd_ray.config.targets import COSTS
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.worker import RUN, RUNG_SCORE

SERVICE = "mlflow"
_LOGGER = logging.getLogger("ekd_ray")
_PREFIXES = ("train_", "val_", "loss_")
_FIGURES = {"lr", "log_prior", "temperature", "seconds", RUNG_SCORE, *COSTS}


def check_tracking(config: StudyConfig) -> None:
    """Open the service once, without writing to it.

    Raises:
        UserError: it is unknown, not installed, given a password or cannot be reached.
    """
    if config.track is None:
        return
    service, _, uri = config.track.partition(":")
    if service != SERVICE:
        raise unknown_name("service in track:", service, [SERVICE])
    if urlsplit(uri).password is not None:
        raise UserError(
            "track holds a password, which the study's files would show: leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "track needs mlflow, which is not installed: pip install 'ekd_ray[mlflow]'."
        )
    _configure()
    from mlflow import MlflowClient

    try:
        MlflowClient(uri or None).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, of its database or of the network
        raise UserError(
            f"cannot open track {config.track} ({_first_line(error)}): check the URI and the "
            "server, or leave it out."
        ) from None


def _configure() -> None:
    # It speaks of its own tables, into the live view.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A server that is gone would hold up the search for minutes at each figure.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


@dataclass(frozen=True, eq=False)
class _Shown:
    """A run as MLflow is to see it, in the place of Tune's trial."""

    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


class Tracker(tune.Callback):
    """Passes runs on to MLflow; a service that fails is given up, with one warning.

    Each run has its name, its settings as parameters and its figures by epoch. The experiment
    has the name of the study's folder.
    """

    def __init__(self, run: Path, config: StudyConfig) -> None:
        _, _, uri = str(config.track).partition(":")
        _configure()
        self._shown: dict[str, _Shown] = {}
        self._inner: MLflowLoggerCallback | None = MLflowLoggerCallback(
            tracking_uri=uri or None,
            experiment_name=run.name,
            tags={"study": config.fingerprint()},
        )
        self._tell("setup")

    def __getstate__(self) -> dict[str, Any]:
        return {"_shown": {}, "_inner": None}  # Tune's snapshots are not resumed from

    def _tell(self, event: str, *values: Any, **named: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, event)(*values, **named)
        except Exception as error:  # of a service: the search must not end with it
            _LOGGER.warning(
                "MLflow is given up for this stage of the study: %s", _first_line(error)
            )
            self._inner = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        run = RunRecord.from_dict(trial.config[RUN])
        settings = {k: v for k, v in run.config.items() if v is not None}
        settings.pop("teacher_weights", None)  # a path; the hash is there
        shown = self._shown.setdefault(trial.trial_id, _Shown(run.title, settings))
        self._tell("log_trial_start", shown)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if trial.trial_id not in self._shown or "epoch" not in result:
            return
        figures = {
            name: value
            for name, value in result.items()
            if name.startswith(_PREFIXES) or name in _FIGURES
        }
        figures["training_iteration"] = result["epoch"]  # Tune's own begins anew after a retry
        self._tell("log_trial_result", iteration, self._shown[trial.trial_id], figures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended(trial, failed=True)

    def _ended(self, trial: Any, *, failed: bool) -> None:
        if trial.trial_id in self._shown:
            self._tell("log_trial_end", self._shown.pop(trial.trial_id), failed=failed)
