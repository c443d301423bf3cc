"""Functions as Ray tasks, each with what a worker of a trial has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from ekd_ray.config import StudyConfig
from ekd_ray.config.plugins import LoadedPlugins
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.errors import UserError, name_continuation

T = TypeVar("T")


def as_task(function: Callable[..., Any], config: StudyConfig) -> Any:
    """A function as a Ray task on the CPUs and GPUs of a worker of a trial.

    On a GPU its process ends with it, because one that waits for a next task would keep its part of
    the memory. Ray does so, but not for GPUs that `.options` asks for.
    """
    import ray

    gpus, limited = config.gpus, config.limit_gpu_memory
    plugins = LoadedPlugins(config.distill.plugins)

    @functools.wraps(function)  # Ray names the process after it
    def compute(*arguments: Any) -> Any:
        assert plugins is not None, "they have come with this function"
        with share_of_gpu(gpus, limited=limited):
            return function(*arguments)

    options = {"num_gpus": gpus} if gpus else {}
    return ray.remote(num_cpus=config.cpus_per_trial, max_retries=2, **options)(compute)


def compute_off_driver(config: StudyConfig, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, where nothing else runs yet: on a GPU if the trials run on such, else
    here.

    A driver that had computed on a GPU would keep a part of its memory to the end.

    Raises:
        UserError: its process died three times. Otherwise what the function raises.
    """
    if not config.gpus:
        return function(*arguments)
    import ray

    whole = config.replace(gpus_per_trial=max(1.0, config.gpus))
    reference = as_task(function, whole).remote(*arguments)
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise UserError(
            f"the process of the teacher died again and again ({reason}): continue with "
            f"{name_continuation()}."
        ) from error
    except BaseException:
        # Only a task that still runs: Ray may end this process where one ends as it is cancelled.
        ray.cancel(reference)
        raise
