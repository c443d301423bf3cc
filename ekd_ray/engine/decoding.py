"""The threads that decode a run's pictures, and how many pictures a second they give."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info, epoch_batches, load_dataset, stage_images
from ekd_ray.engine.precision import local_cpus
from ekd_ray.engine.resolve import left_out

_BATCH = 8  # pictures a thread, of those whose time is taken
_cores: int | None = None


def share_cores(cores: int | None) -> None:
    """Say how many of the node's cores go with this process's part of its GPUs.

    None: all GPUs of the node are seen here, and the process has one of them.
    """
    global _cores
    _cores = cores


def decoding_threads(config: DistillConfig, device: torch.device) -> int:
    """As many threads as `decode_threads` says; under `auto` a GPU gets its share of the cores."""
    if config.decode_threads != "auto":
        return config.decode_threads
    computing = torch.get_num_threads()
    if device.type == "cpu":  # which has other work
        return computing
    return max(computing, _cores or local_cpus() // max(1, torch.cuda.device_count()))


def measure_decoding(
    config: DistillConfig, data_root: str | None, threads: int, *, seconds: float = 1.0
) -> float:
    """Pictures a second that so many threads decode here, from views of the training set.

    Args:
        config: of an encoded data set.
        seconds: to measure for, unless the training set is at its end before.
    """
    arrays = load_dataset(config.dataset, "train", data_root=data_root)
    info = dataset_info(config.dataset, data_root=data_root)
    stage = stage_images(
        arrays, "cpu", scheme=config.augment or info.view_scheme, image_size=config.image_size,
        pool=config.view_pool, seed=config.view_seed, threads=threads,
    )  # fmt: skip
    ids = np.setdiff1d(np.arange(len(stage)), left_out(config, "train", data_root))
    batches = epoch_batches(
        ids, batch_size=min(len(ids), _BATCH * threads), seed=config.seed, epoch=1,
        num_views=stage.num_views,
    )  # fmt: skip
    count, started = 0, time.perf_counter()
    with contextlib.closing(stage.stream(batches)) as decoded:
        for _, _, labels in decoded:
            count += len(labels)
            if time.perf_counter() - started >= seconds:
                break
    return count / (time.perf_counter() - started)
