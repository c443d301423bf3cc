"""The services that `track` names: where a study's runs are shown beside those of other work."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError, check_installed, hide_secrets, unknown_name

# How long a service that does not answer may hold up the search.
_SECONDS = 30
# The most parameters that MLflow takes together.
_MLFLOW_PARAMS = 100


class Service(Protocol):
    """A service, opened for one study. Whatever its methods raise is the service's failure."""

    def __init__(self, place: str, study: str, fingerprint: str) -> None:
        """`place` is what follows the colon of `track`, "" without one; `study` a name."""

    @staticmethod
    def check(place: str) -> None:
        """Raise if the service cannot be reached, or not with what the user has set up."""

    def start(self, name: str, settings: Mapping[str, Any]) -> Any:
        """Begin a run; returns what the other methods know it by."""

    def log(self, run: Any, epoch: int, figures: Mapping[str, float]) -> None:
        """Tell a run's figures after an epoch."""

    def end(self, run: Any, *, failed: bool) -> None:
        """End a run, in one state or the other."""


class Mlflow:
    """MLflow: the experiment is named as the study; `place` is the URI of a server or store."""

    def __init__(self, place: str, study: str, fingerprint: str) -> None:
        self._client, self._tags = _mlflow_client(place), {"study": fingerprint}
        found = self._client.get_experiment_by_name(study)
        self._experiment = found.experiment_id if found else self._client.create_experiment(study)

    @staticmethod
    def check(place: str) -> None:
        server = place.partition("://")[2] or place
        if "?" in server or ("@" in server and not server.startswith(("/", "."))):
            raise UserError(
                "track holds a user, password or options, which the study's files would show: "
                "leave them out, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            )
        _mlflow_client(place).search_experiments(max_results=1)

    def start(self, name: str, settings: Mapping[str, Any]) -> Any:
        from mlflow.entities import Param

        created = self._client.create_run(self._experiment, run_name=name, tags=self._tags)
        run = created.info.run_id
        params = [Param(key, str(value)) for key, value in settings.items()]
        for first in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run, params=params[first : first + _MLFLOW_PARAMS])
        return run

    def log(self, run: Any, epoch: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
        self._client.log_batch(run, metrics=metrics)

    def end(self, run: Any, *, failed: bool) -> None:
        self._client.set_terminated(run, "FAILED" if failed else "FINISHED")


def _mlflow_client(uri: str) -> Any:
    # It writes of its own tables, into the live view.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A server that is gone would hold up the search for minutes at each figure.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_SECONDS // 2))
    from mlflow import MlflowClient  # only a tracked study needs it

    return MlflowClient(uri or None)


class Wandb:
    """Weights & Biases: runs of a study are a group of that name in the project `place`.

    `place` is PROJECT or ENTITY/PROJECT; without it the project is $WANDB_PROJECT, else ekd_ray.
    Of this machine the versions of packages are sent, and no command line, host, code or load.
    """

    def __init__(self, place: str, study: str, fingerprint: str) -> None:
        *entity, project = place.split("/")
        self._group, self._fingerprint = study, fingerprint
        self._entity = entity[0] if entity else None
        self._project = project or os.environ.get("WANDB_PROJECT") or "ekd_ray"

    @staticmethod
    def check(place: str) -> None:
        if place.count("/") > 1 or place.startswith("/") or place.endswith("/"):
            raise UserError(
                f"track of wandb is wandb, wandb:PROJECT or wandb:ENTITY/PROJECT, got "
                f"{hide_secrets(f'wandb:{place}')}."
            )
        import wandb  # only a tracked study needs it

        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if settings.mode in ("offline", "disabled", "dryrun"):
            return
        # It would ask a server that is gone for minutes, also while the process ends, and its
        # sentence would say that its own service is busy. Runs keep its patience.
        patience = settings.x_graphql_retry_max
        settings.x_graphql_retry_max = 1
        try:
            logged_in = wandb.login(prompt=False, verify=True, timeout=_SECONDS)
        finally:
            settings.x_graphql_retry_max = patience
        if not logged_in:
            raise UserError(
                "track: wandb needs an API key: run `wandb login` or set WANDB_API_KEY; "
                "WANDB_MODE=offline writes to files instead."
            )

    def start(self, name: str, settings: Mapping[str, Any]) -> Any:
        import wandb

        return wandb.init(
            entity=self._entity,
            project=self._project,
            group=self._group,
            name=name,
            config={**settings, "study": self._fingerprint},
            reinit="create_new",  # runs of a study go on side by side
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                init_timeout=_SECONDS,
                finish_timeout=_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def log(self, run: Any, epoch: int, figures: Mapping[str, float]) -> None:
        run.log(dict(figures), step=epoch)

    def end(self, run: Any, *, failed: bool) -> None:
        run.finish(exit_code=int(failed))


# What `track` may begin with; each service's package is an extra of the same name.
SERVICES: dict[str, type[Service]] = {"mlflow": Mlflow, "wandb": Wandb}


def split_track(track: str) -> tuple[str, str]:
    """(service, place) of a `track` like "mlflow:URI"."""
    service, _, place = track.partition(":")
    return service, place


def check_tracking(config: StudyConfig) -> None:
    """Open the service once, without writing to it.

    Raises:
        UserError: it is unknown, not installed, given a password or cannot be reached.
    """
    if config.track is None:
        return
    service, place = split_track(config.track)
    if service not in SERVICES:
        raise unknown_name("service in track:", service, SERVICES)
    check_installed(service, needed_by="track", extra=service)
    try:
        SERVICES[service].check(place)
    except UserError:
        raise
    except Exception as error:  # of the service's package, its database or the network
        raise UserError(
            f"cannot open track {hide_secrets(config.track)} ({first_line(error)}): check its "
            "name and the server, or leave it out."
        ) from None


def first_line(error: Exception) -> str:
    """The beginning of an error's text, which may be pages long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
