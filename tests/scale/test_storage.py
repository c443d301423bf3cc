"""A study's Optuna records in a database."""

import optuna
import pytest
from optuna.storages import RDBStorage
from search_runs import run, study_of

from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import NAME_FILE, check_storage
from ekd_ray.studies.pipeline import check_study


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


def test_an_interrupted_trial_continues_under_its_number(url, tmp_path):
    config = study_of("tpe", optuna_storage=url, trials=3)
    left = OptunaSearcher(tmp_path, config, resolve(config.distill)).suggest("t0")
    again = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert again.remaining == 3
    assert again.suggest("t1")["job"]["settings"] == left["job"]["settings"]


def test_secrets_stay_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_TEST_FOLDER", str(tmp_path))
    config = study_of("random", optuna_storage="sqlite:///${EKD_TEST_FOLDER}/optuna.db", trials=2)
    check_storage(config)
    run(tmp_path, config, 2)
    assert (tmp_path / "optuna.db").exists()
    assert str(tmp_path) not in config.to_yaml()
    with pytest.raises(UserError, match="holds a password in plain text"):
        check_study(config.replace(optuna_storage="postgresql://me:secret@host/studies"))
    with pytest.raises(UserError, match="holds a password in plain text") as refused:
        check_storage(config.replace(optuna_storage="postgresql://host/x?user=me&password=secret"))
    assert "secret" not in str(refused.value)


def test_a_missing_variable_is_named():
    config = study_of("random", optuna_storage="sqlite:///${EKD_NO_SUCH}/optuna.db")
    with pytest.raises(UserError, match=r"needs the environment variable EKD_NO_SUCH: set it"):
        check_study(config)


@pytest.mark.parametrize("url", ["nonsense", "nodialect://x", "sqlite:////no/such/folder/x.db"])
def test_what_cannot_be_opened_is_refused_before_the_search(url):
    with pytest.raises(UserError, match=f"cannot open optuna_storage {url} .*: check the URL"):
        check_study(study_of("random", optuna_storage=url))


def test_an_error_of_the_driver_does_not_show_the_secret(monkeypatch):
    monkeypatch.setenv("EKD_TEST_SECRET", "no/such/folder")
    config = study_of("random", optuna_storage="sqlite:////${EKD_TEST_SECRET}/x.db")
    with pytest.raises(UserError) as refused:
        check_storage(config)
    assert "no/such/folder" not in str(refused.value)
