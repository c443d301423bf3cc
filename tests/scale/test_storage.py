"""A study's Optuna records: named after it, in a database, in a journal that is flushed rarely."""

import importlib.util
import os
from pathlib import Path
from unittest.mock import MagicMock

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from search_runs import run, study_of
from sqlalchemy.engine import make_url

from ekd_ray.config import StudyConfig
from ekd_ray.config.yaml_files import dump_yaml
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError, hide_secrets
from ekd_ray.files import write_text
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import NAME_FILE, Journal, check_storage, open_study, write_together
from ekd_ray.scale.worker import RUN
from ekd_ray.studies.pipeline import check_study, prepare_study


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def test_a_study_in_a_database_resumes_and_keeps_to_itself(url, tmp_path):
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    config = study_of("tpe", optuna_storage=url, trials=8)
    first = [*run(folders[0], config, 5)]
    run(folders[1], config.replace(seed=1), 3)
    first += run(folders[0], config, 5)
    assert len(first) == 8, "resumed, and not beyond its trials"
    assert not list(tmp_path.rglob("optuna.journal"))
    names = [(folder / NAME_FILE).read_text() for folder in folders]
    assert len(set(names)) == 2
    storage = RDBStorage(url)
    assert sorted(optuna.get_all_study_names(storage)) == sorted(names)
    counts = [len(optuna.load_study(study_name=n, storage=storage).trials) for n in names]
    assert counts == [8, 3]


def test_optunas_own_tools_say_what_a_study_is_about(tmp_path, url):
    """By its name and its attributes."""
    for name, more in (("here", {}), ("there", {"optuna_storage": url})):
        config = study_of("tpe", trials=4, recipe_name="mine", **more)
        (tmp_path / name).mkdir()
        study = open_study(tmp_path / name, config)
        assert study.study_name.startswith(name)
        assert study.user_attrs == {
            "pair": f"{config.distill.teacher or 'none'}-{config.distill.student}",
            "data": config.distill.dataset, "recipe": "mine",
            "report": str(tmp_path / name / "report" / "index.html"),
        }  # fmt: skip
    journal = tmp_path / "here" / "optuna.journal"
    open_study(tmp_path / "here", config.replace(optuna_storage=None))
    assert journal.read_text().count("index.html") == 1, "they are written once"


def test_an_interrupted_trial_continues_under_its_number(url, tmp_path):
    config = study_of("tpe", optuna_storage=url, trials=3)
    left = OptunaSearcher(tmp_path, config, resolve(config.distill)).suggest("t0")
    again = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert again.remaining == 3
    assert again.suggest("t1")[RUN]["config"] == left[RUN]["config"]


def test_secrets_stay_in_the_environment(tmp_path, monkeypatch):
    secret = "p@ss/w:rd%"  # what would be another URL, were it pasted in
    monkeypatch.setenv("EKD_TEST_PASSWORD", secret)
    # SQLite takes a user and a password in a URL for part of the file's name: ask what it is given.
    opened = []
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: opened.append(url) or MagicMock())
    for url in ("postgresql://me:${EKD_TEST_PASSWORD}@host:5432/studies",
                "postgresql://host/studies?user=me&password=${EKD_TEST_PASSWORD}"):  # fmt: skip
        config = study_of("random", optuna_storage=url, trials=2)
        check_storage(config)
        assert secret in (opened[-1].password, opened[-1].query.get("password"))
        assert opened[-1].host == "host"
        # Optuna takes a text, which must mean the same.
        assert make_url(opened[-1].render_as_string(hide_password=False)) == opened[-1]
        assert secret not in config.to_yaml()
    with pytest.raises(UserError, match="holds a password in plain text"):
        check_study(config.replace(optuna_storage="postgresql://me:secret@host/studies"))
    with pytest.raises(UserError, match="holds a password in plain text") as refused:
        check_storage(config.replace(optuna_storage="postgresql://host/x?user=me&password=secret"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [("nonsense", "cannot open optuna_storage nonsense"), ("nodialect://x", "cannot open"),
     ("sqlite:////no/such/folder/x.db", "cannot open"),
     ("postgresql://me:${EKD_NO_SUCH}@host/x", "needs the environment variable EKD_NO_SUCH")],
)  # fmt: skip
def test_what_cannot_be_opened_is_refused_before_the_search(url, message):
    with pytest.raises(UserError, match=message):
        check_study(study_of("random", optuna_storage=url))


def test_an_error_of_the_driver_does_not_show_the_secret(monkeypatch):
    monkeypatch.setenv("EKD_TEST_SECRET", "hush hush")
    config = study_of("random", optuna_storage="postgresql://me:${EKD_TEST_SECRET}@host/x")

    def refuse(url):
        raise ValueError(
            f"no answer from {url.render_as_string(hide_password=False)}, {url.password}"
        )

    monkeypatch.setattr("sqlalchemy.create_engine", refuse)
    with pytest.raises(UserError, match="cannot open") as refused:
        check_storage(config)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["sqlite:////tmp/${AWS_SECRET_ACCESS_KEY}.db", "postgresql://${AWS_SECRET_ACCESS_KEY}.evil/x",
     "postgresql://me:${PASSWORD}@host/${AWS_SECRET_ACCESS_KEY}",
     "postgresql://${AWS_SECRET_ACCESS_KEY}:${PASSWORD}@host/x",
     "postgresql://host/x?application_name=${AWS_SECRET_ACCESS_KEY}"],
)  # fmt: skip
def test_a_variable_stands_for_a_password_alone(url, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "PASSWORD"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: pytest.fail("connected"))
    with pytest.raises(UserError, match="stands for the password alone") as refused:
        check_storage(study_of("random", optuna_storage=url))
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["sqlite:////tmp/x.db?password=hunter2&password=${HOME}", "sqlite:////tmp/x.db?pwd=hunter2",
     "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhunter2", "postgresql://h/db?hunter2",
     "postgresql://u:hun/ter2@h/db", "postgresql://u:hun?ter2@h/db", "mysql://u/x:hunter2@h/db",
     "postgresql:///user=u password=hunter2", "mssql+pymssql://h/db;PWD=hunter2",
     "postgresql://u:${HOME}@h/db?sslpassword=hunter2", "://u:hunter2@h/db",
     "postgresql:/u:hunter2@h/db",
     "postgresql://u:hunter2@h:port/db"],
)  # fmt: skip
def test_a_password_is_found_wherever_a_driver_would(url, monkeypatch):
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: pytest.fail("connected"))
    with pytest.raises(UserError, match="optuna_storage") as refused:
        check_storage(study_of("random", optuna_storage=url))
    assert "ter2" not in str(refused.value)


def test_messages_hide_what_may_be_a_password():
    for url in ("a://u:${P}@h/x?y=${A}", "sqlite:////home/me@x/y.db", "a://u@h", "folder", "${X}"):
        assert hide_secrets(url) == url
    assert hide_secrets("a://u:x@h/x?ssl=b&p=${Q}&c") == "a://***@h/x?ssl=***&p=${Q}&***"
    for url in ("a://u:q?q/q@h", "a://q@q:q@h/x", "a:///x?p=q@q", "a://h?p=q=q&q;r=q", "a://u:q@"):
        assert "q" not in hide_secrets(url)


def test_a_file_of_sqlite_is_a_plain_one_and_is_not_made_by_a_look(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere/x.db")
    for name, word in {"fifo": "a FIFO", "link": "cannot open", ".": "a folder"}.items():
        with pytest.raises(UserError, match=word):
            check_storage(study_of("random", optuna_storage=f"sqlite:///{tmp_path / name}"))
    with pytest.raises(UserError, match="a device"):
        check_storage(study_of("random", optuna_storage="sqlite:////dev/zero"))
    there = sorted(tmp_path.iterdir())
    check_storage(study_of("random", optuna_storage=f"sqlite:///{tmp_path / 'new.db'}"))
    assert sorted(tmp_path.iterdir()) == there


def test_a_resumed_study_is_not_looked_for_in_another_place(tmp_path, monkeypatch):
    config = study_of("random", trials=2)
    write_text(tmp_path / "study.yaml", dump_yaml({"format_version": 1, "study": config.to_dict()}))
    values = {**config.to_dict(), "optuna_storage": "postgresql://u:${HOME}@h/db"}
    recipe = MagicMock(config=StudyConfig.from_dict(values))
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: pytest.fail("connected"))
    with pytest.raises(UserError, match="another configuration: optuna_storage"):
        prepare_study(recipe, resumed=tmp_path)


def test_without_sqlalchemy_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs sqlalchemy, .*: pip install 'ekd_ray\[database\]'"):
        check_storage(study_of("random", optuna_storage="sqlite:///x.db"))
    check_storage(study_of("random"))


# Names


def names_in(folder: Path) -> list[str]:
    backend = JournalFileBackend(str(folder / "optuna.journal"))
    return optuna.get_all_study_names(JournalStorage(backend))


def test_a_dashboard_tells_studies_apart_by_their_folders(tmp_path):
    config = study_of("random", trials=1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        open_study(tmp_path / name, config)
        assert names_in(tmp_path / name) == [name]


def test_a_journal_is_resumed_whatever_its_study_is_called(tmp_path):
    """All were called `ekd_ray` once, and a folder may be renamed."""
    old, config = tmp_path / "old", study_of("random", trials=4)
    old.mkdir()
    optuna.create_study(
        storage=Journal(old / "optuna.journal"), study_name="ekd_ray", direction="maximize"
    )
    run(old, config, 2)
    run(old.rename(tmp_path / "new"), config, 1)
    assert names_in(tmp_path / "new") == ["ekd_ray"]
    assert len(open_study(tmp_path / "new", config).trials) == 3


# Journals


def study_in(path: Path) -> optuna.Study:
    return optuna.create_study(storage=Journal(path), study_name="s", load_if_exists=True)


def reread(path: Path) -> optuna.Study:
    """As another program sees it."""
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))


def draw(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    for name in "abc":
        trial.suggest_float(name, 0, 1)
    return trial


def test_a_trial_is_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_in(tmp_path / "journal")
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(file), fsync(file))[1])
    with write_together(study):
        trial = draw(study)
        assert study.trials[0].params == trial.params, "it is seen here before it is on the disk"
        assert not reread(tmp_path / "journal").trials
    assert len(flushed) == 1
    assert reread(tmp_path / "journal").trials[0].params == trial.params
    with write_together(study), write_together(study):
        for epoch in range(1, 10):
            trial.report(0.5, epoch)
        study.tell(trial, 0.5)
        assert len(flushed) == 1
    assert len(flushed) == 2
    (told,) = reread(tmp_path / "journal").trials
    assert told.state == TrialState.COMPLETE and len(told.intermediate_values) == 9


def test_what_was_drawn_before_an_error_is_kept(tmp_path: Path) -> None:
    study = study_in(tmp_path / "journal")

    def broken() -> None:
        with write_together(study):
            draw(study)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    (kept,) = reread(tmp_path / "journal").trials
    assert kept.state == TrialState.RUNNING and len(kept.params) == 3


def test_a_dashboard_may_write_in_between(tmp_path: Path) -> None:
    study = study_in(tmp_path / "journal")
    dashboard = reread(tmp_path / "journal")
    dashboard.set_user_attr("note", "before")
    with write_together(study):
        first = draw(study)
        dashboard.set_user_attr("note", "while")
        first.report(0.25, 1)
        study.ask()  # what would be there twice if it were read twice
    dashboard.set_user_attr("note", "after")
    second = draw(study)
    with write_together(study):
        study.tell(first, 0.5)
        study.tell(second, 0.75)
    draw(study)
    for seen in (study, reread(tmp_path / "journal"), study_in(tmp_path / "journal")):
        trials = seen.trials
        assert [trial.value for trial in trials] == [0.5, None, 0.75, None]
        assert trials[0].intermediate_values == {1: 0.25}
        assert [len(trial.params) for trial in trials] == [3, 0, 3, 3]


def test_a_file_of_sqlite_may_be_named_as_a_uri(tmp_path):
    url = f"sqlite:///file:{tmp_path / 'a.db'}?uri=true&mode=rwc"
    check_storage(study_of("random", optuna_storage=url))
    assert list(tmp_path.iterdir()) == [], "nothing is made by a look"
    with pytest.raises(UserError, match="nothing can be made"):
        check_storage(study_of("random", optuna_storage=url.replace("/a.db", "/no/a.db")))
