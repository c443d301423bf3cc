"""MLflow is told of every run through Ray's callback, and may fail without harm."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.tracking import Tracker, check_tracking
from ekd_ray.scale.worker import RUN

SETTINGS = DistillConfig(student="resnet8", lr=0.02, teacher_weights="/secret/place").to_dict()


def study(uri: str) -> StudyConfig:
    return StudyConfig(track=f"mlflow:{uri}")


def trial(number: int) -> Any:
    run = RunRecord(folder=Path("/home/me/runs"), stage=RunStage.SEARCH, name=f"trial {number}",
                    number=number, config=SETTINGS)  # fmt: skip
    return SimpleNamespace(trial_id=f"t{number}", config={RUN: run.to_dict()})


def play(tracker: Tracker) -> None:
    """Two runs as Tune tells of them: one to its end, started twice; one that dies."""
    for number in (0, 1):
        tracker.on_trial_start(0, [], trial(number))
    for epoch in (1, 2):
        if epoch == 2:  # its process died, and began again
            tracker.on_trial_start(0, [], trial(0))
        result = {"epoch": epoch, "training_iteration": 1, "val_top1": 0.1 * epoch,
                  "train_loss": 2.0, "pid": 7, "node_ip": "10.0.0.1", "done": False}  # fmt: skip
        tracker.on_trial_result(0, [], trial(0), result)
    tracker.on_trial_complete(0, [], trial(0))
    tracker.on_trial_error(0, [], trial(1))


def test_a_store_holds_every_run_with_its_settings_and_figures(tmp_path: Path) -> None:
    """Read back with MLflow's own client."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = study(uri)
    check_tracking(config)
    tracker = Tracker(tmp_path / "digits", config)
    play(tracker)
    assert tracker._logger is not None, "MLflow was given up"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    found = {run.info.run_name: run for run in runs}
    assert {name: run.info.status for name, run in found.items()} == {
        "trial 0": "FINISHED", "trial 1": "FAILED",
    }  # fmt: skip
    first = found["trial 0"]
    assert (first.data.params["student"], first.data.params["lr"]) == ("resnet8", "0.02")
    assert first.data.tags["study"] == config.fingerprint()
    curve = client.get_metric_history(first.info.run_id, "val_top1")
    assert [(point.step, round(point.value, 3)) for point in curve] == [(1, 0.1), (2, 0.2)]
    shown = {*first.data.params.values(), *first.data.params, *first.data.metrics}
    assert not shown & {"/secret/place", "/home/me/runs", "teacher_weights", "pid", "run/folder"}


class Failing:
    """Ray's callback in front of a server that goes away."""

    def __init__(self, **_: Any) -> None: ...
    def setup(self) -> None: ...
    def log_trial_start(self, shown: Any) -> None: ...
    def log_trial_result(self, *_: Any) -> None:
        raise ConnectionError("the server went away\nand a page of it")


def test_a_service_that_fails_is_given_up_with_one_warning(tmp_path, caplog, monkeypatch) -> None:
    """Nothing is raised into the search, also not by Tune's snapshots."""
    monkeypatch.setattr("ekd_ray.scale.tracking.MLflowLoggerCallback", Failing)
    tracker = Tracker(tmp_path / "run", study("http://127.0.0.1:1"))
    with caplog.at_level(logging.WARNING, "ekd_ray"):
        play(tracker)
        play(pickle.loads(pickle.dumps(tracker)))
    said = [record.getMessage() for record in caplog.records if record.name == "ekd_ray"]
    assert said == ["MLflow is given up for this stage of the study: the server went away"]


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("mflow:x", r"unknown service in track: 'mflow'. Did you mean 'mlflow'\?"),
        ("mlflow:https://me:hunter2@host/", "track holds a password"),
        ("mlflow:gopher://nowhere", "cannot open track mlflow:gopher://nowhere"),
        ("mlflow:http://127.0.0.1:1", "cannot open track mlflow:http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_refused_first(track, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_tracking(StudyConfig(track=track))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_without_mlflow_one_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ekd_ray\[mlflow\]'"):
        check_tracking(StudyConfig(track="mlflow"))
    check_tracking(StudyConfig())
