"""The observers of a study's progress: one in this process, and a tracking service."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import COSTS
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.tracking_services import SERVICES, Service, first_line, split_track
from ekd_ray.scale.worker import RUN

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

    def ended(self, number: int, *, failure: str | None) -> None:
        """A run has ended: all epochs done, stopped early, or failed for the reason `failure`."""


class Tracker(tune.Callback):
    """Passes runs on to a tracking service; one that fails is given up, with one warning.

    Each run has its name, its settings as parameters and its figures by epoch; the study has the
    name of its folder.
    """

    def __init__(self, run: Path, config: StudyConfig) -> None:
        self._name, place = split_track(str(config.track))
        self._runs: dict[str, Any] = {}  # of Tune's trials that go on
        self._epochs: dict[str, int] = {}  # the last that was told of each
        self._service: Service | None = None
        self._try(lambda: self._open(place, run.name, config.fingerprint()))

    def __getstate__(self) -> dict[str, Any]:
        # Tune's snapshots are not resumed from.
        return {"_name": self._name, "_runs": {}, "_epochs": {}, "_service": None}

    def _open(self, *arguments: str) -> None:
        self._service = SERVICES[self._name](*arguments)

    def _try(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:  # of a service: the search must not end with it
            _LOG.warning(
                "%s is given up for this stage of the study: %s", self._name, first_line(error)
            )
            self._service = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        # A trial whose process died begins again, and goes on where it was.
        if (service := self._service) is None or trial.trial_id in self._runs:
            return
        run = RunRecord.from_dict(trial.config[RUN])
        public = DistillConfig.from_dict(run.config).without_places().to_dict()
        settings = {k: v for k, v in public.items() if v is not None}

        def start() -> None:
            self._runs[trial.trial_id] = service.start(run.title, settings)

        self._try(start)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        known, epoch = trial.trial_id, result.get("epoch", 0)
        if (service := self._service) is None or known not in self._runs:
            return
        if epoch <= self._epochs.get(known, 0):  # told before its process died
            return
        self._epochs[known] = epoch
        figures = {
            name: value
            for name, value in result.items()
            if name.startswith(_PREFIXES) or name in _FIGURES
        }
        self._try(lambda: service.log(self._runs[known], epoch, figures))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, failed=True)

    def _end(self, trial: Any, *, failed: bool) -> None:
        if (service := self._service) is not None and trial.trial_id in self._runs:
            ended = self._runs.pop(trial.trial_id)
            self._try(lambda: service.end(ended, failed=failed))
