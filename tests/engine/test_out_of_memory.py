"""Refused memory, as torch 2.14 and its libraries say it, told from other errors."""

from __future__ import annotations

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.out_of_memory import out_of_memory, refused_memory_reported
from ekd_ray.errors import UserError

CONFIG = DistillConfig(batch_size=48)
OF_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
]
OF_MACHINE = [
    MemoryError(),
    MemoryError("Unable to allocate 8 TiB"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate "
                 "memory: you tried to allocate 4503599627370496 bytes. Error code 12"),
]  # fmt: skip
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    OSError(28, "No space left on device"),
    ValueError("a note on being out of memory"),
]


@pytest.mark.parametrize("error", OF_GPU, ids=str)
def test_memory_of_a_gpu(error):
    reason = out_of_memory(error, CONFIG)
    assert reason.startswith("out of GPU memory with batch_size 48 (")
    assert str(error).splitlines()[0].rstrip(".") in reason
    assert "--gpus-per-trial" in reason and "--max-concurrent" not in reason and "\n" not in reason


@pytest.mark.parametrize("error", OF_MACHINE, ids=str)
def test_memory_of_the_machine(error):
    reason = out_of_memory(error, CONFIG.replace(accumulation_steps=4))
    assert reason.startswith("out of memory with batch_size 48 in 4 parts (")
    assert "--max-concurrent" in reason and "GPU" not in reason and "alloc_cpu" not in reason


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors(error):
    assert out_of_memory(error, CONFIG) is None
    with pytest.raises(type(error)), refused_memory_reported(CONFIG):
        raise error


def test_what_this_torch_raises_without_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert "4503599627370496 bytes" in out_of_memory(raised.value, CONFIG)


def test_an_error_that_wraps_it():
    """As a compiler's, which quotes its cause in its own words."""

    @refused_memory_reported(CONFIG)
    def compile_it():
        try:
            raise OF_GPU[0]
        except RuntimeError as error:
            raise RuntimeError("backend='inductor' raised:") from error

    with pytest.raises(UserError, match=r"out of GPU memory .*\.$") as raised:
        compile_it()
    assert raised.value.__cause__ is None


def test_long_texts_are_cut():
    reason = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. " + 100 * "word "), CONFIG)
    assert len(reason) < 450
