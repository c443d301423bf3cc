"""Memory that was refused, by a GPU or by the machine, in all the forms that torch raises it."""

from __future__ import annotations

import contextlib
import errno
import re
import textwrap
from collections.abc import Iterator

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.errors import UserError, error_chain

# Libraries have statuses of their own, which torch quotes in a plain RuntimeError. Without memory
# for its handle cuBLAS may also say that it is not initialized, and where no plan of a convolution
# got its workspace torch says only that it found none.
_REFUSED = re.compile(
    r"out of memory|_STATUS_\w*ALLOC(ATION)?_FAILED|can't allocate memory|cannot allocate memory"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate"
    r"|unable to find an engine to execute",
    re.IGNORECASE,
)
_OF_GPU = re.compile(r"CUDA|CU[A-Z]+_STATUS|HIP|NCCL|MPS|unable to find an engine")
_LONGEST = 200  # characters of what torch says


def out_of_memory(error: BaseException, config: DistillConfig) -> str | None:
    """The reason of a run whose memory was refused, and what helps; None for another error.

    A process that the system kills for its memory has no say: see `ProcessDeaths`.
    """
    for found in error_chain(error):
        line = (str(found).splitlines() or [""])[0].rpartition("DefaultCPUAllocator: ")[2]
        of_torch = isinstance(found, torch.OutOfMemoryError)
        of_system = isinstance(found, MemoryError) or getattr(found, "errno", 0) == errno.ENOMEM
        if of_torch or of_system or (isinstance(found, RuntimeError) and _REFUSED.search(line)):
            on_gpu = of_torch or _OF_GPU.search(line)
            parts = config.accumulation_steps
            return (
                f"out of {'GPU ' if on_gpu else ''}memory with batch_size {config.batch_size}"
                f"{f' in {parts} parts' if parts > 1 else ''} "
                f"({textwrap.shorten(line, _LONGEST, placeholder=' ...').rstrip('.') or 'refused'})"
                ": lower batch_size, raise accumulation_steps, or "
                + ("give each run more of a GPU (--gpus-per-trial)" if on_gpu else
                   "run fewer at once (--max-concurrent)")
            )  # fmt: skip
    return None


@contextlib.contextmanager
def refused_memory_reported(config: DistillConfig) -> Iterator[None]:
    """Make a `UserError` of memory that is refused to a run inside."""
    try:
        yield
    except Exception as error:
        reason = out_of_memory(error, config)
        if reason is None:
            raise
        raise UserError(f"{reason}.") from None
