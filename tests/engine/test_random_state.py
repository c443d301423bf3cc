"""A run seeds and restores the generators of the CPU and of its own device, and no other."""

import contextlib

import pytest
import torch

from ekd_ray.engine.random_state import random_state, restore_random_state, seed_generator

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_the_cpu_is_seeded_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    with torch.random.fork_rng(devices=[]):
        seed_generator(CPU, 5)
        drawn, before = torch.rand(3), random_state(CPU)
        assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
        torch.rand(1)
        assert not torch.equal(before, random_state(CPU))


def test_a_gpu_is_seeded_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "manual_seed", calls.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor(calls))
    before = torch.get_rng_state()
    seed_generator(GPU, 5)
    assert calls == [5] == random_state(GPU).tolist()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("device", "kept"), [(CPU, []), (GPU, [GPU])])
def test_what_is_restored(device, kept, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def fork(devices, device_type):
        seen.append((list(devices), device_type))
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    with restore_random_state(device):
        pass
    assert seen == [(kept, "cuda")]
