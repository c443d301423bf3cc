"""A study's logdir as TensorBoard itself reads and serves it: scalars, HParams, images."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from report_studies import predictions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from ekd_ray.engine.pictures import confusion, write_pictures
from ekd_ray.engine.runlog import RunLog, Session, end_session, write_experiment

SPACE = {
    "temperature": {"low": 1.0, "high": 4.0, "log": True},
    "evidence": {"choices": ["softplus", "exp"]},
    "standardize": {"choices": [False, True]},
}
ROW = {
    "epoch": 1, "lr": 0.05, "temperature": 2.0, "log_prior": -1.0, "train_loss": 1.5,
    "train_top1": 0.4, "loss_ce": 1.0, "loss_kd": 0.5, "loss_ekd": 0.2, "val_top1": 0.5,
    "val_ece": 0.1, "parameters": 1000, "seconds": 1.0,
}  # fmt: skip
TAGS = {"train/loss", "train/top1", "loss/ce", "loss/kd", "loss/ekd", "val/top1", "val/ece",
        "solver/lr", "solver/temperature", "solver/log_prior", "solver/seconds",
        "cost/parameters"}  # fmt: skip


def log_run(folder, top1, *, group="", end="ended", **settings):
    """A run of one epoch that ended, failed, or was killed."""
    session = Session(settings=tuple(SPACE), group=group)
    settings = {"temperature": 2.0, "evidence": "exp", "standardize": True, "seed": 7, **settings}
    log = RunLog(folder, hyperparameters=settings, history=[], session=session)
    log.write({**ROW, "val_top1": top1})
    if end == "killed":
        log._events.flush()
    else:
        log.close(failed=end == "failed")


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    run = tmp_path_factory.mktemp("study")
    write_experiment(run, SPACE, ["val/top1", "val/ece", "test/top1"])
    log_run(run / "trials" / "0000", 0.5, temperature=1.5)
    log_run(run / "trials" / "0001", 0.1, end="failed", evidence="softplus", standardize=False)
    log_run(run / "trials" / "0002", 0.3, end="killed", temperature=3.0)
    end_session(run / "trials" / "0002", failed=True)
    for seed, top1 in ((1, 0.4), (2, 0.6)):
        folder = run / "confirm" / f"final-trial-0-seed-{seed}-abc"
        log_run(folder, top1, group="final trial 0", seed=seed)
        write_pictures(folder, predictions(2.0, seed), split="test",
                       scalars={"test_top1": top1 + 0.1}, step=1)  # fmt: skip
    teacher = RunLog(run / "teacher", hyperparameters={"lr": 1}, history=[],
                     session=Session(settings=()))  # fmt: skip
    teacher.write(ROW)
    teacher.close()
    return run


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_a_session_shows_what_is_searched_and_nothing_else(logdir):
    content = events(logdir / "trials" / "0000").PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    assert dict(start.session_start_info.hparams).keys() == SPACE.keys()
    assert "_hparams_/experiment" not in content


def test_the_teachers_run_has_no_session(logdir):
    found = events(logdir / "teacher")
    assert "train/loss" in found.Tags()["scalars"]
    with pytest.raises(KeyError):
        found.PluginTagToContent("hparams")


@pytest.mark.parametrize(("trial", "status"), [("0000", 1), ("0001", 2), ("0002", 2)])
def test_every_session_has_an_end(logdir, trial, status):
    content = events(logdir / "trials" / trial).PluginTagToContent("hparams")
    end = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_end_info"])
    assert end.session_end_info.status == status


def test_a_session_is_ended_once(logdir):
    folder = logdir / "trials" / "0000"
    before = sorted(folder.iterdir())
    end_session(folder, failed=True)
    end_session(logdir / "nowhere", failed=True)
    assert sorted(folder.iterdir()) == before and not (logdir / "nowhere").exists()


def test_confusion_counts_labels_by_predictions():
    from sklearn.metrics import confusion_matrix

    found = predictions(1.0, 3)
    expected = confusion_matrix(found.labels, found.predicted, labels=range(5))
    assert (confusion(found) == expected).all()


@pytest.fixture(scope="module")
def server(logdir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host",
               "127.0.0.1", "--port", str(port), "--reload_interval", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/data/plugin/{path}", data=data,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                if len(ask("scalars/tags")) == 6 and len(ask("images/tags")) == 2:
                    break
            assert process.poll() is None
            time.sleep(0.5)
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_tensorboard_serves_scalars_and_images_under_readable_runs(server):
    scalars = server("scalars/tags")
    trials = {f"trials/000{n}" for n in range(3)}
    finals = {f"confirm/final-trial-0-seed-{seed}-abc" for seed in (1, 2)}
    assert set(scalars) == trials | finals | {"teacher"}
    assert set(scalars["trials/0000"]) == TAGS
    images = server("images/tags")
    assert set(images) == finals
    assert set(images["confirm/final-trial-0-seed-1-abc"]) == {"test/reliability", "test/confusion"}


def test_tensorboards_hparams_tab_has_every_trial_and_a_line_for_all_seeds(server):
    experiment = server("hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} == SPACE.keys()
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics == ["val/top1", "val/ece", "test/top1"]
    request = {
        "experimentName": "", "startIndex": 0, "sliceSize": 100, "colParams": [],
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE"],
        "aggregationType": "AGGREGATION_AVG",
    }  # fmt: skip
    groups = {g["name"]: g for g in server("hparams/session_groups", request)["sessionGroups"]}
    assert set(groups) == {"trials/0000", "trials/0001", "trials/0002", "final trial 0"}
    values = {v["name"]["tag"]: v["value"] for v in groups["final trial 0"]["metricValues"]}
    assert values["val/top1"] == pytest.approx(0.5)
    assert values["test/top1"] == pytest.approx(0.6)
    assert len(groups["final trial 0"]["sessions"]) == 2
    assert groups["trials/0000"]["hparams"] == {
        "temperature": 1.5, "evidence": "exp", "standardize": True,
    }  # fmt: skip
