"""The learning rate against torch's own schedulers and against plain formulas."""

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.schedule import first_decayed_epoch, learning_rate, settled_since

STEP = DistillConfig(epochs=9)  # falls after epochs 6, 7 and 8
COSINE = DistillConfig(epochs=9, schedule="cosine")


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def torch_rates(scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_step_schedule_is_multi_step_lr_of_the_authors():
    config = DistillConfig(epochs=240, lr=0.05)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer(0.05), [150, 180, 210], gamma=0.1)
    expected = torch_rates(reference, 240)
    for within in (0, 3, 6):
        found = [learning_rate(config, epoch * 7 + within, 7) for epoch in range(240)]
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "milestones", "decay", "expected"),
    [
        (4, (0.5, 0.75), 0.5, [1.0, 1.0, 0.5, 0.25]),
        (3, (0.625, 0.75, 0.875), 0.1, [1.0, 1.0, 0.01]),  # two round to 2, the last to 3
        (2, (), 0.1, [1.0, 1.0]),
        (2, (1.0,), 0.1, [1.0, 1.0]),
    ],
)
def test_milestones_are_rounded_fractions_of_epochs(epochs, milestones, decay, expected):
    config = DistillConfig(epochs=epochs, lr=1.0, lr_milestones=milestones, lr_decay=decay)
    assert [learning_rate(config, e, 1) for e in range(epochs)] == pytest.approx(expected)


def test_cosine_is_cosine_annealing_per_step():
    config = DistillConfig(schedule="cosine", epochs=6, lr=5e-4, lr_min=5e-6)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer(5e-4), T_max=6 * 5, eta_min=5e-6
    )
    found = [learning_rate(config, step, 5) for step in range(30)]
    assert found == pytest.approx(torch_rates(reference, 30), rel=1e-9)
    assert found[0] == 5e-4
    assert learning_rate(config, 30, 5) == pytest.approx(5e-6)


def test_warm_up_is_linear_and_reaches_the_peak():
    config = DistillConfig(schedule="cosine", epochs=10, lr=0.4, lr_warmup=2)
    found = [learning_rate(config, step, 4) for step in range(9)]
    assert found[:8] == pytest.approx([0.4 * k / 8 for k in range(1, 9)])
    assert found[8] == pytest.approx(0.4)


def test_step_schedule_counts_its_milestones_from_the_start_of_training():
    config = DistillConfig(epochs=4, lr=1.0, lr_milestones=(0.5,), lr_warmup=1)
    found = [learning_rate(config, step, 2) for step in range(8)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1])


# Since when the rate has been about what it is


@pytest.mark.parametrize(("epoch", "since"), [(1, 1), (3, 1), (6, 1), (7, 7), (8, 8), (9, 9)])
def test_a_step_begins_a_phase(epoch, since):
    assert settled_since(STEP, epoch) == since


def test_a_cosine_begins_where_the_rate_was_twice_as_high():
    rates = [learning_rate(COSINE, epoch, 1) for epoch in range(9)]
    for epoch in range(1, 10):
        since = settled_since(COSINE, epoch)
        assert all(rate <= 2 * rates[epoch - 1] for rate in rates[since - 1 : epoch])
        assert since == 1 or rates[since - 2] > 2 * rates[epoch - 1]
    assert settled_since(COSINE, 3) == 1 < settled_since(COSINE, 8)


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({"epochs": 9}, 7),
        ({"epochs": 240}, 151),
        ({"epochs": 240, "schedule": "cosine"}, None),
        ({"epochs": 4, "lr_milestones": [0.99]}, None),
    ],
)
def test_the_first_epoch_at_a_lower_rate(settings, epoch):
    assert first_decayed_epoch(DistillConfig(**settings)) == epoch


def test_a_rate_of_just_twice_the_last_counts_as_settled() -> None:
    config = DistillConfig(epochs=8, lr=0.1, lr_milestones=[0.25, 0.5], lr_decay=0.5)
    assert [settled_since(config, epoch) for epoch in (2, 4, 6)] == [1, 1, 3]
