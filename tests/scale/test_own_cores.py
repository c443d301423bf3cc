"""The cores of a node that a trial's GPU, or its part of one, stands for."""

import pytest
import ray

from ekd_ray.scale import cluster


@pytest.mark.parametrize(
    ("node", "gpus", "cores"),
    [((16, 4), 1.0, 4), ((16, 4), 0.25, 1), ((16, 4), 0.1, 1), ((8, 8), 2.0, 2), ((6, 1), 3.0, 6)],
)
def test_cores_go_with_gpus(node, gpus, cores):
    assert cluster.cores_of_share(node, gpus) == cores


@pytest.mark.slow  # the shares are tested above
@pytest.mark.ray
def test_a_process_knows_its_cores():
    assert cluster.own_cores() is None
    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(cluster.own_cores)
        asked = [task.options(num_gpus=gpus).remote() for gpus in (1, 0.5, 0)]
        assert ray.get(asked) == [4, 2, None]
        assert cluster.own_cores() is None
    finally:
        ray.shutdown()
