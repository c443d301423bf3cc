"""The parts of torch that are used beyond its public names, as read in torch 2.14."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def untraced_optimizer(optimizer: type[torch.optim.Optimizer]) -> type[Any]:
    """An optimizer of torch as it is below what keeps `torch.compile` from tracing it.

    Nothing traces an optimizer here, and that layer imports the tracer at the first step: 2 s and
    80 MB of every trial's process. torch 2.14 puts it on with decorators that `functools.wraps`
    marks (`torch._disable_dynamo`, and the profiling hook around `step`).
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    plain = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), {**plain, "step": step})
