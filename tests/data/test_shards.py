"""Parquet ImageNet: which shards are read, their labels and classes, and broken ones."""

import pytest
from refusals import refused

import ekd_ray.data.store as store
from ekd_ray.data import check_dataset, load_dataset, num_train
from ekd_ray.errors import UserError

NAMES = [f"n{i:08d}" for i in range(1000)]


def one_shard(shards, make, labels, names=NAMES, split="train"):
    folder = shards / "imagenet/data"
    for path in folder.glob(f"{split}-*"):
        path.unlink()
    data = [make.picture(20, 20, 0, "JPEG")] * len(labels)
    path = folder / f"{split}-00000-of-00001.parquet"
    return make.parquet(path, data, labels, image="image", names=names)


def test_labelled_validation_goes_before_the_hubs_test(shards, make):
    one_shard(shards, make, [-1, -1], split="test")
    check_dataset("imagenet", data_root=shards)
    assert len(load_dataset("imagenet", "test", data_root=shards)) == 6
    (shards / "imagenet/data/validation-00000-of-00001.parquet").unlink()
    text = refused("imagenet", shards, "test")
    assert "row 0 of" in text and "has the label -1" in text
    assert "labelled validation shards of imagenet" in text
    one_shard(shards, make, [5, 999], split="test")
    assert load_dataset("imagenet", "test", data_root=shards).labels.tolist() == [5, 999]
    (shards / "imagenet/data" / "test-00000-of-00001.parquet").unlink()
    assert "no validation-*-of-*.parquet" in refused("imagenet", shards, "test")


def test_there_must_be_1000_classes(shards, make):
    one_shard(shards, make, [0, 1], names=NAMES[:200])
    assert "declares 200 classes, but imagenet has 1000" in refused("imagenet", shards)
    one_shard(shards, make, [0, 1000], names=None)
    assert "the label 1000, but imagenet has the labels 0 to 999" in refused("imagenet", shards)
    one_shard(shards, make, [0, 199], names=None)
    assert "labels up to 199, but imagenet has the labels 0 to 999" in refused("imagenet", shards)
    one_shard(shards, make, [0, 199])  # declared: a subset is legal
    assert len(load_dataset("imagenet", "train", data_root=shards)) == 2
    one_shard(shards, make, [999, 0], names=None)
    one_shard(shards, make, [1, 2], names=None, split="validation")
    check_dataset("imagenet", data_root=shards)
    got = load_dataset("imagenet", "train", data_root=shards)
    assert got.class_names == tuple(map(str, range(1000)))


def test_counting(shards, monkeypatch):
    monkeypatch.setattr(store, "_build", lambda *args: pytest.fail("packed"))
    assert num_train("cifar100") == 50_000
    assert num_train("digits") == 1_438
    assert num_train("imagenet", data_root=shards) == 20  # the footers say so
    monkeypatch.setenv("EKD_DATA_ROOT", str(shards))
    assert num_train("imagenet") == 20
    with pytest.raises(UserError, match="no tiny_imagenet files"):
        num_train("tiny_imagenet")
    with pytest.raises(UserError, match="Did you mean 'imagenet'"):
        num_train("imagenets")
