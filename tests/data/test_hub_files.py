"""`hf:PATH`: image data sets of the Hugging Face hub on disk, in each layout that they have."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import message, refused

from ekd_ray.config.phrases import short_name
from ekd_ray.data import (
    DATASETS,
    check_dataset,
    dataset_info,
    load_dataset,
    num_train,
    stage_images,
    training_labels,
)
from ekd_ray.data.conformance import check_dataset as check_conformance

NAMES = [f"class{i}" for i in range(10)]
TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"


@pytest.fixture
def write(make):
    """Writes 20 training and 10 test pictures of 32 x 32 under the paths given; returns them."""
    images = make.images(30)
    parts = {"train": images[:20], "test": images[20:]}

    def written(train, test, **given):
        given = {"names": NAMES, **given}
        for path, part in ((train, parts["train"]), (test, parts["test"])):
            data = [make.encode(image) for image in part]
            make.parquet(path, data, [i % 10 for i in range(len(data))], **given)
        return parts

    return written


def save_to_disk(folder, source, *, files=1):
    """A split as `datasets.Dataset.save_to_disk` lays it out, from a Parquet file."""
    folder.mkdir(parents=True)
    table, names = pq.read_table(source), []
    size = -(-len(table) // files)
    for i in range(files):
        names.append(f"data-{i:05d}-of-{files:05d}.arrow")
        part = table.slice(i * size, size)
        with pa.ipc.new_stream(folder / names[-1], part.schema) as stream:
            stream.write_table(part, max_chunksize=6)
    state = {"_data_files": [{"filename": name} for name in names], "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))


LAYOUTS = [
    (TRAIN, TEST),
    ("data/" + TRAIN, "data/" + TEST),
    ("plain_text/" + TRAIN, "plain_text/" + TEST),
    ("train.parquet", "test.parquet"),
    ("train/0000.parquet", "test/0000.parquet"),
    ("default/train/0000.parquet", "default/test/0000.parquet"),
    (TRAIN, TEST.replace("test", "validation")),
    (TRAIN, TEST.replace("test", "valid")),
    ("train.parquet", "val.parquet"),
]


@pytest.mark.parametrize(("train", "test"), LAYOUTS)
def test_every_layout(tmp_path, write, train, test):
    parts = write(tmp_path / "x" / train, tmp_path / "x" / test)
    name = f"hf:{tmp_path / 'x'}"
    check_dataset(name)
    info = dataset_info(name)
    assert (info.num_classes, info.image_size, info.num_train) == (10, 32, 20)
    assert (info.view_scheme, info.encoded, info.class_names) == ("crop_flip", False, tuple(NAMES))
    assert training_labels(name).tolist() == [i % 10 for i in range(20)]
    for split, part in parts.items():
        got = load_dataset(name, split)
        np.testing.assert_array_equal(got.images, part)
        assert got.labels.tolist() == [i % 10 for i in range(len(part))]
        assert (got.name, got.class_names) == (name, tuple(NAMES))


@pytest.mark.parametrize("files", [1, 3])
def test_saved_to_disk(tmp_path, write, files):
    parts = write(tmp_path / TRAIN, tmp_path / TEST)
    for split, source in (("train", TRAIN), ("test", TEST)):
        save_to_disk(tmp_path / "saved" / split, tmp_path / source, files=files)
        # A result of `map` that `datasets` has cached there is none of its files.
        (tmp_path / "saved" / split / "cache-123.arrow").write_bytes(b"other")
    name = f"hf:{tmp_path / 'saved'}"
    check_conformance(name)
    for split, part in parts.items():
        np.testing.assert_array_equal(load_dataset(name, split).images, part)
    path = tmp_path / "saved/train" / f"data-00000-of-0000{files}.arrow"
    path.write_bytes(path.read_bytes()[:300])
    assert f"cannot read the Arrow file {path}" in refused(name)
    path.unlink()
    assert str(path) in refused(name)
    (tmp_path / "saved/train/state.json").write_text("{")
    assert "state.json" in refused(name)


def test_the_same_data_by_either_name(hub):
    """CIFAR-10 by its name and as a folder of the hub has the same fingerprints."""
    name = f"hf:{hub / 'cifar10'}"
    for split in ("train", "test"):
        ours, theirs = (load_dataset(n, split, data_root=hub) for n in (name, "cifar10"))
        assert ours.fingerprint == theirs.fingerprint
        assert ours.class_names == theirs.class_names
    # As large as published, and perhaps not there yet.
    assert training_labels("cifar10", data_root=hub / "none") is None


@pytest.mark.slow  # the layouts above have the same files in small
def test_real_cifar10_as_a_folder_of_the_hub(real_cifar10, real_root):
    name = f"hf:{real_root}/cifar10"
    info, known = dataset_info(name), DATASETS["cifar10"]
    assert (info.num_classes, info.num_train, info.image_size) == (10, 50_000, 32)
    assert info.class_names == known.class_names
    np.testing.assert_allclose(info.mean, known.mean, atol=0.01)
    np.testing.assert_allclose(info.std, known.std, atol=0.01)
    assert load_dataset(name, "train").fingerprint == real_cifar10["train"].fingerprint


def test_paths_and_names(tmp_path, write, monkeypatch):
    write(tmp_path / "pets" / TRAIN, tmp_path / "pets" / TEST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    want = load_dataset(f"hf:{tmp_path / 'pets'}", "train")
    for name in ("hf:pets", "hf:./pets/", "hf:~/pets", f"hf:pets/{TRAIN}"):
        got = load_dataset(name, "train")
        assert (got.fingerprint, got.name) == (want.fingerprint, name)
    assert short_name(f"hf:{tmp_path / 'pets'}") == "pets"


def test_pictures_of_any_size_are_packed(tmp_path, make, builds):
    """They are the pictures of a folder with the same files; counting them packs nothing."""
    data = [make.picture(30 + 7 * i, 60 - 5 * i, i, "JPEG") for i in range(6)]
    labels, names = [0, 0, 0, 1, 1, 1], ["a", "b"]
    for split in ("train", "validation"):
        path = tmp_path / "hub" / f"{split}-00000-of-00001.parquet"
        make.parquet(path, data, labels, image="image", names=names)
    make.tree(tmp_path / "tree", {
        f"{side}/{names[label]}/{i}.jpg": data[i]
        for side in ("train", "val") for i, label in enumerate(labels)
    })  # fmt: skip
    name = f"hf:{tmp_path / 'hub'}"
    check_dataset(name)
    info = dataset_info(name)
    assert (info.encoded, info.image_size, info.view_scheme) == (True, 224, "resized_crop")
    assert (info.mean, info.std) == (DATASETS["imagenet"].mean, DATASETS["imagenet"].std)
    assert num_train(name) == 6
    assert not builds
    ids = np.arange(6)
    seen = []
    for source in (name, f"folder:{tmp_path / 'tree'}"):
        stage = stage_images(load_dataset(source, "train"), "cpu", scheme="resized_crop")
        seen.append([stage.views(ids, None)[0], stage.views(ids, ids)[0]])
    assert all(a.equal(b) for a, b in zip(*seen, strict=True))
    # Another size among many, as the last one.
    square = [make.picture(32, 32, i) for i in range(5)] + [make.picture(32, 33, 9)]
    make.parquet(tmp_path / "hub" / TRAIN, square, labels, image="image", names=names)
    assert dataset_info(name).encoded


def test_classes_without_names(tmp_path, write):
    write(tmp_path / TRAIN, tmp_path / TEST, names=None)
    info = dataset_info(f"hf:{tmp_path}")
    assert info.class_names == tuple("0123456789")


def test_columns_that_the_files_declare(tmp_path, write):
    """Pictures and labels under any name, where there is one of each kind."""
    write(tmp_path / TRAIN, tmp_path / TEST, image="photo", label="species")
    assert dataset_info(f"hf:{tmp_path}").num_classes == 10
    write(tmp_path / TRAIN, tmp_path / TEST, image="photo", label="species", names=None)
    assert "has the columns photo, species" in refused(f"hf:{tmp_path}")


def test_hidden_test_labels_leave_the_validation_split(tmp_path, write, make):
    write(tmp_path / TRAIN, tmp_path / TEST.replace("test", "validation"))
    hidden = [make.encode(image) for image in make.images(4)]
    make.parquet(tmp_path / TEST, hidden, [-1] * 4, names=NAMES)
    name = f"hf:{tmp_path}"
    check_dataset(name)
    assert len(load_dataset(name, "test")) == 10
    (tmp_path / TEST.replace("test", "validation")).unlink()
    assert "row 0 of" in refused(name, split="test")


def test_what_is_stored_follows_the_files(tmp_path, write, builds, make):
    write(tmp_path / TRAIN, tmp_path / TEST)
    name = f"hf:{tmp_path}"
    first = load_dataset(name, "train").fingerprint
    os.utime(tmp_path / TRAIN, ns=(1, 1))
    assert load_dataset(name, "train").fingerprint == first
    data = [make.encode(image) for image in make.images(12, size=48)]
    make.parquet(tmp_path / TRAIN, data, [i % 3 for i in range(12)], names=["a", "b", "c"])
    info = dataset_info(name)
    assert (info.image_size, info.num_classes, info.num_train) == (48, 3, 12)
    assert len(builds) == 3
    # A copy elsewhere is the same data.
    shutil.copytree(tmp_path, tmp_path.parent / "copy", ignore=shutil.ignore_patterns("cache"))
    copied = load_dataset(f"hf:{tmp_path.parent / 'copy'}", "train")
    assert copied.fingerprint == load_dataset(name, "train").fingerprint


def test_what_is_refused(tmp_path, write, make):
    assert "names no folder; give hf:PATH" in message(check_dataset, "hf:")
    assert "hf:PATH names one on this disk" in refused(f"hf:{tmp_path / 'uoft-cs/cifar10'}")
    name = f"hf:{tmp_path / 'x'}"
    (tmp_path / "x").mkdir()
    assert "there is no training split in" in refused(name)
    write(tmp_path / "x" / TRAIN, tmp_path / "x" / TEST)
    (tmp_path / "x" / TEST).rename(tmp_path / TEST)
    text = refused(name, split="test")
    assert re.search("has a training split in .*, but none of test, validation, valid, val", text)
    (tmp_path / TEST).rename(tmp_path / "x" / TEST)
    for config in ("small", "large"):
        shutil.copytree(tmp_path / "x", tmp_path / "both" / config)
    text = refused(f"hf:{tmp_path / 'both'}")
    assert f"name one of them: hf:{tmp_path / 'both/large'}, hf:{tmp_path / 'both/small'}" in text
    check_dataset(f"hf:{tmp_path / 'both/small'}")


def test_splits_that_do_not_fit(tmp_path, write, make):
    name = f"hf:{tmp_path}"
    write(tmp_path / TRAIN, tmp_path / TEST)
    good = [make.encode(image) for image in make.images(10)]
    make.parquet(tmp_path / TEST, good, [*range(10)], names=NAMES[::-1])
    assert "declares other classes than the training split" in refused(name, split="test")
    make.parquet(tmp_path / TEST, [*good[1:], make.picture(40, 40)], [*range(10)], names=NAMES)
    text = refused(name, split="test")
    assert re.search(r"row 9 of \S+ has 40x40 pixels, but hf:\S+ has 32x32", text)
    make.parquet(tmp_path / TRAIN, good, [i % 2 + 1 for i in range(10)], names=None)
    assert "no training image with the label 0" in refused(name)
    make.parquet(tmp_path / TRAIN, good, [0] * 9 + [-1], names=None)
    assert "has the label -1 in its training split" in refused(name)
    make.parquet(tmp_path / TRAIN, [], [], names=None)
    assert "holds no rows" in refused(name)
    make.parquet(tmp_path / TRAIN, [b"no picture"] * 10, [*range(10)], names=NAMES)
    assert "row 0 of" in refused(name)


def test_labels_that_int64_does_not_hold(write, tmp_path):
    """And giants that it does hold: nobody counts up to them."""
    for giant, words in (
        (2**64 - 1, "has the label 18446744073709551615"),
        (10**12, "up to 10{12}"),
    ):
        write(tmp_path / TRAIN, tmp_path / TEST, names=None)
        table = pq.read_table(tmp_path / TRAIN)
        labels = pa.array([*table["label"].to_pylist()[:-1], giant], pa.uint64())
        pq.write_table(table.set_column(1, "label", labels), tmp_path / TRAIN)
        assert re.search(words, refused(f"hf:{tmp_path}", checked=None))
