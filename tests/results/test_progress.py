"""Views are counted over the images that a run trained on."""

from ekd_ray.config import DistillConfig
from ekd_ray.results import progress


def test_views_are_counted_with_the_rounding_of_the_split() -> None:
    # round(25 * 0.9) is 22, but the split holds out round(2.5) = 2 and trains on 23.
    config = DistillConfig(method="kd", batch_size=23, validation_fraction=0.1)
    assert progress._drawn_views(config, 25, 3) == 3 * 23
