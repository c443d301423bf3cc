"""The decoded cache, the generated data sets, and the real CIFAR-10."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import RidgeClassifier

import ekd_ray.data.datasets as datasets
import ekd_ray.data.store as store
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.errors import UserError


def test_decoded_once(hub, builds, forget, entries):
    first = load_dataset("cifar10", "train", data_root=hub)
    assert load_dataset("cifar10", "train", data_root=hub).images is first.images
    forget()
    again = load_dataset("cifar10", "train", data_root=hub)
    assert again.images is not first.images
    assert again.fingerprint == first.fingerprint
    assert len(first.fingerprint) == 16
    assert len(builds) == 1
    assert isinstance(again.images, np.memmap)
    for array in (again.images, again.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    (entry,) = entries()
    assert {p.name for p in entry.iterdir()} == {"images.npy", "labels.npy", "meta.json"}
    np.testing.assert_array_equal(np.load(entry / "images.npy"), first.images)


def test_changed_sources_are_decoded_again(hub, builds, make, tmp_path, entries):
    path = hub / "cifar10" / "train-00000-of-00001.parquet"
    before = load_dataset("cifar10", "train", data_root=hub)
    os.utime(path, ns=(1, 1))
    touched = load_dataset("cifar10", "train", data_root=hub)
    assert touched.fingerprint == before.fingerprint  # content, not files
    make.parquet(path, [make.encode(x) for x in make.images(20)], [0] * 20)
    relabelled = load_dataset("cifar10", "train", data_root=hub)
    assert relabelled.fingerprint != before.fingerprint
    images = make.images(20)
    images[7, 1, 5, 5] ^= 1
    make.parquet(path, [make.encode(x) for x in images], [i % 10 for i in range(20)])
    assert load_dataset("cifar10", "train", data_root=hub).fingerprint != before.fingerprint
    assert len(builds) == 4
    elsewhere = shutil.copytree(hub, tmp_path / "copy")
    other = tmp_path / "other-cache"
    copied = load_dataset("cifar10", "train", data_root=elsewhere, cache_dir=other)
    assert len(entries(other)) == 1
    assert copied.fingerprint == load_dataset("cifar10", "train", data_root=hub).fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / "meta.json").write_text("{"),
        lambda e: (e / "images.npy").unlink(),
        lambda e: os.truncate(e / "images.npy", 40_000),
        lambda e: (e / "images.npy").write_bytes((e / "images.npy").read_bytes() + b"x"),
        lambda e: np.save(e / "images.npy", np.zeros((19, 3, 32, 32), np.uint8)),
        lambda e: np.save(e / "labels.npy", np.zeros(20, np.int64)),
        lambda e: (e / "meta.json").write_text(
            json.dumps({**json.loads((e / "meta.json").read_text()), "version": 0})
        ),
        lambda e: (shutil.rmtree(e), e.write_text("a file")),
    ],
)
def test_a_damaged_entry_is_built_again(hub, builds, tmp_path, damage, forget, entries):
    want = np.array(load_dataset("cifar10", "train", data_root=hub).images)
    (entry,) = entries()
    damage(entry)
    forget()
    got = load_dataset("cifar10", "train", data_root=hub)
    np.testing.assert_array_equal(got.images, want)
    assert got.labels.tolist() == [i % 10 for i in range(20)]
    assert len(builds) == 2
    assert entries() == [entry]
    assert not list((tmp_path / "cache" / "datasets").glob(".*"))


def test_leftovers_of_a_killed_builder_go(hub, forget, entries):
    load_dataset("cifar10", "train", data_root=hub)
    (entry,) = entries()
    stale = entry.with_name(f".{entry.name}.abc")
    entry.rename(stale)
    forget()
    load_dataset("cifar10", "train", data_root=hub)
    assert entries() == [entry]


def test_a_complete_cache_may_be_read_only(hub, monkeypatch, forget):
    load_dataset("cifar10", "train", data_root=hub)
    forget()

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ekd_ray.data.store.FileLock", refuse)
    load_dataset("cifar10", "train", data_root=hub)
    with pytest.raises(UserError, match="Read-only file system"):
        load_dataset("cifar10", "test", data_root=hub)


@pytest.mark.parametrize("kind", ["file", "full"])
def test_unwritable_cache(hub, tmp_path, monkeypatch, kind):
    # (Permissions would not stop root, who runs the tests.)
    if kind == "file":
        (tmp_path / "cache").write_text("in the way")
    else:

        def full(path):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store, "synced", full)
    with pytest.raises(UserError, match="EKD_CACHE_DIR") as caught:
        load_dataset("cifar10", "train", data_root=hub)
    assert str(tmp_path / "cache") in str(caught.value)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("EKD_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert datasets.default_cache_dir() == Path("/a")
    monkeypatch.delenv("EKD_CACHE_DIR")
    assert datasets.default_cache_dir() == Path("/b/ekd_ray")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/own")
    assert datasets.default_cache_dir() == tmp_path / "own" / "ekd_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert datasets.default_cache_dir() == tmp_path / ".cache" / "ekd_ray"
    assert datasets.root_folder(None) == Path("data")
    monkeypatch.setenv("EKD_DATA_ROOT", "/c")
    assert datasets.root_folder(None) == Path("/c")


_WORKER = """
import sys, time
from pathlib import Path
from ekd_ray.data import load_dataset, store
meet, me, hub = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
build = store._build
def slow(*args):
    (meet / f"build-{me}").touch()
    time.sleep(1)
    build(*args)
store._build = slow
(meet / f"ready-{me}").touch()
while len(list(meet.glob("ready-*"))) < 2:
    time.sleep(0.01)
print(load_dataset("cifar10", "train", data_root=hub).fingerprint)
"""


def test_two_processes_build_once(hub, tmp_path):
    meet = tmp_path / "meet"
    meet.mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(meet), str(i), str(hub)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    prints = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert prints[0] == prints[1] == load_dataset("cifar10", "train", data_root=hub).fingerprint
    assert len(list(meet.glob("build-*"))) == 1


# ---- generated data


@pytest.mark.parametrize(
    ("name", "sizes", "prints"),
    [
        ("digits", (1438, 359), ("78ebd9befe2e828d", "cf593f07f579fc2c")),
        ("synthetic", (2000, 500), ("25bddbb9a8f04f82", "1dd485fe9a7b4423")),
    ],
)
def test_generated(name, sizes, prints):
    info = dataset_info(name)
    train, test = (load_dataset(name, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (info.num_train, info.num_test) == sizes
    assert (train.fingerprint, test.fingerprint) == prints  # the same on every machine
    for arrays in (train, test):
        assert arrays.images.shape == (len(arrays), 3, 32, 32)
        assert arrays.num_classes == 10
        share = np.bincount(arrays.labels, minlength=10) / len(arrays)
        assert abs(share - 0.1).max() < 0.01
    scaled = np.asarray(train.images, dtype=np.float64) / 255
    np.testing.assert_allclose(scaled.mean((0, 2, 3)), info.mean, atol=1e-4)
    np.testing.assert_allclose(scaled.std((0, 2, 3)), info.std, atol=1e-4)
    coarse = [a.images[:, :, ::4, ::4].reshape(len(a), -1) / 255.0 for a in (train, test)]
    model = RidgeClassifier().fit(coarse[0], train.labels)
    assert model.score(coarse[1], test.labels) > 0.85


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    bundle = load_digits()
    both = [load_dataset("digits", split) for split in ("train", "test")]
    pixels = np.concatenate([a.images for a in both])
    labels = np.concatenate([a.labels for a in both])
    assert (pixels[:, 0] == pixels[:, 1]).all()
    assert (pixels[:, 0] == pixels[:, 2]).all()
    # PIL's bilinear enlargement of the originals, found again by their content.
    want = []
    for image in bundle.images:
        large = Image.fromarray((image * 255 / 16).astype(np.float32))
        want.append(np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR)))
    want = np.stack(want)
    first = both[0]
    for row in (0, 1, 700, 1437):
        distance = abs(want - first.images[row, 0]).max((1, 2))
        match = int(distance.argmin())
        assert distance[match] <= 0.51
        assert bundle.target[match] == first.labels[row]
    assert np.bincount(labels).tolist() == np.bincount(bundle.target).tolist()


# ---- the real thing


@pytest.mark.slow
def test_real_cifar10(real_cifar10, real_root):
    for split, rows in (("train", 50_000), ("test", 10_000)):
        arrays = real_cifar10[split]
        assert arrays.images.shape == (rows, 3, 32, 32)
        assert rows == getattr(dataset_info("cifar10"), f"num_{split}")
        assert np.bincount(arrays.labels).tolist() == [rows // 10] * 10
        assert arrays.class_names == dataset_info("cifar10").class_names
        (path,) = (Path(real_root) / "cifar10").glob(f"{split}-*.parquet")
        table = pq.read_table(path)
        for row in (0, 1, 1024, rows - 1):
            data = table["img"][row]["bytes"].as_py()
            want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(arrays.images[row].transpose(1, 2, 0), want)
            assert arrays.labels[row] == table["label"][row].as_py()
    mean = np.asarray(real_cifar10["train"].images[::10]).mean((0, 2, 3)) / 255
    np.testing.assert_allclose(mean, dataset_info("cifar10").mean, atol=0.01)
