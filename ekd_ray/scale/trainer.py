"""Runs of several workers: a Ray Train TorchTrainer, alone or nested in a Tune trial."""

from __future__ import annotations

import functools
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.config.study_config import Gpus
from ekd_ray.scale.cluster import Node, gpus_per_worker
from ekd_ray.scale.ray_private import HEAD_NODE, address_for_workers
from ekd_ray.scale.worker import Train, train_as_worker, train_in_process

# Ray Train polls its workers, and so forwards their reports, at most this often.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Workers that get no place must fail the trial rather than wait for ever.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")

# In a study's folder, Tune's and Train's own records: not needed to resume, so each run starts
# them afresh.
SCRATCH = ".ray"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The worker group of a run: between `least` and `most` workers, and what each may use."""

    least: int
    most: int
    cpus: int
    gpus: Gpus

    def on(self, nodes: Iterable[Node]) -> Workers:
        """These workers with a number for `gpus`."""
        return replace(self, gpus=gpus_per_worker(self.gpus, nodes))

    @property
    def known_gpus(self) -> float:
        """`gpus` of workers that know their cluster, see `on`."""
        assert not isinstance(self.gpus, str), "the cluster was not asked"
        return self.gpus

    @property
    def elastic(self) -> bool:
        """Whether the group may shrink and grow while it trains."""
        return self.least < self.most


def scaling_config(workers: Workers) -> Any:
    """Ray Train's `ScalingConfig` of a worker group."""
    import ray.train

    resources: dict[str, float] = {"CPU": workers.cpus}
    if workers.known_gpus:
        resources["GPU"] = workers.known_gpus
    return ray.train.ScalingConfig(
        num_workers=(workers.least, workers.most) if workers.elastic else workers.most,
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
    )


def fit_group(
    config: dict[str, Any],
    *,
    workers: Workers,
    train: Train,
    callbacks: list[Any],
    failures: int,
    scratch: Path,
) -> None:
    """Train a run on a worker group of its own, which is started again `failures` times.

    Every start goes on from the run's newest checkpoint. Ray Train's own records are removed:
    the run's folder says all that there is to know.

    Args:
        scratch: folder for those records, which all nodes see. What is killed, or stopped early,
            may leave some there.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    # A reused name would silently resume another trial's run.
    name = uuid.uuid4().hex[:8]
    trainer = TorchTrainer(
        functools.partial(train_as_worker, train=train, gpus=workers.known_gpus),
        train_loop_config=config,
        scaling_config=scaling_config(workers),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch.absolute()),
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(
                max_failures=failures, controller_failure_limit=1
            ),
        ),
    )
    try:
        with address_for_workers(ray.get_runtime_context().gcs_address):
            trainer.fit()
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)


def run_nested_trial(
    config: dict[str, Any], *, workers: Workers, train: Train, scratch: Path
) -> None:
    """Run a Tune trial as a worker group of its own; reports of rank 0 reach Tune."""
    from ray.tune.integration.ray_train import TuneReportCallback

    fit_group(
        config, workers=workers, train=train, callbacks=[TuneReportCallback()], failures=1,
        scratch=scratch,
    )  # fmt: skip


def make_trainable(config: StudyConfig, train: Train, scratch: Path) -> Any:
    """The Tune trainable of a study with its resources; `scratch` is for groups' own records.

    With one worker per trial, `train` runs in the trial's own process, which Tune reuses
    for the next trial; with more, a driver without CPUs starts `train` on each worker.
    """
    from ray import tune

    if config.workers_per_trial == 1:
        needs = {"cpu": config.cpus_per_trial, "gpu": config.gpus}
        trial = functools.partial(
            train_in_process, train=train, gpus=config.gpus, limited=config.limit_gpu_memory
        )
        return tune.with_resources(trial, needs)
    driver = functools.partial(
        run_nested_trial,
        workers=Workers(
            least=config.workers_per_trial,
            most=config.workers_per_trial,
            cpus=config.cpus_per_trial,
            gpus=config.gpus,
        ),
        train=train,
        scratch=scratch / "groups",
    )
    # A driver that held a CPU could take the one that its own workers wait for.
    return tune.with_resources(driver, {"CPU": 0, HEAD_NODE: 0.001})
