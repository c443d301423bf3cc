"""The optimizers of a run step as torch's own do, and load nothing that only a compiler needs."""

import copy
import subprocess
import sys

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.learner import Learner, make_optimizer
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model

torch.set_num_threads(1)


def learner():
    torch.manual_seed(0)
    return Learner(build_model("resnet8", 10), Objective(config("sgd")))


def config(name):
    return DistillConfig(
        dataset="digits", student="resnet8", method="none", epochs=1, optimizer=name, lr=0.05,
        momentum=0.9, weight_decay=0.01, nesterov=True,
    )  # fmt: skip


PEERS = {
    "sgd": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True, fused=True
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01, fused=True),
}


def steps(model, optimizer, count, first=0):
    for index in range(first, first + count):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad(set_to_none=True)
        model.student(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", PEERS)
def test_it_moves_the_weights_as_torch_does(name):
    ours, theirs = learner(), learner()
    optimizer, peer = make_optimizer(config(name), ours), PEERS[name](theirs.parameters())
    steps(ours, optimizer, 3)
    steps(theirs, peer, 3)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.is_leaf and mine.requires_grad


@pytest.mark.parametrize("name", PEERS)
def test_its_state_goes_into_torchs_own_and_back(name):
    ours, theirs = learner(), learner()
    optimizer = make_optimizer(config(name), ours)
    steps(ours, optimizer, 2)
    theirs.load_state_dict(ours.state_dict())
    peer = PEERS[name](theirs.parameters())
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # buffers are taken as they are
    again = make_optimizer(config(name), ours)
    again.load_state_dict(copy.deepcopy(peer.state_dict()))
    steps(ours, again, 2, first=2)
    steps(theirs, peer, 2, first=2)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


RUN = """
import sys
from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
base = dict(dataset="synthetic", student="resnet8", method="none", epochs=1, train_subset=200)
distill(DistillConfig(**base), threads=1)
distill(DistillConfig(**base, optimizer="adamw", lr=0.01, deterministic=True), threads=1)
print(*(name for name in ("torch._dynamo", "sympy", "torchvision", "scipy", "pandas", "optuna")
        if name in sys.modules))
"""


def test_a_run_imports_no_tracer():
    """They would cost every trial's process two seconds and eighty megabytes."""
    ran = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
