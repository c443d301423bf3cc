"""How the processes of one run share its student: DDP, where each holds all of it, or FSDP2,
where each holds a part of every weight, its gradient and its optimizer state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.engine.learner import Learner
from ekd_ray.models import build_model

if TYPE_CHECKING:  # seconds to import, which only runs of several processes should pay
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(config: DistillConfig) -> bool:
    """Whether a run's student is sharded: it is asked for, and there are several processes."""
    return config.parallel == "fsdp" and ranks.world_size() > 1


def parallelize(learner: Learner, config: DistillConfig, device: torch.device) -> nn.Module:
    """The module to call in a training step; `learner` itself where there is one process.

    Under FSDP the learner's student becomes sharded, in place. What the objective learns are
    a few scalars, whose gradients are the same on every rank already: they stay whole.
    """
    if ranks.world_size() == 1:
        return learner
    if not is_sharded(config):
        # Buffers need no broadcast: batch norm is the same on every rank.
        return DistributedDataParallel(
            learner,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
        )
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    for block in _blocks(learner.student):
        fully_shard(block, mesh=mesh)
    fully_shard(learner.student, mesh=mesh)
    return learner


def _blocks(student: nn.Module) -> list[nn.Module]:
    """What is gathered, used and freed together: the composite entries of lists of modules.

    Inner ones come first, as `fully_shard` asks; what is in none goes with the student itself.
    """
    lists = [m for m in student.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = {entry: None for found in lists for entry in found.children()}
    return [block for block in reversed(blocks) if any(_weighs(c) for c in block.children())]


def _weighs(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@contextlib.contextmanager
def gradients_reduced(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of a part of a batch: ranks exchange gradients in the last."""
    with contextlib.ExitStack() as stack:
        if isinstance(module, DistributedDataParallel) and not last:
            stack.enter_context(module.no_sync())
        if isinstance(module, Learner) and ranks.world_size() > 1:
            cast("FSDPModule", module.student).set_requires_gradient_sync(last)
        yield


def whole(value: Tensor) -> Tensor:
    """A tensor as one process would have it; for a sharded one all ranks must ask."""
    return cast("DTensor", value).full_tensor() if ranks.is_shard(value) else value


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, known to every rank, laid out as `parameter`: its memory format or shards."""
    if ranks.is_shard(parameter):
        from torch.distributed.tensor import distribute_tensor

        shard = cast("DTensor", parameter)
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(value)


def all_finite(learner: Learner) -> bool:
    """Whether every weight is finite, on every rank (waits for the device)."""
    parts = [
        cast("DTensor", value).to_local() if ranks.is_shard(value) else value
        for value in learner.parameters()
    ]
    finite = torch.stack([part.isfinite().all() for part in parts]).all()
    return all(bool(value) for value in ranks.gather(finite))


def plain_student(learner: Learner, config: DistillConfig, num_classes: int) -> nn.Module:
    """The trained student as one process would have it, in evaluation mode, on every rank."""
    if not is_sharded(config):
        return learner.student.eval()
    state = {name: whole(value) for name, value in learner.student.state_dict().items()}
    student = build_model(config.student, num_classes)
    student.load_state_dict(state)
    return student.to(next(iter(state.values())).device).eval()
