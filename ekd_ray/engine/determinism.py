"""The algorithms of a process: whether equal inputs give equal bits, and how exact float32 is."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.errors import UserError
from ekd_ray.losses.torch_private import deterministic_only

T = TypeVar("T")

# cuBLAS repeats its bits only with a workspace of a fixed size, which it takes from here when CUDA
# starts in a process. It costs 32 MiB of a GPU's memory at most, and the process of a search's
# trial may train a final run later: so every process has it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Of float32 matrix products and convolutions: never TensorFloat-32, which torch allows itself in
# convolutions and which has three digits. Where that is exact enough, bfloat16 and float16 are too.
FLOAT32 = "ieee"

# In torch's message where an operation has no deterministic algorithm, or cuBLAS not its workspace.
_REFUSAL = "torch.use_deterministic_algorithms(True)"


class NotDeterministic(UserError):
    """A run that is to be deterministic needs an operation that is not."""


@contextlib.contextmanager
def arithmetic(*, deterministic: bool) -> Iterator[None]:
    """Compute float32 in full and, where asked for, deterministically; afterwards as before.

    Otherwise cuDNN measures which of its algorithms is fastest for each shape, of which a run has
    few.

    Raises:
        NotDeterministic: an operation inside has no deterministic algorithm on its device.
    """
    backends: Any = torch.backends
    settings: list[tuple[Any, str, Any]] = [
        *((part, "fp32_precision", FLOAT32) for part in (
            backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
            backends.mkldnn.matmul, backends.mkldnn.conv,
        )),
        (backends.cudnn, "deterministic", deterministic),
        (backends.cudnn, "benchmark", not deterministic),
        # Nothing here reads memory that nobody wrote.
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ]  # fmt: skip
    try:
        allowed = deterministic_only() if deterministic else contextlib.nullcontext()
        with _assigned(settings), allowed:
            yield
    except RuntimeError as error:
        if _REFUSAL not in str(error):
            raise
        reason = str(error).partition(". ")[0].partition(", but you set")[0]
        raise NotDeterministic(
            f"{reason}: set deterministic to false, or choose another network or loss."
        ) from error


def fixed_convolutions() -> contextlib.AbstractContextManager[None]:
    """Let cuDNN take, for each shape, one deterministic algorithm that it does not measure."""
    cudnn = torch.backends.cudnn
    return _assigned([(cudnn, "deterministic", True), (cudnn, "benchmark", False)])


@contextlib.contextmanager
def _assigned(settings: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give attributes of torch's modules other values, and their own again afterwards."""
    before = [(part, name, getattr(part, name)) for part, name, _ in settings]
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def decide_determinism(
    config: DistillConfig, train: Callable[[DistillConfig], T], *, wanted: bool
) -> T:
    """`train(config)`, with `deterministic` as the configuration says, else as `wanted`.

    A network from elsewhere may need an operation that has no deterministic algorithm on a GPU.
    Where nobody asked for them, its run begins again without, with a warning.
    """
    if config.deterministic is None and wanted:
        try:
            return train(config.replace(deterministic=True))
        except NotDeterministic as error:
            warnings.warn(
                f"{error} It is trained without: bits may differ from run to run.", stacklevel=2
            )
            wanted = False
    if config.deterministic is None:
        config = config.replace(deterministic=wanted)
    return train(config)
