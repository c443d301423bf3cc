"""Folding: the same function without the batch norms, and never another one."""

import copy

import pytest
import torch
from torch import nn

from ekd_ray.engine.teacher.folding import fold_batch_norms
from ekd_ray.models import build_model

torch.set_num_threads(1)


def trained(model):
    """With statistics, weights and biases of batch norm that are not those of a new model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval().requires_grad_(False)


def logits(model, dtype=torch.float32):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return copy.deepcopy(model).to(dtype)(images.to(dtype))


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def check(model, expected_folds):
    exact, before = logits(model, dtype=torch.float64), norms(model)
    assert fold_batch_norms(model, 32) == expected_folds
    assert norms(model) == before - expected_folds
    torch.testing.assert_close(logits(model).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("resnet8x4", 10),  # all
        ("vgg8", 5),
        ("MobileNetV2", 53),
        ("ShuffleV1", 49),  # grouped convolutions
        ("wrn_16_2", 7),  # pre-activation: half of them follow an addition
        ("wrn_16_1", 6),  # the first convolution also feeds a shortcut: its norm must stay
    ],
)
def test_the_function_stays_the_same(name, folds):
    check(trained(build_model(name, 10)), folds)


class Odd(nn.Module):
    """One convolution and two norms, wired as `order` says."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.order(self, x).flatten(1)


@pytest.mark.parametrize(
    ("order", "folds"),
    [
        (lambda m, x: m.norm(m.conv(x)), 1),
        (lambda m, x: m.norm(m.conv(x)) + m.other(m.conv.forward(x)), 0),  # a use unseen by hooks
        (lambda m, x: (y := m.conv(x), m.norm(y) + m.other(y))[1], 0),  # two readers
        (lambda m, x: (y := m.conv(x), m.norm(y) + y)[1], 0),  # a shortcut from between
        (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x.flip(3))), 0),  # each of them twice
        (lambda m, x: m.norm(torch.relu(m.conv(x))), 0),
        (lambda m, x: m.conv(m.norm(x)), 0),  # the other way round
    ],
)
def test_what_cannot_be_folded_is_left(order, folds):
    check(trained(Odd(order)), folds)


def test_it_draws_nothing_from_the_global_random_state():
    model = build_model("resnet8", 10).eval()
    before = torch.get_rng_state()
    fold_batch_norms(model, 32)
    assert torch.equal(torch.get_rng_state(), before)
