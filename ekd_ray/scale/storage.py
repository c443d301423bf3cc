"""Where a study's Optuna records live: a journal file in its folder, or a database."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.files import write_text
from ekd_ray.results.records import JOURNAL
from ekd_ray.scale.journal import Journal
from ekd_ray.scale.samplers import make_sampler
from ekd_ray.scale.space import quiet

STUDY_NAME = "ekd_ray"
# In a database several studies live together: each has the name that its folder holds.
NAME_FILE = "optuna.study"
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
# Options by which drivers of databases take one, besides the place before the host.
_PASSWORDS = ("password", "passwd", "sslpassword", "token")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def open_study(run: Path, config: StudyConfig) -> optuna.Study:
    """The study's Optuna records, created on first use.

    Raises:
        UserError: a database that cannot be reached.
    """
    quiet()
    name, url = STUDY_NAME, config.optuna_storage
    try:
        if url is None:
            storage: BaseStorage = Journal(run / JOURNAL)
        else:
            # A database drops connections that were idle through a long epoch.
            storage = RDBStorage(_expanded(url), engine_kwargs={"pool_pre_ping": True})
            name = _name(run)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[_DIRECTIONS[mode] for mode in config.directions],
            load_if_exists=True,
        )
        _name_objectives(study, list(config.all_objectives))
    except UserError:
        raise
    except Exception as error:  # of SQLAlchemy or of the driver beneath it
        if url is None:
            raise
        raise _unreachable(url, error) from None
    # Values count too: a kill may come between the beginning of a trial and its drawing.
    begun = sum(1 + len(trial.params) for trial in study.get_trials(deepcopy=False))
    study.sampler = make_sampler(config, begun=begun)
    return study


def _name_objectives(study: optuna.Study, names: list[str]) -> None:
    """For who looks at the study with Optuna's own tools: "val_top1", not "Objective 0"."""
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)


def check_storage(config: StudyConfig) -> None:
    """Connect to the study's database, if it has one, without writing to it.

    Raises:
        UserError: a URL that cannot be used, or that holds a password in plain text: the
            study's file would show it.
    """
    given = config.optuna_storage
    if given is None:
        return
    split = urlsplit(given)
    options = dict(parse_qsl(split.query))
    passwords = [split.password, *(options.get(name) for name in _PASSWORDS)]
    if any(password and not _VARIABLE.fullmatch(password) for password in passwords):
        raise UserError(
            "optuna_storage holds a password in plain text, which the study's files would show: "
            "put it into an environment variable and write ${NAME} in its place."
        )
    url = _expanded(given)
    import sqlalchemy

    try:
        sqlalchemy.create_engine(url).connect().close()
    except Exception as error:  # of SQLAlchemy or of the driver beneath it
        raise _unreachable(given, error) from None


def _expanded(url: str) -> str:
    """The URL with `${NAME}` replaced by environment variables."""
    missing = [name for name in _VARIABLE.findall(url) if name not in os.environ]
    if missing:
        raise UserError(
            f"optuna_storage {url} needs the environment variable {missing[0]}: set it."
        )
    return _VARIABLE.sub(lambda match: os.environ[match[1]], url)


def _unreachable(url: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for name in _VARIABLE.findall(url):
        reason = reason.replace(os.environ[name], f"${{{name}}}")
    return UserError(
        f"cannot open optuna_storage {url} ({reason}): check the URL, the server and its driver, "
        "or leave it out for a journal in the study's folder."
    )


def _name(run: Path) -> str:
    """The study's name in the database: the folder's, made unique and kept with it."""
    path = run / NAME_FILE
    if not path.exists():
        write_text(path, f"{run.name}-{uuid.uuid4().hex[:8]}")
    return path.read_text(encoding="utf-8")
