"""Gradients of several ranks against those of one process, in float64, for every method."""

from __future__ import annotations

from pathlib import Path

import batch_norm_kernels
import pytest
import torch
from rank_groups import group, start
from torch import nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine import ranks
from ekd_ray.engine.learner import Learner
from ekd_ray.engine.teacher.source import TeacherOutputs
from ekd_ray.losses.method_checks import draw_cosines
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.losses.objective import Objective

CLASSES = 5
# (ranks, rows of the batch): equal shares, shares that differ, and one row for some.
GROUPS = [(4, 10), (4, 5), (2, 8)]


class Activated(nn.BatchNorm2d):
    """A subclass that does more than to normalise, as timm's do."""

    def forward(self, input):
        return torch.relu(super().forward(input))


def make(method, batch):
    """(learner, arguments of its forward), float64 and the same in every process."""
    settings = {}
    if METHODS[method].evidential:
        settings = {"learn_log_prior": True, "prior_kl_weight": 0.5}
    config = with_method(DistillConfig(batch_size=batch, epochs=2), method, **settings)
    torch.manual_seed(3)
    student = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), Activated(6), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4 * 4 * 4, CLASSES, bias=False),
        nn.BatchNorm1d(CLASSES, momentum=0.3),
    )  # fmt: skip
    learner = Learner(student, Objective(config)).double().train()
    learner = learner.to(memory_format=torch.channels_last)
    images, strong = 2 * torch.randn(2, batch, 3, 8, 8).double() + 50
    teacher = 3 * torch.randn(2, batch, CLASSES).double()
    target = torch.randint(CLASSES, (batch,))
    views = METHODS[method].strong_view
    cosines = draw_cosines(CLASSES).double() if METHODS[method].class_cosines else None
    logits = TeacherOutputs(teacher[0], teacher[1] if views else None, (), cosines)
    needed = logits if METHODS[method].needs_teacher else None
    return learner, (images, needed, target, 2, strong if views else None)


def outcome(learner, loss, terms):
    return {
        "loss": loss.detach(),
        **{f"term {name}": value for name, value in terms.items()},
        **{f"gradient {n}": p.grad.clone() for n, p in learner.named_parameters()},
        **{f"buffer {n}": b.clone() for n, b in learner.named_buffers()},
    }


def alone(method, batch):
    learner, arguments = make(method, batch)
    loss, _, terms = learner(*arguments)
    loss.backward()
    return outcome(learner, loss, terms)


def together(method, batch):
    learner, (images, teacher, target, epoch, strong) = make(method, batch)
    own = slice(ranks.rank(), None, ranks.world_size())
    names = list(learner.state_dict())
    forward = ranks.parallelize(learner, torch.device("cpu"))
    with ranks.synchronized_batch_norm(learner.student):
        own_strong = None if strong is None else strong[own]
        loss, _, terms = forward(images[own], teacher, target, epoch, own_strong)
        loss.backward()
        assert list(learner.state_dict()) == names
    assert not any("forward" in vars(module) for module in learner.modules())
    return outcome(learner, loss, terms)


def worker(rank: int, folder: str) -> None:
    record = {}
    for world in (4, 2):
        if rank < world:
            with group(rank, world, Path(folder)):
                for size, batch in GROUPS:
                    if size == world:
                        record |= {(size, batch, m): together(m, batch) for m in METHODS}
                with batch_norm_kernels.on_the_cpu():
                    for size, batch in GROUPS:
                        if size == world:
                            record["kernels", size, batch] = together("mlkd+ekd", batch)
    record["called"] = set(batch_norm_kernels.CALLS)
    torch.save(record, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    start(worker, 4, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize(("world", "batch"), GROUPS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_are_those_of_one_process(method, world, batch, records):
    expected = alone(method, batch)
    assert any(name.startswith("gradient objective") for name in expected) == (
        METHODS[method].evidential or METHODS[method].learned_temperature is not None
    )
    for rank in range(world):
        found = records[rank][world, batch, method]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # A learned temperature is computed in float32.
            near = 1e-5 if METHODS[method].learned_temperature else 1e-9
            scale = value.abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(
                found[name], value, rtol=near, atol=near * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("world", "batch"), GROUPS)
def test_by_the_kernels_of_a_gpu_they_are_the_same(world, batch, records):
    """In `batch_norm_kernels`, in the places where a GPU has torch's own."""
    expected = alone("mlkd+ekd", batch)
    for rank in range(world):
        assert records[rank]["called"] == {f.__name__ for f in batch_norm_kernels.KERNELS}
        found = records[rank]["kernels", world, batch]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(
                found[name], value, rtol=1e-7, atol=1e-7 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
