"""Groups of gloo processes for tests: one start, whose processes run everything."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def process_server() -> Any:
    """A context whose processes are forked from one that has imported torch, once for all."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ekd_ray.engine.distill"])
    return server


def start(worker: Callable[..., None], world: int, *arguments: Any) -> None:
    """`worker(rank, *arguments)` in `world` processes of the `process_server`."""
    process_server()
    torch.multiprocessing.start_processes(
        worker, args=arguments, nprocs=world, start_method="forkserver"
    )


@contextlib.contextmanager
def group(rank: int, world: int, folder: Path) -> Iterator[None]:
    """A gloo group of the first `world` processes, met through a file in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'rendezvous{world}'}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()
