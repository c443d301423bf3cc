"""The search on real pictures: trials that are trained epoch by epoch, and what is made of them."""

import threading
import time
from pathlib import Path

import pytest

from benchmarks import real_search
from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import HISTORY, read_rows

TINY = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", epochs=3, train_subset=60,
    validation_fraction=0.2, batch_size=16,
)  # fmt: skip


def test_a_trial_trains_as_far_as_it_is_asked_and_goes_on_as_if_never_stopped(tmp_path: Path):
    whole = [row["val_top1"] for row in distill(TINY, threads=1).history]
    folder = tmp_path / "run"
    for asked in (1, 2, 3, 3):
        training = real_search.Training(TINY, folder, None)
        assert [training[index] for index in range(asked)] == whole[:asked]
        training.close()
        assert len(read_rows(folder / HISTORY)) == asked


def test_two_searches_share_a_run(tmp_path: Path):
    whole = [row["val_top1"] for row in distill(TINY, threads=1).history]
    one, other = (real_search.Training(TINY, tmp_path / "run", None) for _ in range(2))
    assert one[0] == whole[0]
    waits = threading.Thread(target=lambda: found.append(other[1]))  # which `one` is to train
    found: list[float] = []
    waits.start()
    time.sleep(1)
    assert one[1] == whole[1]
    waits.join(60)
    assert found == [whole[1]]
    one.close()
    assert other[2] == whole[2]
    other.close()


def test_what_diverges_stays_at_chance(tmp_path: Path):
    training = real_search.Training(TINY.replace(lr=1000.0), tmp_path, None)
    _, *later = [training[index] for index in (0, 1, 2)]
    assert later == [real_search.AT_CHANCE] * 2 and len(read_rows(tmp_path / HISTORY)) == 1
    training.close()


def test_rays_adapter_has_the_usual_rungs_of_the_epochs():
    found = real_search.contestants(12)
    assert found["ray-adapter"].settings["rungs"] == [1, 3, 9]
    assert [*found] == ["default+transfer", "random", "ray-adapter"]


def test_the_default_is_compared_under_each_seed_of_the_search():
    def rows(*top1):
        return {
            seed: {name: [value - 0.01, value + 0.01] for name in real_search.FIGURES}
            for seed, value in enumerate(top1)
        }

    found = real_search.summarize(
        {"default+transfer": rows(0.7, 0.8, 0.6), "random": rows(0.6, 0.75, 0.45)}
    )
    against = found["random"]["test_top1"]["behind_default"]
    assert against["mean"] == pytest.approx(0.1) and against["low"] < 0.1 < against["high"]
    assert found["random"]["test_top1"]["values"] == pytest.approx([0.6, 0.75, 0.45])
