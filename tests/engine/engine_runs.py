"""Shared by the tests of the loop: comparing runs, killing them, hand-made views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import functional as vision

import ekd_ray.engine.distill as engine
from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import TrainedStudent

CPU = torch.device("cpu")


class Killed(Exception):
    """Stands for SIGKILL: nothing in the engine catches it."""


def state(result: TrainedStudent) -> dict[str, Tensor]:
    """A copy of the student's weights and buffers."""
    return {key: value.clone() for key, value in result.model.state_dict().items()}


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the one column that may differ between equal runs."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_same_run(
    found: TrainedStudent, expected: TrainedStudent, weights: dict[str, Tensor]
) -> None:
    """Equal bits; `weights` is `state(expected)`, taken before anything could change it."""
    assert untimed(found.history) == untimed(expected.history)
    mine = state(found)
    assert [key for key in weights if not torch.equal(weights[key], mine[key])] == []
    assert found.log_prior == expected.log_prior


def watch_steps(monkeypatch, before: Callable[[int, Any, Any], None]) -> None:
    """`before(count, run, batch)` is called ahead of each training step, count from 1."""
    step, count = engine._train_step, [0]

    def watched(run, part, factors):
        count[0] += 1
        before(count[0], run, part.batch)
        step(run, part, factors)

    monkeypatch.setattr(engine, "_train_step", watched)


def kill_at_step(monkeypatch, last: int) -> None:
    """The `last`-th call of the step raises before it computes."""

    def before(count, run, batch):
        if count == last:
            raise Killed

    watch_steps(monkeypatch, before)


def watch_student(monkeypatch) -> list[Tensor]:
    """The inputs of every forward of the student, as they come."""
    seen: list[Tensor] = []
    start = engine.start_run

    def started(*args):
        run = start(*args)
        run.learner.student.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].detach().clone())
        )
        return run

    monkeypatch.setattr(engine, "start_run", started)
    return seen


def slow_view(image: Tensor, view: int) -> Tensor:
    """Crop with padding 4 and flip, one image at a time: (flip * 9 + top) * 9 + left."""
    flip, top, left = view // 81, view // 9 % 9, view % 9
    image = vision.crop(vision.pad(image, [4, 4, 4, 4]), top, left, 32, 32)
    return vision.hflip(image) if flip else image


def by_hand(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, 3, H, W] -> normalised float32, in the textbook's order."""
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def one_step(config: DistillConfig) -> DistillConfig:
    """The configuration cut to a single step on all of its training images."""
    return config.replace(epochs=1, train_subset=40, validation_fraction=0.4, batch_size=24)
