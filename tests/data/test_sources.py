"""Both file layouts, and one sentence for everything that can be wrong with them."""

import hashlib
import pickle
import re
import urllib.error

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets as tv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import message, refused

from ekd_ray.data import check_dataset, load_dataset, sources
from ekd_ray.errors import UserError

SHARD = "train-00000-of-00001.parquet"


# ---- Parquet


def test_png_comes_back_exactly(hub, make):
    images = make.images(30)
    check_dataset("cifar10", data_root=hub)
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        got = load_dataset("cifar10", split, data_root=hub)
        np.testing.assert_array_equal(got.images, images[part])
        assert got.labels.tolist() == [i % 10 for i in range(len(got))]
        assert got.class_names[:2] == ("airplane", "automobile")
        assert (got.num_classes, got.name, got.split) == (10, "cifar10", split)


@pytest.mark.parametrize("where", ["", "cifar10", "cifar10/data", "data", "cifar10/plain_text"])
@pytest.mark.parametrize("image", ["img", "image"])
def test_where_and_how_the_columns_are_called(tmp_path, make, where, image):
    data = [make.encode(x, "JPEG") for x in make.images(12)]
    for split in ("train", "test"):
        path = tmp_path / where / f"{split}-00000-of-00001.parquet"
        make.parquet(path, data, [*range(10), 0, 1], image=image, names=None)
    got = load_dataset("cifar10", "train", data_root=tmp_path)
    assert got.images.shape == (12, 3, 32, 32)
    assert got.class_names[3] == "cat"


def test_shards_are_read_in_order(hub, make):
    folder = hub / "cifar10"
    (folder / SHARD).unlink()
    images = make.images(30, seed=3)
    for shard in (2, 0, 1):
        part = [make.encode(x) for x in images[shard * 10 : shard * 10 + 10]]
        make.parquet(folder / f"train-0000{shard}-of-00003.parquet", part, [shard] * 10)
    got = load_dataset("cifar10", "train", data_root=hub)
    np.testing.assert_array_equal(got.images, images)
    assert got.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    make.parquet(folder / "train-00000-of-00002.parquet", [b""], [0])
    assert "mixes shards" in refused("cifar10", hub)
    (folder / "train-00000-of-00002.parquet").unlink()
    (folder / "train-00001-of-00003.parquet").unlink()
    assert "train-00001-of-00003.parquet is missing" in refused("cifar10", hub)


def test_cifar100_fine_labels(tmp_path, make):
    names = [f"class{i}" for i in range(100)]
    data = [make.encode(x) for x in make.images(5)]
    for split in ("train", "test"):
        path = tmp_path / "cifar100" / f"{split}-00000-of-00001.parquet"
        make.parquet(path, data, [0, 99, 5, 6, 7], label="fine_label", names=names)
        table = pq.read_table(path)
        pq.write_table(table.append_column("coarse_label", pa.array([19] * 5)), path)
    got = load_dataset("cifar100", "test", data_root=tmp_path)
    assert got.labels.tolist() == [0, 99, 5, 6, 7]
    assert got.class_names == tuple(names)


def test_nothing_there(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        text = refused("cifar10", root)
        assert "--data-root" in text
        assert "--download" in text
        assert str(root) in text
    check_dataset("cifar10", data_root=tmp_path / "nowhere", download=True)
    assert "Did you mean 'cifar10'" in message(check_dataset, "cifar_10")
    assert "unknown split 'val'" in message(load_dataset, "digits", "val")


def test_one_split_missing(hub):
    (hub / "cifar10" / "test-00000-of-00001.parquet").unlink()
    assert "no test-*-of-*.parquet" in refused("cifar10", hub)


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1, -8])
def test_truncated(hub, keep):
    path = hub / "cifar10" / SHARD
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert SHARD in refused("cifar10", hub)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(hub, data):
    path = hub / "cifar10" / SHARD
    clean = path.read_bytes()
    damaged = bytearray(clean)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(clean) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    text = ""
    try:
        load_dataset("cifar10", "train", data_root=hub)
    except UserError as error:
        text = str(error)
    finally:
        path.write_bytes(clean)
    assert "\n" not in text


def test_wrong_columns(hub, make):
    path = hub / "cifar10" / SHARD
    good = make.encode(make.images(1)[0])
    make.parquet(path, [good], [0], image="picture")
    text = refused("cifar10", hub)
    assert "picture, label" in text
    assert "img/image" in text
    make.parquet(path, [good], [0], label="fine_label")
    assert "needs img/image and label" in refused("cifar10", hub)
    make.parquet(path, [good], [0], names=["a", "b"])
    assert "declares 2 classes" in refused("cifar10", hub)
    pq.write_table(pa.table({"img": ["x"], "label": [0]}), path)
    assert "struct with binary 'bytes'" in refused("cifar10", hub)
    image = pa.array([{"bytes": good}])
    pq.write_table(pa.table({"img": image, "label": ["cat"]}), path)
    assert "must hold integers" in refused("cifar10", hub)
    make.parquet(path, [], [])
    assert "no rows" in refused("cifar10", hub)


@pytest.mark.parametrize(
    ("image", "label", "words"),
    [
        ("good", 10, "row 9 of .* has the label 10, but cifar10 has the labels 0 to 9"),
        ("good", -1, "row 9 of .* has the label -1"),
        ("good", None, "row 9 of .* has no label"),
        (None, 0, "row 9 of .* has no image bytes"),
        (b"", 0, "row 9 of .* not a readable JPEG"),
        ("cut", 0, "row 9 of .* not a readable JPEG"),
        ("ppm", 0, "row 9 of .* not a readable JPEG"),
        ("small", 0, "row 9 of .* has 28x28 pixels, but cifar10 has 32x32"),
    ],
)
def test_one_bad_row(hub, make, monkeypatch, image, label, words):
    monkeypatch.setattr(sources, "_DECODED_ROWS", 4)  # so that the row lies in the third batch
    images = make.images(10)
    last = {
        "good": make.encode(images[9]),
        "cut": make.encode(images[9], "JPEG")[:-400],
        "ppm": make.encode(images[9], "PPM"),
        "small": make.encode(make.images(1, 28)[0]),
    }.get(image, image)
    data = [make.encode(x) for x in images[:9]]
    make.parquet(hub / "cifar10" / SHARD, [*data, last], [*range(9), label])
    text = refused("cifar10", hub, checked="label" in words)  # pictures are not looked at before
    assert re.search(words, text)
    assert SHARD in text
    assert not list((hub.parent / "cache" / "datasets").glob(".*"))  # no half-built entry


# ---- the original's pickles


def write_binary(folder, original, monkeypatch, make, label_key, per_file=6):
    """A small archive of `original`'s layout, with its md5 lists replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    images, seed = {}, 0
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        listed, parts = [], []
        for name, _ in getattr(original, attribute):
            seed += 1
            part = make.images(per_file, seed=seed)
            entry = {"data": part.reshape(per_file, -1), label_key: list(range(per_file))}
            data = pickle.dumps(entry)
            (folder / name).write_bytes(data)
            listed.append([name, hashlib.md5(data).hexdigest()])
            parts.append(part)
        monkeypatch.setattr(original, attribute, listed)
        images[split] = np.concatenate(parts)
    count = 10 if original is tv.CIFAR10 else 100
    data = pickle.dumps({original.meta["key"]: [f"name{i}" for i in range(count)]})
    (folder / original.meta["filename"]).write_bytes(data)
    meta = {**original.meta, "md5": hashlib.md5(data).hexdigest()}
    monkeypatch.setattr(original, "meta", meta)
    return images


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("name", "original", "key"),
    [("cifar10", tv.CIFAR10, "labels"), ("cifar100", tv.CIFAR100, "fine_labels")],
)
def test_binary_layout(tmp_path, monkeypatch, make, name, original, key, nested):
    root = tmp_path / "root"
    base = root / name if nested else root
    images = write_binary(base / original.base_folder, original, monkeypatch, make, key)
    check_dataset(name, data_root=root)
    for split in ("train", "test"):
        got = load_dataset(name, split, data_root=root)
        np.testing.assert_array_equal(got.images, images[split])
        theirs = original(base, train=split == "train")
        np.testing.assert_array_equal(got.images.transpose(0, 2, 3, 1), theirs.data)
        assert got.labels.tolist() == theirs.targets
        assert list(got.class_names) == theirs.classes


def test_a_changed_pickle_is_never_loaded(tmp_path, monkeypatch, make):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    write_binary(folder, tv.CIFAR10, monkeypatch, make, "labels")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code in a pickle was run",))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    text = refused("cifar10", tmp_path)
    assert "data_batch_3" in text
    assert "--download" in text
    (folder / "data_batch_3").unlink()
    assert "data_batch_3" in refused("cifar10", tmp_path)


def test_download(tmp_path, monkeypatch, make):
    calls = []

    def fetch(self):
        calls.append(self.root)
        folder = tmp_path / "root" / "cifar10" / "cifar-10-batches-py"
        write_binary(folder, tv.CIFAR10, monkeypatch, make, "labels")

    monkeypatch.setattr(tv.CIFAR10, "download", fetch)
    root = tmp_path / "root"
    for split in ("train", "test", "train"):
        got = load_dataset("cifar10", split, data_root=root, download=True)
        assert len(got) == (30 if split == "train" else 6)
    assert len(calls) == 1
    # A damaged file is fetched again, but only on request.
    (root / "cifar10" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    assert "md5" in refused("cifar10", root)
    check_dataset("cifar10", data_root=root, download=True)
    load_dataset("cifar10", "train", data_root=root, download=True)
    assert len(calls) == 2


def test_failed_download(tmp_path, monkeypatch):
    def fetch(self):
        raise urllib.error.URLError("no\nroute")

    monkeypatch.setattr(tv.CIFAR100, "download", fetch)
    text = message(load_dataset, "cifar100", "train", data_root=tmp_path, download=True)
    assert "no route" in text
    assert "--data-root" in text
