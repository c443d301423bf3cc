"""When a search stops by itself."""

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.budget import Budget, check_budget
from ekd_ray.scale.cluster import gpus_per_worker


def budget(**settings):
    config = StudyConfig(distill=DistillConfig(method="none"), **settings)
    return Budget(config)


def rows(epochs, seconds):
    return [{"epoch": epoch, "seconds": seconds} for epoch in range(1, epochs + 1)]


def test_epochs_of_all_trials_count_once():
    found = budget(budget_epochs=7)
    found.record(0, rows(3, 1.0))
    for row in rows(3, 1.0):
        found.add(1, row)
    assert not found.is_spent()
    found.record(1, rows(3, 1.0))
    assert not found.is_spent()
    found.add(2, {"epoch": 1})
    assert found.is_spent()


def test_gpu_hours_are_those_of_all_workers():
    found = budget(budget_gpu_hours=1.0, gpus_per_trial=0.5, workers_per_trial=2)
    found.record(0, rows(3, 1190.0))
    assert not found.is_spent()
    found.record(0, rows(3, 1200.0))
    assert found.is_spent()


def test_gpu_hours_need_a_gpu():
    config, gpu_nodes = StudyConfig(budget_gpu_hours=1.0), [(4.0, 0.0), (4.0, 2.0)]
    with pytest.raises(UserError, match=r"got gpus_per_trial auto without a GPU"):
        check_budget(config, [(4.0, 0.0)])
    with pytest.raises(UserError, match=r"budget_gpu_hours needs .* got gpus_per_trial 0.0: "):
        check_budget(config.replace(gpus_per_trial=0.0), gpu_nodes)
    check_budget(config, gpu_nodes)
    check_budget(config, None)  # a cluster that was not joined yet
    check_budget(StudyConfig(), [(4.0, 0.0)])


def test_a_budget_of_gpu_hours_counts_those_that_auto_gave():
    config = with_gpus_of(StudyConfig(budget_gpu_hours=1.0), [(4.0, 2.0)])
    found = Budget(config)
    found.record(0, rows(1, 3599.0))
    assert not found.is_spent()
    found.record(1, rows(1, 1.0))
    assert found.is_spent()
    assert not Budget(StudyConfig(budget_hours=1.0)).is_spent(), "without it, nobody asks"


def with_gpus_of(config, nodes):
    return config.replace(gpus_per_trial=gpus_per_worker(config.gpus_per_trial, nodes))
