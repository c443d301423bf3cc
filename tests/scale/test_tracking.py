"""A tracking service is told of every run, and may fail without harm."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.tracking import Tracker
from ekd_ray.scale.tracking_services import SERVICES, check_tracking
from ekd_ray.scale.worker import RUN

SETTINGS = DistillConfig(student="resnet8", lr=0.02, teacher_weights="/secret/place").to_dict()


def trial(number: int) -> Any:
    run = RunRecord(folder=Path("/home/me/runs"), stage=RunStage.SEARCH, name=f"trial {number}",
                    number=number, config=SETTINGS)  # fmt: skip
    return SimpleNamespace(trial_id=f"t{number}", config={RUN: run.to_dict()})


def play(tracker: Tracker) -> None:
    """Two runs as Tune tells of them: one to its end, started twice; one that dies."""
    for number in (0, 1):
        tracker.on_trial_start(0, [], trial(number))
    for epoch in (1, 2):
        if epoch == 2:  # its process died, began again, and went back by an epoch
            tracker.on_trial_start(0, [], trial(0))
            tracker.on_trial_result(0, [], trial(0), {"epoch": 1, "val_top1": 0.1})
        result = {"epoch": epoch, "training_iteration": 1, "val_top1": 0.1 * epoch,
                  "train_loss": 2.0, "pid": 7, "node_ip": "10.0.0.1", "done": False}  # fmt: skip
        tracker.on_trial_result(0, [], trial(0), result)
    tracker.on_trial_complete(0, [], trial(0))
    tracker.on_trial_error(0, [], trial(1))


def test_a_store_holds_every_run_with_its_settings_and_figures(tmp_path: Path) -> None:
    """Read back with MLflow's own client."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = StudyConfig(track=f"mlflow:{uri}")
    check_tracking(config)
    tracker = Tracker(tmp_path / "digits", config)
    play(tracker)
    assert tracker._service is not None, "MLflow was given up"
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
    Tracker(tmp_path / "digits", config)  # the next stage goes on in the same experiment
    assert len(client.search_experiments(filter_string="name = 'digits'")) == 1


OFFLINE = """
import sys
from pathlib import Path
from test_tracking import StudyConfig, Tracker, check_tracking, play
config = StudyConfig(track="wandb:team/shared")
check_tracking(config)
tracker = Tracker(Path("digits"), config)
play(tracker)
assert tracker._service is not None, "W&B was given up"
print(config.fingerprint())
"""


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a run's .wandb file: LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:  # no room for a head in this block
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_files_of_wandb_hold_every_run_with_its_settings_and_figures(tmp_path: Path) -> None:
    """Offline, in a process of its own: wandb leaves a server behind in the one that uses it."""
    environment = {
        **os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    environment.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, cwd=tmp_path, timeout=200,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "wandb writes into the live view"
    found = {}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        records = list(wandb_records(path))
        (run,) = (record.run for record in records if record.HasField("run"))
        config = {item.key: item.value_json for item in run.config.update}
        curve = [
            {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        (code,) = (record.exit.exit_code for record in records if record.HasField("exit"))
        found[run.display_name] = run, config, curve, code
        everything = path.read_bytes()
        for secret in ("/secret/place", "/home/me/runs", "teacher_weights", "10.0.0.1", tmp_path):
            assert str(secret).encode() not in everything
        assert not [record for record in records if record.HasField("environment")]
    assert {name: code for name, (*_, code) in found.items()} == {"trial 0": 0, "trial 1": 1}
    run, config, curve, _ = found["trial 0"]
    assert (run.entity, run.project, run.run_group) == ("team", "shared", "digits")
    assert (config["student"], config["lr"]) == ('"resnet8"', "0.02")
    assert config["study"] == f'"{done.stdout.strip()}"'
    assert [(row["_step"], row["val_top1"], row["train_loss"]) for row in curve] == [
        ("1", "0.1", "2"), ("2", "0.2", "2"),
    ]  # fmt: skip


class Failing:
    """A service whose server goes away."""

    def __init__(self, *_: str) -> None: ...
    def start(self, *_: Any) -> None: ...
    def log(self, *_: Any) -> None:
        raise ConnectionError("the server went away\nand a page of it")


def test_a_service_that_fails_is_given_up_with_one_warning(tmp_path, caplog, monkeypatch) -> None:
    """Nothing is raised into the search, also not by Tune's snapshots."""
    monkeypatch.setitem(SERVICES, "mlflow", Failing)
    tracker = Tracker(tmp_path / "run", StudyConfig(track="mlflow"))
    with caplog.at_level(logging.WARNING, "ekd_ray"):
        play(tracker)
        play(pickle.loads(pickle.dumps(tracker)))
    said = [record.getMessage() for record in caplog.records if record.name == "ekd_ray"]
    assert said == ["mlflow is given up for this stage of the study: the server went away"]


@pytest.mark.parametrize(
    ("track", "said"),
    [
        ("mflow:x", r"unknown service in track: 'mflow'. Did you mean 'mlflow'\?"),
        ("mlflow:https://me:hunter2@host/", "track holds a .*password"),
        ("mlflow:https://me:hun/ter2@host/", "track holds a .*password"),
        ("mlflow:https://hunter2@host/", "track holds a .*password"),
        ("mlflow:me:hunter2@host", "track holds a .*password"),
        ("mlflow:https://host/?token=hunter2", "track holds a .*options"),
        ("mlflow:gopher://nowhere", "cannot open track mlflow:gopher://nowhere"),
        ("mlflow:http://127.0.0.1:1", "cannot open track mlflow:http://127.0.0.1:1"),
        ("wandb:a/b/c", "wandb:ENTITY/PROJECT, got wandb:a/b/c"),
        ("wandb:team/", "wandb:ENTITY/PROJECT, got wandb:team/"),
    ],
)
def test_what_cannot_be_is_refused_first(track, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_tracking(StudyConfig(track=track))
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


NO_KEY = """
from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.tracking_services import check_tracking
try:
    check_tracking(StudyConfig(track="wandb"))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "track: wandb needs an API key: run `wandb login`"),
        # Of the server that is gone it speaks, and not of wandb's own service that still asks.
        ("k" * 40, "cannot open track wandb (Failed to authenticate with http://127.0.0.1:1: POST"),
    ],
)
def test_wandb_without_a_key_or_a_server_is_one_sentence(tmp_path: Path, key: str, said: str):
    environment = {
        **os.environ, "WANDB_BASE_URL": "http://127.0.0.1:1", "HOME": str(tmp_path),
        "WANDB_API_KEY": key, "PYTHONPATH": os.pathsep.join(sys.path),
        "WANDB_ERROR_REPORTING": "false",  # it would tell the outside of the test
    }  # fmt: skip
    for name in ("WANDB_MODE", *([] if key else ["WANDB_API_KEY"])):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", NO_KEY], env=environment, cwd=tmp_path, timeout=200,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert "kkkk" not in done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_without_its_package_one_sentence_says_what_to_install(service, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'ekd_ray\[{service}\]'"):
        check_tracking(StudyConfig(track=service))
    check_tracking(StudyConfig())
