"""A CUDA device that computes nothing, on a machine without one.

Tensors of the host are real, those of the device have a shape, a dtype and a device only
(`FakeTensorMode`). What CUDA would refuse is refused: tensors of both in one operation. What it
would make the host wait for is refused within `no_waiting`: a value or a tensor that is read, a
shape that depends on values, and a copy that does not leave or reach pinned memory. Forward only:
torch's autograd starts a thread of the device, which there is not; `backward` does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
COPIES = (aten._to_copy.default, aten.copy_.default)
READS = (aten.item.default, aten._local_scalar_dense.default)


class HostWaits(AssertionError):
    """The host waited for the device where it must not."""


class DevicesMixed(AssertionError):
    """An operation got tensors of the host and of the device."""


class FakeCuda(TorchDispatchMode):
    """While it is active, `cuda` is a device. `waits` counts how often the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self._waits_refused = False
        self._pinned: dict[int, Tensor] = {}  # by storage; held, so that none is reused
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeCuda:
        # With PYTORCH_NVML_BASED_CUDA_CHECK in the environment, which importing lightning_fabric
        # sets, torch would take the one device counted below for real, and copy to it.
        self._stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(mock.patch.object(nn.Module, "_apply", _replace_tensors))
        self._stack.enter_context(mock.patch.object(Tensor, "backward"))
        event = mock.Mock(query=lambda: False, synchronize=lambda: self._wait("an event"))
        stream = mock.Mock(record_event=lambda: event)
        for name, replaced in {
            # Autocast would switch itself off.
            "amp.common.amp_definitely_not_available": lambda: False,
            "is_bf16_supported": lambda **_: True,
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "manual_seed": lambda seed: None,
            "device_count": lambda: 1,
            "get_rng_state": lambda: torch.zeros(16, dtype=torch.uint8),
        }.items():
            self._stack.enter_context(mock.patch(f"torch.cuda.{name}", replaced))
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._stack.close()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Refuse what makes the host wait, for the duration."""
        self._waits_refused = True
        try:
            yield
        finally:
            self._waits_refused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [isinstance(tensor, FakeTensor) for tensor in tensors]
        pinned = kwargs.pop("pin_memory", False)
        if any(on_device) or _names_device(kwargs):
            result = self._on_device(func, args, kwargs, tensors, on_device)
            if isinstance(result, FakeTensor) and result.device.type == "cpu":
                result = _host_values(result.shape, result.dtype)
            return self._pin(result) if pinned else result
        with _disable_current_modes():
            if func is aten.is_pinned.default:
                return self._is_pinned(args[0])
            if func is aten._pin_memory.default:
                return self._pin(args[0].clone())
            result = func(*args, **kwargs)
            return self._pin(result) if pinned else result

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _on_device(self, func, args, kwargs, tensors, on_device):
        if func in READS:
            self._wait(func)
            return 0.0 if args[0].is_floating_point() else args[0].dtype != torch.bool and 0
        if func in COPIES:
            return self._copy(func, args, kwargs)
        # A number in a tensor of the host is passed with the launch.
        others = [t for t, there in zip(tensors, on_device, strict=True) if not there and t.dim()]
        if any(on_device) and others:
            raise DevicesMixed(f"{func} got tensors of the host, {[*others[0].shape]}")
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise HostWaits(f"the result of {func} is a value or a shape of values") from None

    def _copy(self, func, args, kwargs):
        source = args[1] if func is aten.copy_.default else args[0]
        target = args[0] if func is aten.copy_.default else None
        to_device = isinstance(target, FakeTensor) or _names_device(kwargs)
        blocking = not (kwargs.get("non_blocking") or (target is not None and True in args[2:]))
        if isinstance(source, FakeTensor):
            device = target.device if target is not None else kwargs.get("device")
            if device is None or torch.device(device).type == "cuda":
                return func(*args, **kwargs)
            if target is not None and not blocking and self._is_pinned(target):
                return target
            self._wait(func)
            if target is not None:
                return target
            return _host_values(source.shape, kwargs.get("dtype") or source.dtype)
        if to_device and self._waits_refused:
            pinned = self._is_pinned(source)
            if blocking or not pinned:
                raise HostWaits(f"{func} from {'the host' if pinned else 'pageable memory'}")
        return func(*args, **kwargs)

    def _is_pinned(self, tensor: Tensor) -> bool:
        with _disable_current_modes():
            return tensor.untyped_storage().data_ptr() in self._pinned

    def _wait(self, reason: object) -> None:
        if self._waits_refused:
            raise HostWaits(f"{reason} is waited for")
        self.waits += 1


def _replace_tensors(module, function):
    """As `Module._apply`, which swaps contents where a tensor is fake: that fails if it was one."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    with torch.no_grad():
                        new = function(value)
                    learned = isinstance(value, nn.Parameter)
                    held[name] = nn.Parameter(new, value.requires_grad) if learned else new
    return module


def _host_values(shape, dtype) -> Tensor:
    """What the host finds: zeros; of truth values both, so that both are gone into."""
    with _disable_current_modes():
        values = torch.zeros(shape, dtype=dtype)
        if dtype == torch.bool:
            values.view(-1)[::2] = True
        return values


def _names_device(kwargs) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cuda"
