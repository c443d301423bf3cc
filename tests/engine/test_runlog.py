"""history.jsonl and TensorBoard events, read back with TensorBoard's own reader."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import HISTORY, read_history
from ekd_ray.engine.runlog import RunLog, metric_tag


class Killed(Exception):
    pass


def row(epoch, value=0.5):
    return {
        "epoch": epoch,
        "lr": 0.05,
        "train_loss": value,
        "val_top1": value,
        "loss_ce": value,
        "log_prior": -1.0,
        "seconds": 0.1,
    }


def write(folder, epochs, *, keep=0, value=0.5, **hyperparameters):
    log = RunLog(folder, hyperparameters=hyperparameters, history=read_history(folder)[:keep])
    for epoch in epochs:
        log.write(row(epoch, value))
    log.close()


def events(folder):
    return EventAccumulator(str(folder)).Reload()


def test_scalars_come_back_under_their_groups(tmp_path):
    write(tmp_path, [1, 2], value=0.25)
    found = events(tmp_path)
    tags = "train/loss val/top1 loss/ce solver/lr solver/log_prior solver/seconds"
    assert set(found.Tags()["scalars"]) == set(tags.split())
    assert [(e.step, e.value) for e in found.Scalars("val/top1")] == [(1, 0.25), (2, 0.25)]


def test_an_epoch_is_on_disk_before_write_returns(tmp_path):
    log = RunLog(tmp_path, hyperparameters={}, history=[])
    log.write(row(1))
    assert read_history(tmp_path) == [row(1)]
    assert [e.step for e in events(tmp_path).Scalars("val/top1")] == [1]
    log.close()


def test_hyperparameters_reach_the_hparams_plugin(tmp_path):
    write(tmp_path, [1], lr=0.05, method="ekd", nesterov=True, lr_milestones=[0.5, 0.75], none=None)
    content = events(tmp_path).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = dict(start.session_start_info.hparams.items())
    assert set(values) == {"lr", "method", "nesterov", "lr_milestones"}
    assert values["lr"].number_value == 0.05
    assert values["method"].string_value == "ekd"
    assert values["nesterov"].bool_value is True
    assert values["lr_milestones"].string_value == "[0.5, 0.75]"
    assert "_hparams_/session_end_info" in content


def test_an_interrupted_run_has_each_epoch_once(tiny, tmp_path):
    """Killed after epoch 2 of 3 without its checkpoint: epochs 1 and 2 are written twice."""

    def killed(epoch_row):
        if epoch_row["epoch"] == 2:
            raise Killed

    config = tiny(epochs=3, method="evidential")
    with pytest.raises(Killed):
        distill(config, out=tmp_path, on_epoch=killed, threads=1, checkpoint_seconds=3600)
    result = distill(config, out=tmp_path, threads=1)
    found = events(tmp_path)
    tags = set(found.Tags()["scalars"])
    assert tags == {metric_tag(name) for name in result.metrics if name != "epoch"}
    for tag in tags:
        assert [e.step for e in found.Scalars(tag)] == [1, 2, 3]
    assert [e.value for e in found.Scalars("val/nll")] == pytest.approx(
        [r["val_nll"] for r in result.history]
    )
    start = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["method"].string_value == "evidential"
    assert hparams["lr"].number_value == 0.05


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, api_pb2.STATUS_SUCCESS),
        (ValueError("diverged"), api_pb2.STATUS_FAILURE),
        (SystemExit(), api_pb2.STATUS_SUCCESS),  # stopped early by the search
    ],
)
def test_the_session_says_how_the_run_ended(tmp_path, error, status):
    log = RunLog(tmp_path, hyperparameters={"lr": 0.1}, history=[])
    log.close_after(type(error), error, None)
    content = events(tmp_path).PluginTagToContent("hparams")["_hparams_/session_end_info"]
    assert HParamsPluginData.FromString(content).session_end_info.status == status


@pytest.mark.parametrize("tail", ['{"epoch": 2, "lr"', "\n", "", "\x00\x00\x00"])
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    (tmp_path / HISTORY).write_text(json.dumps(row(1)) + "\n" + tail)
    assert read_history(tmp_path) == [row(1)]


def test_nan_never_reaches_the_history(tmp_path):
    log = RunLog(tmp_path, hyperparameters={}, history=[])
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write(row(1, float("nan")))
    log.close()
    assert read_history(tmp_path) == []
