"""Connecting to Ray, quietly, and knowing how much fits on it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError

# Tune's own tables and per-trial loggers are switched off: a study has its own.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that fails in its first epoch, or is resumed at its end, reports no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def connected(*configs: StudyConfig) -> Iterator[None]:
    """Ray for the duration: the cluster named by RAY_ADDRESS, or a local one of our own.

    A connection that is there already is used and left open. Every study must fit.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        for config in configs:
            check_fits(config)
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        # Without the dashboard, placement groups of stopped nested trials are never freed.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        options |= {"num_cpus": local_cpus()}
    with _on_this_machine_alone() if "num_cpus" in options else contextlib.nullcontext():
        ray.init(**options)
    try:
        for config in configs:
            check_fits(config)
        yield
    finally:
        ray.shutdown()


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


def fits(config: StudyConfig, *, cpus: float, gpus: float) -> int:
    """How many trials run at once on so many CPUs and GPUs (0: not one)."""
    workers = config.workers_per_trial
    slots = int(cpus // (workers * config.cpus_per_trial))
    if config.gpus_per_trial:
        slots = min(slots, int(gpus / (workers * config.gpus_per_trial) + 1e-9))
    return min(slots, config.max_concurrent or slots)


def capacity() -> tuple[float, float]:
    """(CPUs, GPUs) of the connected cluster, or of this machine where Ray will be our own.

    Before a connection to a cluster elsewhere, its size is unknown: infinite.
    """
    import ray

    if ray.is_initialized():
        have = ray.cluster_resources()
        return have.get("CPU", 0.0), have.get("GPU", 0.0)
    if os.environ.get("RAY_ADDRESS"):
        return math.inf, math.inf
    return local_cpus(), torch.cuda.device_count()


def check_fits(config: StudyConfig) -> None:
    """Raise `UserError` if not one trial fits: it would wait for ever."""
    cpus, gpus = capacity()
    if math.isfinite(cpus) and fits(config, cpus=cpus, gpus=gpus) < 1:
        raise UserError(
            f"one trial needs {config.workers_per_trial} worker(s) x {config.cpus_per_trial} "
            f"CPU(s) and {config.gpus_per_trial:g} GPU(s), there are {cpus:g} CPU(s) and "
            f"{gpus:g} GPU(s): lower --workers-per-trial, --cpus-per-trial or --gpus-per-trial."
        )


def concurrency(config: StudyConfig) -> int:
    """Trials at once on the connected cluster."""
    cpus, gpus = capacity()
    return fits(config, cpus=cpus, gpus=gpus)
