"""Between host and device without waiting: copies from and to pinned memory, a second stream."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, TypeVar

import numpy.typing as npt
import torch

T = TypeVar("T")


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor on `device`; a GPU is not waited for. A CPU shares its memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # only from pinned memory does the copy not block
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host, behind what the current stream has to do yet."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._values = tensor.cpu()

    @property
    def arrived(self) -> bool:
        """Whether `values` need not wait."""
        return self._event is None or self._event.query()

    def values(self) -> torch.Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


def make_ahead(items: Generator[T, None, None], device: torch.device) -> Generator[T, None, None]:
    """The `items`, made of tensors on `device`: on a GPU in a second stream.

    As no step makes the host wait, an item is made and copied while the GPU still computes on the
    one before. On other devices nothing changes. `items` is closed with the generator.
    """
    with closing(items):
        if device.type != "cuda":
            yield from items
            return
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(main)  # it has staged what the items are made of
        used: torch.cuda.Event | None = None
        while True:
            # An item is let go when its successor is there. Its memory goes back to the side
            # stream, which may overwrite it once the main stream has done what it did with it.
            if used is not None:
                side.wait_event(used)
            used = main.record_event()
            with torch.cuda.stream(side):
                try:
                    item = next(items)
                except StopIteration:
                    return
            main.wait_stream(side)
            yield item
