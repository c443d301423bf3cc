"""A process's share of a GPU, with a GPU that only torch's answers say is there."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from ekd_ray.engine import gpu_share
from ekd_ray.engine.gpu_share import VISIBLE, share_of_gpu, uses_gpu
from ekd_ray.engine.precision import pick_device

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Calls of torch in order, as on a machine with a GPU of 8 GiB that CUDA has started on."""
    calls = []
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
    return calls


def test_none_of_it_is_the_cpu_even_where_cuda_has_started(gpu, monkeypatch):
    assert uses_gpu() and pick_device().type == "cuda"
    for before in (None, "2,3"):
        if before:
            monkeypatch.setenv(VISIBLE, before)
        with share_of_gpu(0):
            assert os.environ[VISIBLE] == ""
            assert not uses_gpu() and pick_device().type == "cpu"
        assert os.environ.get(VISIBLE) == before and uses_gpu()
    assert set(gpu) == {"empty"}


def test_a_hidden_gpu_is_not_even_asked_for(monkeypatch):
    """To ask would start CUDA, which from then on sees what it saw then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was started"))
    with share_of_gpu(0):
        assert pick_device().type == "cpu"


def test_a_fraction_is_one_of_the_memory_with_what_cuda_itself_takes(gpu):
    with share_of_gpu(0.25):
        assert gpu == ["empty", pytest.approx((2 * GIB - gpu_share.CONTEXT_BYTES) / (8 * GIB))]
    assert gpu[2:] == ["empty"]


def test_of_a_small_share_half_is_left(gpu):
    with share_of_gpu(1 / 16):
        assert gpu[1] == pytest.approx(1 / 32)


@pytest.mark.parametrize(("gpus", "limited"), [(0.25, False), (1.0, True), (2.0, True)])
def test_a_whole_gpu_has_no_limit_nor_has_a_fraction_without(gpu, gpus, limited):
    with share_of_gpu(gpus, limited=limited):
        assert uses_gpu()
    assert gpu == ["empty", "empty"]


def test_memory_is_given_back_after_a_run_that_was_stopped(gpu):
    @share_of_gpu(1.0)
    def train():
        gpu.append("run")
        raise SystemExit

    with pytest.raises(SystemExit):
        train()
    assert gpu == ["empty", "run", "empty"]


def test_where_cuda_has_not_started_nothing_starts_it(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with share_of_gpu(1.0):
        pass
    assert gpu == []
