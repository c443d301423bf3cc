"""Connecting to Ray, quietly, and knowing how much fits on it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError

# Tune's own tables and per-trial loggers are switched off: a study has its own.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Nor are its snapshots read: they hold every trial, and halt the search while they are written.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    # A trial that fails in its first epoch, or is resumed at its end, reports no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Activations come and go by megabytes: in huge pages a step on a CPU takes a tenth less.
    # Read by a process at its start: only those that a Ray of our own starts have it from here.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


ADDRESS = "RAY_ADDRESS"
WATCH_SECONDS = 1.0  # between two looks at the processes of a Ray of our own
EXIT_WITHOUT_RAY = 1
REACH_SECONDS = 10.0  # until an address counts as unreachable
_DEFAULT_PORT = 6379
# CPUs and GPUs of one node.
Node = tuple[float, float]


def on_cluster() -> bool:
    """Whether trials run on a cluster that is there already, named by RAY_ADDRESS."""
    return os.environ.get(ADDRESS, "local") not in ("", "local")


@contextlib.contextmanager
def connected(*configs: StudyConfig) -> Iterator[None]:
    """Ray for the duration: the cluster named by RAY_ADDRESS, or a local one of our own.

    A connection that is there already is used and left open. Every study must fit.

    Raises:
        UserError: no cluster at the address, or a study that does not fit.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        for config in configs:
            check_fits(config)
        yield
        return
    check_address()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not on_cluster():
        # By itself Ray would join whatever else was last started on this machine.
        options |= {"address": "local", "num_cpus": local_cpus()}
        # Without the dashboard, placement groups of stopped nested trials are never freed.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.nullcontext() if on_cluster() else _on_this_machine_alone():
            ray.init(**options)
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None  # Ray's handler, there already while Ray starts
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if not on_cluster():
            raise
        raise _no_cluster(str(error) or type(error).__name__) from error
    # Ray's own handler prints native traces of a launcher that is asked to end.
    if callable(terminated) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)
    try:
        watched = contextlib.nullcontext() if on_cluster() else _watched()
        with watched, _notices_on_stderr():
            for config in configs:
                check_fits(config)
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _notices_on_stderr() -> Iterator[None]:
    """Ray says on stdout which of its processes have died; there, results are to stand alone."""
    from ray._private import worker

    said = worker.print_to_stdstream

    def say(data: dict[str, Any], *args: Any, **options: Any) -> None:
        said({**data, "is_err": True}, *args, **options)

    worker.print_to_stdstream = say
    try:
        yield
    finally:
        worker.print_to_stdstream = said


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Look after a Ray of our own: without its raylet or GCS, Tune would wait for ever, or
    Ray would end this process after a minute and without a word."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            end_without_ray()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def end_without_ray() -> None:
    """End this process, which can do nothing more, if a vital process of its own Ray has died.

    As after a SIGKILL, nothing that was finished is lost. Ray's other processes, which would
    go on for a minute, end first. What fails meanwhile says nothing of a trial: it must not be
    recorded.
    """
    from ray._private.worker import global_worker

    node = global_worker.node
    if node is None or on_cluster():
        return
    dead = {kind for kind, _ in node.dead_processes()} & {"raylet", "gcs_server"}
    if dead:
        # A live table may have hidden it.
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        print(
            f"{cursor}error: Ray's {' and '.join(sorted(dead))} died, and with it what was "
            "running: run the same command with --resume to continue.",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(Exception):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        os._exit(EXIT_WITHOUT_RAY)


def check_address() -> None:
    """Raises `UserError` within `REACH_SECONDS` if RAY_ADDRESS names nothing that listens."""
    address = os.environ.get(ADDRESS, "")
    if not on_cluster() or address == "auto":  # Ray knows where it has started one here
        return
    if "://" in address:
        raise _no_cluster(
            "it must be HOST:PORT of the head, or auto on one of the cluster's nodes; from "
            "elsewhere use ray job submit"
        )
    host, _, port = address.rpartition(":") if ":" in address else (address, "", "")
    try:
        target = (host.strip("[]"), int(port or _DEFAULT_PORT))
        socket.create_connection(target, timeout=REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(str(error)) from None


def _no_cluster(reason: str) -> UserError:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return UserError(
        f"cannot join the Ray cluster at {os.environ.get(ADDRESS)} ({lines[0].rstrip('.')}): check "
        f"--address (or {ADDRESS}), that its head runs, and that its token is here (ray "
        "get-auth-token)."
    )


@contextlib.contextmanager
def _on_this_machine_alone() -> Iterator[None]:
    """A Ray that is started inside listens on the loopback address only.

    Its servers listen on the address of their node, and on Linux Ray replaces even a given
    127.0.0.1 by that of the network. Where it forms no clusters (on macOS by itself) it does not.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if given is not None:
            os.environ[name] = given


def local_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def room_on(node: Node, *, cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs each fit on a node at once."""
    workers = int(node[0] // cpus)
    if gpus:
        # A worker's GPUs, or its share of one, are of one node.
        workers = min(workers, int(node[1] / gpus + 1e-9))
    return workers


def workers_on(config: StudyConfig, node: Node) -> int:
    """How many workers of a study's trials fit on a node at once."""
    return room_on(node, cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)


def fits(config: StudyConfig, nodes: Iterable[Node]) -> int:
    """How many trials run at once on nodes with so many CPUs and GPUs (0: not one).

    The workers of a trial may be on several nodes; a worker is on one.
    """
    slots = sum(workers_on(config, node) for node in nodes) // config.workers_per_trial
    return min(slots, config.max_concurrent or slots)


def this_machine() -> list[Node]:
    """What a Ray of our own would have."""
    return [(local_cpus(), torch.cuda.device_count())]


def live_nodes() -> dict[str, Node]:
    """Node id -> (CPUs, GPUs) of the connected cluster."""
    import ray

    return {
        node["NodeID"]: (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    }


def check_fits(config: StudyConfig) -> None:
    """Raise `UserError` if not one trial fits: it would wait for ever.

    Before a connection to a cluster elsewhere its size is unknown, and nothing is checked.
    """
    import ray

    if ray.is_initialized():
        nodes = list(live_nodes().values())
    elif on_cluster():
        return
    else:
        nodes = this_machine()
    if fits(config, nodes) < 1:
        biggest = max(nodes, default=(0.0, 0.0))
        cpus, gpus = (sum(have) for have in zip(*nodes, strict=True))
        each = f" on {len(nodes)} nodes, {biggest[0]:g} and {biggest[1]:g} on the largest"
        raise UserError(
            f"one trial needs {config.workers_per_trial} worker(s) x {config.cpus_per_trial} "
            f"CPU(s) and {config.gpus_per_trial:g} GPU(s), there are {cpus:g} CPU(s) and "
            f"{gpus:g} GPU(s){each if len(nodes) > 1 else ''}: lower --workers-per-trial, "
            "--cpus-per-trial or --gpus-per-trial."
        )


def concurrency(config: StudyConfig) -> int:
    """Trials at once on the connected cluster as it is now."""
    return fits(config, live_nodes().values())
