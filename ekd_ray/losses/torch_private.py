"""The parts of torch that are used beyond its public names, as read in torch 2.14."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch


def fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """Inside, tensors have no values, and what reads one back from its device raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports the tracer, 2 s

    return FakeTensorMode()


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


@contextlib.contextmanager
def deterministic_only() -> Iterator[None]:
    """Refuse algorithms that are not deterministic, in the compiler too; afterwards as before.

    torch's `use_deterministic_algorithms` loads the compiler to tell it, which takes 2 s and
    160 MB. Here one that is not loaded yet learns of it from its variable when it is.
    """
    variable = "TORCHINDUCTOR_DETERMINISTIC"
    before, mode = os.environ.get(variable), torch.get_deterministic_debug_mode()
    os.environ[variable] = "1"
    _set_determinism(2)
    try:
        yield
    finally:
        _set_determinism(mode)
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _set_determinism(mode: int) -> None:
    """0: any algorithm; 1: deterministic ones where there are; 2: no others."""
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)
