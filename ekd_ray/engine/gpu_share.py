"""The part of a GPU that a process has, none of it to all, and how its memory is given back."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Of each process on a GPU: CUDA's context and its libraries, which torch's allocator does not
# count. Assumed, not measured.
CONTEXT_BYTES = 512 * 2**20


def uses_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and it is not hidden.

    CUDA itself reads the variable once, when it starts; here it counts whenever it is asked.
    """
    return os.environ.get(VISIBLE) != "" and torch.cuda.is_available()


@contextlib.contextmanager
def share_of_gpu(gpus: float, *, limited: bool = True) -> Iterator[None]:
    """Let this process have `gpus` of a GPU for the duration; with 0 all of them are hidden.

    Ray gives a process that asks for a GPU the one that it is to use, but hides none from one that
    asks for none, and shares out no memory.

    Args:
        limited: a fraction is one of the memory too, so that the others get theirs.
    """
    before = os.environ.get(VISIBLE)
    if not gpus:
        os.environ[VISIBLE] = ""
    return_memory()  # what a run that was stopped still held as it left
    if gpus < 1 and limited and uses_gpu():
        limit_memory(gpus)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before
        return_memory()


def limit_memory(share: float) -> None:
    """Refuse this process more than a share of its GPU's memory, CUDA's own part included."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    room = max(share * total - CONTEXT_BYTES, share * total / 2)
    torch.cuda.set_per_process_memory_fraction(room / total)


def return_memory() -> None:
    """Give the GPU back the memory that no tensor of this process uses any more."""
    if torch.cuda.is_initialized():
        gc.collect()  # a learner and its compiled form refer to each other
        torch.cuda.empty_cache()
