"""TensorBoard's HParams tab: one experiment per study, one session per run.

The experiment stands once, in the study's own folder, and names what is searched and what is
looked for. A session shows the searched settings only: sixty constant columns would hide them.
Sessions of one group are shown as one line with the mean of their metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import struct_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents.*"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the HParams tab shows of a run: these settings, as a member of this group; nothing
    of a run without settings."""

    settings: tuple[str, ...]
    group: str = ""


def _value(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _summary(tag: str, content: plugin_data_pb2.HParamsPluginData) -> Summary:
    described = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)])


def session_start(values: Mapping[str, Any], *, group: str = "") -> Summary:
    """The summary that begins a session with these hyperparameters; None is left out."""
    info = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, raw in values.items():
        if raw is None:
            continue
        value = _value(raw)
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, str):
            info.hparams[name].string_value = value
        else:
            info.hparams[name].number_value = value
    content = plugin_data_pb2.HParamsPluginData(session_start_info=info)
    return _summary(metadata.SESSION_START_INFO_TAG, content)


def session_end(*, failed: bool) -> Summary:
    """The summary that ends a session."""
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    return _summary(metadata.SESSION_END_INFO_TAG, content)


def experiment(infos: Iterable[api_pb2.HParamInfo], tags: Iterable[str]) -> Summary:
    """The summary that says which hyperparameters there are, and which scalars count."""
    found = api_pb2.Experiment(
        time_created_secs=time.time(),
        hparam_infos=list(infos),
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags],
    )
    content = plugin_data_pb2.HParamsPluginData(experiment=found)
    return _summary(metadata.EXPERIMENT_TAG, content)


def of_values(values: Mapping[str, Any]) -> list[api_pb2.HParamInfo]:
    """The infos of one run's own hyperparameters."""
    return [
        api_pb2.HParamInfo(name=name, type=_kind([_value(value)]))
        for name, value in values.items()
        if value is not None
    ]


def of_space(space: Mapping[str, Any]) -> list[api_pb2.HParamInfo]:
    """The infos of a search space, as recipes write it: ranges and choices."""
    infos = []
    for name, entry in space.items():
        info = api_pb2.HParamInfo(name=name, display_name=name)
        if "choices" in entry:
            choices = [_value(choice) for choice in entry["choices"]]
            info.type = _kind(choices)
            if info.type == api_pb2.DATA_TYPE_STRING:
                choices = [str(choice) for choice in choices]
            listed = struct_pb2.ListValue()
            listed.extend(choices)
            info.domain_discrete.CopyFrom(listed)
        else:
            info.type = api_pb2.DATA_TYPE_FLOAT64
            info.domain_interval.min_value = entry["low"]
            info.domain_interval.max_value = entry["high"]
        infos.append(info)
    return infos


def _kind(values: Iterable[bool | float | str]) -> Any:
    values = list(values)
    if all(isinstance(value, bool) for value in values):
        return api_pb2.DATA_TYPE_BOOL
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return api_pb2.DATA_TYPE_FLOAT64
    return api_pb2.DATA_TYPE_STRING


def write_summaries(folder: Path, *summaries: Summary, suffix: str = "") -> None:
    """Write summaries to an event file of their own, whose name ends in `suffix`."""
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for summary in summaries:
            writer._get_file_writer().add_summary(summary)


def write_experiment(study: Path, space: Mapping[str, Any], tags: Iterable[str]) -> None:
    """Write a study's experiment into its folder, in the place of an earlier one."""
    for left in study.glob(EVENTS):
        left.unlink()
    write_summaries(study, experiment(of_space(space), tags))


def end_session(folder: Path, *, failed: bool) -> None:
    """End the session of a run that could not do it itself, for it was killed.

    A run without events, which never began, stays without.
    """
    files = sorted(folder.glob(EVENTS))
    mark = metadata.SESSION_END_INFO_TAG.encode()
    if files and not any(mark in path.read_bytes() for path in files):
        write_summaries(folder, session_end(failed=failed), suffix=".end")
