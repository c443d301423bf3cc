"""Operations of a step: what is counted, and the bounds that the losses keep."""

import pytest
import torch

from benchmarks.launches import LaunchCounter, count_loss, count_network, measure
from ekd_ray.losses import METHODS

# Eager, forward and backward. A method that is not here may cost what the dearest one does.
BOUNDS = {"evidential": 45, "ekd": 80, "dkd+ekd": 110, "mlkd": 200, "mlkd+ekd": 400}


def test_views_and_allocations_are_not_counted():
    x = torch.ones(3, 4)
    with LaunchCounter() as counter:
        torch.empty_like(x).copy_(x.t().reshape(3, 4)).view(12)[None].exp().add_(1)
    assert counter.counts == {"clone": 1, "copy_": 1, "exp": 1, "add_": 1}


def test_the_backward_pass_is_counted():
    x = torch.ones(3, requires_grad=True)
    with LaunchCounter() as counter:
        x.exp().sum().backward()
    assert counter.counts == {"exp": 1, "sum": 1, "ones_like": 1, "mul": 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_keeps_to_its_bound(method):
    assert count_loss(method).total() <= BOUNDS.get(method, max(BOUNDS.values()))


def test_a_loss_costs_no_more_for_its_settings():
    """A temperature other than 1 is a division and a factor on both sides, and no more."""
    softened = count_loss("ekd", temperature=4.0, ekd_temperature=2.0).total()
    assert softened <= BOUNDS["ekd"] + 16


def test_every_method_and_student_is_reported():
    found = measure()
    assert found["loss"].keys() == METHODS.keys()
    assert found["network"]["resnet8x4"] == count_network("resnet8x4").total() > 60
