"""The random generator that the layers of a student draw from: that of the run's device alone."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the default generator of `device` and no other."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def random_state(device: torch.device) -> Tensor:
    """The state of the default generator of `device`, uint8 on the host (nothing is waited for)."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context after which the CPU and `device`, if it is a CUDA device, draw as before it."""
    return torch.random.fork_rng(
        devices=[device] if device.type == "cuda" else [], device_type="cuda"
    )
