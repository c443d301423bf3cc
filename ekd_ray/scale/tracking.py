"""The observers of a study's progress: one in this process, and MLflow."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback

from ekd_ray.config import StudyConfig
from ekd_ray.config.targets import COSTS
from ekd_ray.errors import UserError, check_installed, unknown_name
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.worker import RUN

SERVICE = "mlflow"
_LOG = logging.getLogger("ekd_ray")
_PREFIXES = ("train_", "val_", "loss_")
_FIGURES = {"lr", "log_prior", "temperature", "seconds", *COSTS}


class Observer(Protocol):
    """The terminal, or a test."""

    def filled(self, done: int, total: int) -> None:
        """So many parts of the teacher's logits, of all that the next stage needs, are there."""

    def stage(self, title: str, total: int, epochs: int) -> None:
        """A stage of `total` runs of at most `epochs` epochs begins; 0: it is a single step."""

    def note(self, text: str) -> None:
        """Something became known that the plan could not say."""

    def started(self, name: str, number: int, settings: dict[str, Any]) -> None:
        """A run begins."""

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        """A run has finished an epoch."""

    def ended(self, number: int, *, failed: bool) -> None:
        """A run has ended: all epochs done, stopped early, or failed."""


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
    check_installed("mlflow", needed_by="track", extra="mlflow")
    _quieten_mlflow()
    from mlflow import MlflowClient  # only a tracked study needs it

    try:
        MlflowClient(uri or None).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, of its database or of the network
        raise UserError(
            f"cannot open track {config.track} ({_first_line(error)}): check the URI and the "
            "server, or leave it out."
        ) from None


def _quieten_mlflow() -> None:
    # It writes of its own tables, into the live view.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A server that is gone would hold up the search for minutes at each figure.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


@dataclass(frozen=True, eq=False)
class _Shown:
    """A run as MLflow sees it, in place of Tune's trial."""

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
        _quieten_mlflow()
        self._shown: dict[str, _Shown] = {}
        self._logger: MLflowLoggerCallback | None = MLflowLoggerCallback(
            tracking_uri=uri or None,
            experiment_name=run.name,
            tags={"study": config.fingerprint()},
        )
        self._tell("setup")

    def __getstate__(self) -> dict[str, Any]:
        return {"_shown": {}, "_logger": None}  # Tune's snapshots are not resumed from

    def _tell(self, event: str, *values: Any, **named: Any) -> None:
        if self._logger is None:
            return
        try:
            getattr(self._logger, event)(*values, **named)
        except Exception as error:  # of a service: the search must not end with it
            _LOG.warning("MLflow is given up for this stage of the study: %s", _first_line(error))
            self._logger = None

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
        figures["training_iteration"] = result["epoch"]  # Tune's own begins again after a retry
        self._tell("log_trial_result", iteration, self._shown[trial.trial_id], figures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, failed=True)

    def _end(self, trial: Any, *, failed: bool) -> None:
        if trial.trial_id in self._shown:
            self._tell("log_trial_end", self._shown.pop(trial.trial_id), failed=failed)
