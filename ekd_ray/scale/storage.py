"""Where a study's Optuna records live: a journal file in its folder, or a database."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ekd_ray.config import StudyConfig
from ekd_ray.errors import Damaged, UserError, check_installed, hide_secrets, shorten
from ekd_ray.files import (
    NoSuchFile,
    check_plain,
    open_plain,
    read_bytes,
    read_text,
    remove_path,
    write_text,
)
from ekd_ray.results.records import (
    JOURNAL,
    PLACE,
    REPORT,
    STUDY_FILE,
    read_record,
    trial_folders,
)
from ekd_ray.results.study_file import read_study_file
from ekd_ray.scale.optuna_private import lock_files, storage_of
from ekd_ray.scale.samplers import make_sampler
from ekd_ray.scale.space import silence_optuna

# In a database several studies live together: each has the name that its folder holds.
NAME_FILE = "optuna.study"
# Attributes of trials, with the number of another: whose point they have, or of which they are all
# the epochs because that was stopped early.
REPEATED = "repeats trial"
FULL_RUN = "full run of trial"
SETTINGS = "study"  # attribute of a study in a journal: its settings, as its file has them
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
# Options by which drivers of databases take one, besides the place before the host.
_PASSWORDS = ("password", "passwd", "sslpassword", "token")
# The other options that a URL may have. Any else might be another driver's word for a password.
_OPTIONS = {
    # of SQLite
    "cached_statements", "check_same_thread", "detect_types", "immutable", "isolation_level",
    "mode", "timeout", "uri",
    # of PostgreSQL
    "application_name", "channel_binding", "client_encoding", "connect_timeout", "gssencmode",
    "host", "keepalives", "port", "service", "sslcert", "sslcrl", "sslkey", "sslmode",
    "sslrootcert", "target_session_attrs", "user",
    # of MySQL
    "autocommit", "charset", "collation", "read_timeout", "ssl", "ssl_ca", "ssl_capath",
    "ssl_cert", "ssl_check_hostname", "ssl_cipher", "ssl_key", "ssl_mode", "ssl_verify_cert",
    "unix_socket", "use_unicode", "write_timeout",
    # of SQL Server, Oracle
    "driver", "encoding", "encrypt", "multisubnetfailover", "service_name", "trusted_connection",
    "trustservercertificate",
}  # fmt: skip
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def open_study(run: Path, config: StudyConfig, *, journal: Journal | None = None) -> optuna.Study:
    """The study's Optuna records, created on first use.

    Args:
        journal: an opened one, which is not read again.

    Raises:
        UserError: a database that cannot be reached.
    """
    silence_optuna()
    url = config.optuna_storage
    try:
        if url is None:
            storage: BaseStorage = journal or Journal(run / JOURNAL)
            # A journal has one study. Its folder may have been renamed since.
            known = storage.get_all_studies()
            name = known[0].study_name if known else run.resolve().name
        else:
            # A database drops connections that were idle through a long epoch.
            full = _with_passwords(url).render_as_string(hide_password=False)
            storage = RDBStorage(full, engine_kwargs={"pool_pre_ping": True})
            name = _database_name(run)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[_DIRECTIONS[mode] for mode in config.directions],
            load_if_exists=True,
        )
        if study.metric_names != list(config.all_objectives):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                # Optuna's own tools then show "val_top1", not "Objective 0".
                study.set_metric_names(list(config.all_objectives))
    except UserError:
        raise
    except Exception as error:  # of SQLAlchemy or of the driver beneath it
        if url is None:
            raise
        raise _unreachable(url, error) from None
    _describe(study, run, config)
    # Values count too: a kill may come between the beginning of a trial and its drawing.
    begun = sum(1 + len(trial.params) for trial in study.get_trials(deepcopy=False))
    study.sampler = make_sampler(config, begun=begun)
    return study


def _describe(study: optuna.Study, run: Path, config: StudyConfig) -> None:
    """Say what the study is about where Optuna's own tools show it, in its attributes."""
    shared, header = config.distill, {}
    if (run / STUDY_FILE).exists():
        header = read_study_file(run / STUDY_FILE).values
    facts = {
        "pair": f"{shared.teacher or 'none'}-{shared.student}",
        "data": shared.dataset,
        "recipe": config.recipe_name,
        "report": f"{header.get(PLACE) or run.absolute()}/{REPORT.as_posix()}",
    }
    if config.optuna_storage is None:
        facts[SETTINGS] = header.get("study")  # by which the study's file is repaired
    known = study.user_attrs
    with write_together(study):
        for name, value in facts.items():
            if known.get(name) != value:
                study.set_user_attr(name, value)


class _JournalFile(BaseJournalBackend):
    """A journal file, for the one process that drives the study.

    Optuna flushes every value of every trial to the disk by itself, which is most of what a
    trial costs the driver. Within `hold` lines are kept back, and seen by nobody but this
    process. Every line is read once; those of others (a dashboard's notes) that come while lines
    are held are left for the next process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))
        self._offset = 0  # of what the storage has not read yet
        self.count = 0  # of the lines before it
        self.held: list[dict[str, Any]] | None = None
        self._read = 0  # of those held, by the storage

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self.held is None:
            self._file.append_logs(logs)
        else:
            self.held += logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if self.held is None:
            yield from map(json.loads, self._new_lines())
            return
        new = self.held[self._read :]
        self._read = len(self.held)
        yield from new

    def _new_lines(self) -> Iterator[bytes]:
        if self._path.stat().st_size == self._offset:
            return
        with open_plain(self._path) as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written by another
                    return
                self._offset += len(line)
                self.count += 1
                yield line

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.held, self._read = [], 0
        try:
            yield
        finally:
            held, self.held = self.held, None
            if held:
                self._file.append_logs(held)
                for _ in self._new_lines():
                    pass  # which the storage has had, from `held`


class Journal(JournalStorage):
    """Optuna's records in a file, created on first use.

    Only for the process that drives the study, and so is the only one to write: a lock that
    is there belongs to nobody any more, and what a writer that was killed left is mended.
    """

    def __init__(self, path: Path) -> None:
        # Optuna waits 30 s for a lock that was left, and for ever where the path is relative:
        # the link then points nowhere, so that it has no age.
        for lock in lock_files(path):
            lock.unlink()
        # Optuna leaves a last line without an end unread, but appends to it: both would be lost.
        if path.exists():
            os.truncate(path, read_bytes(path).rfind(b"\n") + 1)
        self.lines = _JournalFile(path)
        try:
            super().__init__(self.lines)
        except (MemoryError, OSError, UserError):
            raise
        except Exception:  # whatever Optuna makes of a line that it has not written
            reason = f"its line {self.lines.count} is none that Optuna writes"
            raise Damaged(path, reason) from None


@contextlib.contextmanager
def write_together(study: optuna.Study) -> Iterator[None]:
    """Bring all that a study's journal is given within to the disk at its end, at once.

    Killed before that, none of it was written; killed in between, its first lines were. A
    database is written to as ever.
    """
    storage = storage_of(study)
    if not isinstance(storage, Journal) or storage.lines.held is not None:
        yield
        return
    storage.get_all_studies()  # reads what others have written so far, which comes before it
    with storage.lines.hold():
        yield


def begun_trials(journal: Journal) -> set[int]:
    """The numbers of the trials that a journal knows, but those that wait for their turn."""
    return {
        trial.number
        for name in optuna.get_all_study_names(journal)
        for trial in optuna.load_study(study_name=name, storage=journal).get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING
    }


def drop_unknown_trials(run: Path) -> list[str]:
    """Remove folders of trials that the journal does not know and that hold no record; their names,
    `trials/0007`.

    A study fetched from a URI may have some: a kill came between the upload of a trial's first
    files and that of the journal. Their numbers will be those of other trials. A journal that
    lacks a trial with a record, or is missing, is made anew from them all (`open_or_rebuild`).
    """
    if not (run / JOURNAL).exists():
        return []
    try:
        known = begun_trials(Journal(run / JOURNAL))
    except Damaged:
        return []
    dropped = []
    for number, folder in trial_folders(run).items():
        if number not in known and not has_record(folder):
            remove_path(folder)
            dropped.append(f"trials/{folder.name}")
    return dropped


def has_record(folder: Path) -> bool:
    """Whether a trial has left a record, of its end or of its beginning, whole or damaged."""
    try:
        return read_record(folder) is not None
    except Damaged:
        return True


def check_storage(config: StudyConfig) -> None:
    """Connect to the study's database, if it has one; nothing is written, and no file made.

    Raises:
        UserError: a URL that cannot be used, that holds a password in plain text (the study's
            file would show it), or a variable elsewhere (the server's logs would).
    """
    given = config.optuna_storage
    if given is None:
        return
    check_installed("sqlalchemy", needed_by="optuna_storage", extra="database")
    import sqlalchemy  # only a study in a database needs it

    url = _parse_url(given)
    _check_secrets(given, url)
    if not _is_to_be_made(given, url):
        try:
            sqlalchemy.create_engine(_with_passwords(given)).connect().close()
        except Exception as error:  # of SQLAlchemy or of the driver beneath it
            raise _unreachable(given, error) from None


def _parse_url(given: str) -> Any:
    from sqlalchemy.engine import make_url

    try:
        return make_url(given)
    except Exception:  # whose text may hold a part of the URL
        shown = "***" if "@" in given and "://" not in given else given
        raise _unreachable(shown, "it is not DIALECT://USER@HOST:PORT/DATABASE") from None


def _check_secrets(given: str, url: Any) -> None:
    """Refuse a password in plain text, wherever in the URL, and a variable that is none."""
    options = [(name, value) for name, values in url.normalized_query.items() for value in values]
    for name, _ in options:
        if name not in _PASSWORDS and name.lower() not in _OPTIONS:
            raise UserError(
                f"optuna_storage has an option {shorten(name)}, which might hold a password: leave "
                "it out, or set it where the driver reads it (its environment or its file)."
            )
    passwords = [value for name, value in options if name in _PASSWORDS]
    passwords += [str(url.password)] if url.password else []
    # SQLAlchemy drops an option without a value, and takes a password with a slash for a place.
    written = given.rpartition("@")[2].partition("?")[2]
    place = f"{url.host or ''}{url.database or ''}" if url.host or not _is_sqlite(url) else ""
    is_plain = written.count("&") + bool(written) != len(options) or re.search("[@=;]", place)
    if is_plain or not all(map(_VARIABLE.fullmatch, passwords)):
        raise UserError(
            "optuna_storage holds a password in plain text, which the study's files would show: "
            "put it into an environment variable and write ${NAME} in its place."
        )
    if len(_VARIABLE.findall(given)) > len(passwords):
        raise UserError(
            f"in optuna_storage ${{NAME}} stands for the password alone, got "
            f"{hide_secrets(given)}: write the rest of the URL in full."
        )
    names = [name for password in passwords for name in _VARIABLE.findall(password)]
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(
            f"optuna_storage {hide_secrets(given)} needs the environment variable {missing[0]}: "
            "set it."
        )


def _is_sqlite(url: Any) -> bool:
    return bool(url.get_backend_name() == "sqlite")


def _is_to_be_made(given: str, url: Any) -> bool:
    """Whether it is a file of SQLite that is not there yet, which connecting would create.

    Raises:
        UserError: the file is no plain one, or could not be made.
    """
    if not _is_sqlite(url) or url.database in (None, "", ":memory:"):
        return False
    path = url.database.removeprefix("file:") if "uri" in url.query else url.database
    try:
        check_plain(path)
    except NoSuchFile:
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.lexists(path) or not os.access(folder, os.W_OK | os.X_OK):
            raise _unreachable(given, f"nothing can be made in {folder}") from None
        return True
    return False


def _with_passwords(text: str) -> Any:
    """SQLAlchemy's URL, each `${NAME}` in the place of a password replaced by its variable."""

    def value_of(password: str) -> str:
        match = _VARIABLE.fullmatch(password)
        return os.environ[match[1]] if match else password

    url = _parse_url(text)
    if url.password:
        url = url.set(password=value_of(str(url.password)))
    for name in {*_PASSWORDS} & {*url.query}:
        url = url.update_query_pairs((name, value_of(v)) for v in url.normalized_query[name])
    return url


def _unreachable(url: str, error: Exception | str) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for name in _VARIABLE.findall(url):
        value = os.environ.get(name, "")
        for text in {value, quote_plus(value)} - {""}:
            reason = reason.replace(text, f"${{{name}}}")
    return UserError(
        f"cannot open optuna_storage {hide_secrets(url)} ({reason}): check the URL, the server and "
        "its driver, or leave it out for a journal in the study's folder."
    )


def _database_name(run: Path) -> str:
    """The study's name in the database: the folder's, made unique and kept with it."""
    path = run / NAME_FILE
    if not path.exists():
        write_text(path, f"{run.name}-{uuid.uuid4().hex[:8]}")
    return read_text(path)
