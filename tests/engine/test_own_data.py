"""A registered data set in a run: the same run as with the same pictures by another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import assert_same_run, state, untimed
from rank_groups import group, start

from ekd_ray.config import DistillConfig
from ekd_ray.data import DATASETS, dataset_info, register_dataset
from ekd_ray.data.generated import synthetic_split
from ekd_ray.engine.distill import distill
from ekd_ray.engine.final import save_student
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.models.weights import read_metadata

WORLD = 2


def register():
    """What a plugin does in every process: `synthetic` under another name."""
    known = DATASETS["synthetic"]
    register_dataset("mine", load, mean=known.mean, std=known.std, class_names=known.class_names)


def load(split, data_root):
    assert Path(data_root).name == "root"
    return synthetic_split(split)


@pytest.fixture
def mine(tiny, with_teacher, tmp_path, own_cache):
    """(configuration, data root) with a teacher's table, a subset and a second data set."""
    register()
    values = {**with_teacher, "method": "ekd", "teacher_cache": "on", "ood_dataset": "digits"}
    yield tiny(**values), str(tmp_path / "root")
    del DATASETS["mine"]


def test_a_run_is_that_of_the_same_pictures(mine):
    config, root = mine
    expected = distill(resolve(config), threads=1)
    weights = state(expected)
    own = resolve(config.replace(dataset="mine"), data_root=root)
    assert (own.augment, own.image_size) == ("crop_flip", 32)
    found = distill(own, data_root=root, threads=1)
    assert_same_run(found, expected, weights)
    assert found.data_fingerprint == expected.data_fingerprint
    path = Path(root).parent / "student.safetensors"
    save_student(found, path, data_root=root)
    assert read_metadata(path).mean == dataset_info("synthetic").mean


def test_as_the_second_data_set(mine):
    config, root = mine
    config = config.replace(dataset="digits", method="none", epochs=1)
    found = []
    for name in ("synthetic", "mine"):
        own = resolve(config.replace(ood_dataset=name), data_root=root)
        found.append(distill(own, data_root=root, threads=1).history)
    assert untimed(found[0]) == untimed(found[1])
    assert "val_ood_auroc" in found[0][-1]


def test_other_data_under_the_name_is_another_fingerprint(mine):
    config, root = mine
    own = resolve(config.replace(dataset="mine", method="none", epochs=1), data_root=root)
    known = distill(own, data_root=root, threads=1).data_fingerprint
    names = DATASETS.pop("mine").class_names
    register_dataset(
        "mine",
        lambda split: (255 - synthetic_split(split)[0], synthetic_split(split)[1]),
        class_names=names,
    )
    with pytest.raises(UserError, match=f"its fingerprint must be {known}"):
        distill(own.replace(data_fingerprint=known), threads=1)


def worker(rank: int, settings: dict, folder: str) -> None:
    register()
    with group(rank, WORLD, Path(folder)):
        config = DistillConfig.from_dict(settings)
        result = distill(config, data_root=str(Path(folder) / "root"), threads=1)
        torch.save(result.history, Path(folder) / f"rank{rank}.pt")


@pytest.mark.slow
def test_several_workers_register_and_share_the_pictures(mine, tmp_path):
    config, root = mine
    own = resolve(config.replace(dataset="mine", epochs=1), data_root=root)
    start(worker, WORLD, own.to_dict(), str(tmp_path))
    one, other = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(WORLD))
    assert untimed(one) == untimed(other)
    (alone,) = distill(own, data_root=root, threads=1).history
    assert one[-1]["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-4)
