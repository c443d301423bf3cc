"""Every use of what Ray does not promise to keep, read in Ray 2.60.0.

Each function says what it is for; `tests/scale/test_private_api.py` fails when its part of Ray
has gone. Nothing else in the package names a private part of Ray.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.files import read_text

# A resource of the head alone (`ray._common.constants.HEAD_NODE_RESOURCE_NAME`).
HEAD_NODE = "node:__internal_head__"
# Texts in the file that Tune writes of a trial's failures.
FAILURE_MARK = "Failure #"
NODE_DIED = "node has died"
LOW_ON_MEMORY = "running low on memory"
TRACEBACK = '\n  File "'  # of an error that Python raised
VITAL_PROCESSES = {"raylet", "gcs_server"}


@contextlib.contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Ray prints on stdout which of its processes died; there, results are to stand alone."""
    from ray._private import worker

    original = worker.print_to_stdstream

    def print_on_stderr(data: dict[str, Any], *args: Any, **options: Any) -> None:
        original({**data, "is_err": True}, *args, **options)

    worker.print_to_stdstream = print_on_stderr
    try:
        yield
    finally:
        worker.print_to_stdstream = original


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that is started inside listen on the loopback address only.

    Its servers listen on the address of their node, and on Linux Ray replaces even a given
    127.0.0.1 by that of the network. Where it forms no clusters (on macOS by itself) it does not.
    """
    from ray._private import ray_constants

    with _environment(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
        before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


def dead_vital_processes() -> list[str]:
    """Names of vital processes, of the Ray that this process started, that have died."""
    from ray._private.worker import global_worker

    if global_worker.node is None:
        return []
    return sorted({kind for kind, _ in global_worker.node.dead_processes()} & VITAL_PROCESSES)


def kill_own_ray() -> None:
    """End all processes of the Ray that this process started."""
    from ray._private.worker import global_worker

    global_worker.node.kill_all_processes(check_alive=False, allow_graceful=False)


@contextlib.contextmanager
def address_for_workers(address: str) -> Iterator[None]:
    """Tell the processes of a Ray Train group which Ray is theirs.

    What frees the room of a group that was stopped asks Ray whether the group's controller lives,
    and looks for Ray among all that run on the machine. With several it would fail, and the room
    of a trial that was stopped early be lost to all others.
    """
    from ray._private.ray_constants import RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE as name
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(name)
    with _environment(name, address):
        yield


@contextlib.contextmanager
def no_variables_passed_on() -> Iterator[None]:
    """Keep Tune from handing variables of this process, cloud keys among them, to its trials.

    It does so in their `runtime_env`, which Ray shows on its dashboard and writes into logs. On
    this machine trials inherit the variables; the nodes of a cluster have their own.
    """
    from ray.tune.execution import class_cache

    before, class_cache.ENV_VARS_TO_PROPAGATE = class_cache.ENV_VARS_TO_PROPAGATE, set()
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = before


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def memory_kills_are_deaths() -> Iterator[None]:
    """Let Tune take it for the death of a trial's process that Ray ended it for memory.

    Ray raises an `OutOfMemoryError` for what the process was doing, which is none of the errors
    that Tune knows: it would end the whole search.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    original = RayActorManager._actor_task_failed

    def fail_task(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        original(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    RayActorManager._actor_task_failed = fail_task
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


def forgive_failure(trial: Any) -> None:
    """Take back that Tune counted the latest failure of a trial."""
    trial.run_metadata.num_failures -= 1
    trial.run_metadata.invalidate_cache()


def last_failure(trial: Any) -> str:
    """The text that Tune wrote of a trial's latest failure; empty without one."""
    path = trial.error_file
    if path is None or not Path(path).exists():
        return ""
    return read_text(path).rpartition(FAILURE_MARK)[2]
