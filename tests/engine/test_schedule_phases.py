"""Since when the learning rate has been about what it is."""

import pytest

from ekd_ray.config import DistillConfig
from ekd_ray.engine.schedule import first_decayed_epoch, learning_rate, settled_since

STEP = DistillConfig(epochs=9)  # falls after epochs 6, 7 and 8
COSINE = DistillConfig(epochs=9, schedule="cosine")


@pytest.mark.parametrize(("epoch", "since"), [(1, 1), (3, 1), (6, 1), (7, 7), (8, 8), (9, 9)])
def test_a_step_begins_anew(epoch, since):
    assert settled_since(STEP, epoch) == since


def test_a_cosine_begins_where_the_rate_was_twice_as_high():
    rates = [learning_rate(COSINE, epoch, 1) for epoch in range(9)]
    for epoch in range(1, 10):
        since = settled_since(COSINE, epoch)
        assert all(rate <= 2 * rates[epoch - 1] for rate in rates[since - 1 : epoch])
        assert since == 1 or rates[since - 2] > 2 * rates[epoch - 1]
    assert settled_since(COSINE, 3) == 1 < settled_since(COSINE, 8)


def test_a_warm_up_is_of_the_same_kind():
    assert settled_since(DistillConfig(epochs=20, lr_warmup=4), 6) == 1


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
