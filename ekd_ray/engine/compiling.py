"""A learner as one compiled program: where that pays, and what becomes of one that fails."""

from __future__ import annotations

import atexit
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.files import default_cache_dir, make_closed, remove_path
from ekd_ray.losses.methods import method_of

# The longest of our own compilations (docs/speed.md): what a process takes for the start-up until
# it has seen one.
START_UP_SECONDS = 66.0
# What a compiled step is taken to save on a GPU: the launches of 200 operations, 5 us each.
SAVED_SECONDS = 1e-3
# CUDA graphs warm up in the first call, are recorded in the second and replayed in the third.
_GRAPH_CALLS = 3
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_start_up = START_UP_SECONDS  # of this process; later ones find on disk what was compiled


def compilation_pays(steps: int, start_up: float) -> bool:
    """Whether a run of `steps` steps saves more than a start-up of so many seconds costs."""
    return steps * SAVED_SECONDS > start_up


def wants_compilation(config: DistillConfig, device: torch.device, steps: int) -> bool:
    """Whether a run of `steps` steps trains as a compiled program.

    Not with several workers, whose batch norms exchange values in the midst of a forward pass, nor
    with a method that reads layers, whose hooks are no part of a program.
    """
    if ranks.world_size() > 1 or method_of(config).features:
        return False
    if config.compile == "auto":
        return device.type == "cuda" and compilation_pays(steps, _start_up)
    return config.compile == "on"


def _keep_programs_private() -> None:
    """Have torch keep what it compiles in the cache: its own place is a folder of the machine's
    temporary ones with a known name, where another user could leave programs that it would run."""
    if _VARIABLE in os.environ:
        return
    folder = default_cache_dir().absolute() / "compiled"
    try:
        make_closed(folder)
    except OSError:  # a read-only disk, or another user's cache: for this process alone
        folder = Path(tempfile.mkdtemp(prefix="ekd_ray-"))
        atexit.register(remove_path, folder)
    os.environ[_VARIABLE] = str(folder)


class CompiledForward:
    """`learner.forward` as one program, which is compiled when it is called first.

    `graphs` says whether it replays CUDA graphs. Gradients then lie in the graph's own memory,
    where those of the next part of a batch would overwrite them: not with several parts.
    """

    def __init__(self, learner: nn.Module, *, graphs: bool) -> None:
        # Trials that follow each other in a process are other modules: without this the ninth
        # would silently run uncompiled. What they compiled is kept on disk.
        torch.compiler.reset()
        _keep_programs_private()
        mode = "reduce-overhead" if graphs else None
        self._learner = learner
        self._program = torch.compile(learner.forward, fullgraph=True, dynamic=False, mode=mode)
        self._calls = _GRAPH_CALLS if graphs else 1
        self._seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        """As the learner's forward."""
        return self._program(*args)

    def survives(self, step: Callable[[], None]) -> bool:
        """Do `step`, which calls this and `backward`; whether that went well.

        In its first calls a program may fail to compile. If it does, the learner's buffers are set
        back, with a warning, and what else the step has changed is the caller's to undo.
        """
        if not self._calls:
            step()
            return True
        buffers = list(self._learner.buffers())
        before = [buffer.clone() for buffer in buffers]
        started = time.monotonic()
        try:
            step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # torch's errors say on the first line that, and on the second one what.
            reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
            warnings.warn(
                f"the training step could not be compiled ({reason}): going on as with "
                "compile=off.",
                stacklevel=2,
            )
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
            return False
        self._calls -= 1
        self._seconds += time.monotonic() - started
        if not self._calls:
            global _start_up
            _start_up = self._seconds
        return True
