"""The log of a run: one JSON line per epoch, TensorBoard scalars, and its HParams session.

TensorBoard's HParams tab shows one experiment per study and one session per run. The experiment
stands once, in the study's own folder, and names what is searched and what is looked for. A
session shows the searched settings only: sixty constant columns would hide them. Sessions of one
group are shown as one line with the mean of their metrics.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import time
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from torch.utils.tensorboard import SummaryWriter

from ekd_ray.config.targets import COSTS, figure_limits
from ekd_ray.files import parse_json, read_bytes, write_text

HISTORY = "history.jsonl"
EVENTS = "events.out.tfevents.*"


def metric_tag(name: str) -> str:
    """TensorBoard tag of a metric: `val_top1` -> `val/top1`, `lr` -> `solver/lr`, and of a cost
    of the student, `parameters` -> `cost/parameters`."""
    if name in COSTS:
        return f"cost/{name}"
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "val", "test", "loss") else f"solver/{name}"


def read_history(folder: Path, needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The epochs recorded in a run's folder, as far as `leading_epochs` has it."""
    return leading_epochs(read_rows(folder / HISTORY), needed)


def leading_epochs(rows: Iterable[Any], needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows up to the first that is torn, or no later epoch than those before it.

    Args:
        needed: metrics that each of them has.
    """
    found: list[dict[str, Any]] = []
    needed = tuple(needed)
    for row in rows:
        if not is_epoch(row) or (found and row["epoch"] <= found[-1]["epoch"]):
            break
        if any(row.get(name) is None for name in needed):
            break
        found.append(row)
    return found


def is_epoch(row: Any) -> bool:
    """Whether a value is the row of an epoch, which has numbers that can be, or null, by name."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    kinds = {*map(type, row.values())}
    if not kinds <= {int, float, types.NoneType} or row.get("seconds", 0) is None:
        return False
    limits = zip(row.values(), _limits_of(tuple(row)), strict=True)
    return all(value is None or low <= value <= high for value, (low, high) in limits)


@functools.lru_cache(maxsize=64)
def _limits_of(names: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    return tuple(map(figure_limits, names))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is appended to, up to the first torn one; none without a file."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        for line in read_bytes(path).splitlines():
            rows.append(parse_json(line))
    return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run in the HParams tab: the settings that it shows, and the group that it belongs to.

    A run without settings has no session.
    """

    settings: tuple[str, ...]
    group: str = ""


class RunLog:
    """Appends epochs to `history.jsonl` and to the TensorBoard events of a run's folder.

    It starts from `history`, the rows of the checkpoint: whatever an interrupted run
    recorded beyond them is dropped, in both places. All events are written again into one
    file: readers order several by name, which two of one second need not follow.

    Args:
        hyperparameters: the run's settings; `session` says which of them HParams shows, None
            shows all.
    """

    def __init__(
        self, folder: Path, *, hyperparameters: dict[str, Any], history: list[dict[str, Any]],
        session: Session | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HISTORY, "".join(json.dumps(row) + "\n" for row in history))
        self._history = open(folder / HISTORY, "a", encoding="utf-8")  # noqa: SIM115
        _remove_events(folder)
        self._events = SummaryWriter(str(folder))
        session = session or Session(settings=tuple(hyperparameters))
        self._has_session = bool(session.settings)
        if self._has_session:
            shown = {name: hyperparameters.get(name) for name in session.settings}
            shown = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in shown.items()
                if value is not None
            }
            # An empty group is a group of the run's own.
            _add_summary(self._events, summary_v2.hparams_pb(shown, session.group))
        for row in history:
            self._add_scalars(row)

    def write(self, row: dict[str, Any]) -> None:
        """Record one epoch (flushed to the operating system before it returns)."""
        self._history.write(json.dumps(row, allow_nan=False) + "\n")
        self._history.flush()
        os.fsync(self._history.fileno())
        self._add_scalars(row)
        self._events.flush()

    def _add_scalars(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self._events.add_scalar(metric_tag(name), value, row["epoch"])

    def close_after(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close as the exit of a `with`; a run that is stopped early is left by SystemExit,
        which is a success."""
        self.close(failed=isinstance(error, Exception))

    def close(self, *, failed: bool = False) -> None:
        """End the HParams session and close both files."""
        if self._has_session:
            _add_summary(self._events, _session_end(failed=failed))
        self._events.close()
        self._history.close()


def write_experiment(study: Path, space: Mapping[str, Any], tags: Iterable[str]) -> None:
    """Write a study's HParams experiment into its folder, in the place of an earlier one.

    Args:
        space: the search space, as recipes write it: ranges and choices by name; tags: those of
            the scalars that are shown as metrics.
    """
    _remove_events(study)
    hparams = [summary_v2.HParam(name, _domain(entry)) for name, entry in space.items()]
    metrics = [summary_v2.Metric(tag) for tag in tags]
    with SummaryWriter(str(study)) as events:
        _add_summary(events, summary_v2.hparams_config_pb(hparams, metrics))


def end_session(folder: Path, *, failed: bool) -> None:
    """End the session of a run that was killed and could not do it itself.

    A run without events, which never began, stays without.
    """
    files = sorted(folder.glob(EVENTS))
    mark = metadata.SESSION_END_INFO_TAG.encode()
    if files and not any(mark in read_bytes(path) for path in files):
        with SummaryWriter(str(folder), filename_suffix=".end") as events:
            _add_summary(events, _session_end(failed=failed))


def _remove_events(folder: Path) -> None:
    for events in folder.glob(EVENTS):
        events.unlink()


def _add_summary(events: SummaryWriter, summary: Summary) -> None:
    writer: Any = events.file_writer  # which torch declares as None
    writer.add_summary(summary)


def _domain(entry: Mapping[str, Any]) -> summary_v2.Domain:
    """The range or the choices of a setting; choices of several types are shown as text."""
    if "choices" not in entry:
        return summary_v2.RealInterval(float(entry["low"]), float(entry["high"]))
    kinds = {type(choice) for choice in entry["choices"]}
    kind = bool if kinds == {bool} else float if kinds <= {int, float} else str
    return summary_v2.Discrete([kind(choice) for choice in entry["choices"]])


def _session_end(*, failed: bool) -> Summary:
    # summary_v2 has no end, and torch's `add_hparams` knows neither groups nor failures.
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    described = metadata.create_summary_metadata(content)
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR
    )
    return Summary(value=[value])
