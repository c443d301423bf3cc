"""Trials of several workers: a Ray Train TorchTrainer nested in a Tune trial."""

from __future__ import annotations

import functools
import os
import uuid
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.scale.worker import Body, Job, alone, in_group, run_job

# Ray Train polls its workers, and so forwards their reports, at most this often.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Workers that get no place must fail the trial rather than wait for ever.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")


def nested_trial(
    config: dict[str, Any],
    *,
    workers: int,
    cpus: int,
    gpus: float,
    body: Body = run_job,
) -> None:
    """Run a job on a worker group of its own; reports of rank 0 reach Tune."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    job = Job.from_config(config)
    resources: dict[str, float] = {"CPU": cpus}
    if gpus:
        resources["GPU"] = gpus
    trainer = TorchTrainer(
        functools.partial(in_group, body=body),
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # A reused name would silently resume another trial's run.
            name=f"{job.number:04d}-{uuid.uuid4().hex[:8]}",
            storage_path=os.path.join(job.folder, "train"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=1, controller_failure_limit=1),
        ),
    )
    trainer.fit()


def trainable(config: StudyConfig, body: Body) -> Any:
    """The Tune trainable of a study with its resources.

    With one worker per trial, `body` runs in the trial's own process, which Tune reuses
    for the next trial; with more, a driver without CPUs starts `body` on each worker.
    """
    from ray import tune

    if config.workers_per_trial == 1:
        needs = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
        return tune.with_resources(functools.partial(alone, body=body), needs)
    driver = functools.partial(
        nested_trial,
        workers=config.workers_per_trial,
        cpus=config.cpus_per_trial,
        gpus=config.gpus_per_trial,
        body=body,
    )
    # A driver that held a CPU could take the one that its own workers wait for.
    return tune.with_resources(driver, {"CPU": 0, "node:__internal_head__": 0.001})
