"""Encoded data sets: both layouts of ImageNet, the index, the packed file, their cache."""

import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from refusals import message

import ekd_ray.data.store as store
from ekd_ray.data import check_dataset, load_dataset, num_train, stage_images
from ekd_ray.data.decode import decode_view
from ekd_ray.data.shards import ShardSource

NAMES = [f"n{i:08d}" for i in range(1000)]
TRAIN = "train-00000-of-00001.parquet"


@pytest.fixture
def tree(tmp_path, make):
    """A folder data set of two classes, one of them nested; its root."""
    files = {
        f"{side}/{name}/{inner}{i}.png": make.picture(20 + i, 20, i)
        for side in ("train", "val")
        for name, inner in (("a", ""), ("b", "in/"))
        for i in range(3)
    }
    return make.tree(tmp_path / "tree", files)


# ---- ImageNet in both layouts


def test_both_layouts_are_the_same_pictures(miniatures):
    pixels = {}
    for layout, root in miniatures.items():
        check_dataset("imagenet", data_root=root)
        assert num_train("imagenet", data_root=root) == 1000
        for split in ("train", "test"):
            arrays = load_dataset("imagenet", split, data_root=root)
            assert (arrays.num_classes, len(arrays)) == (1000, 1000)
            assert arrays.class_names == tuple(NAMES)
            assert arrays.labels.tolist() == list(range(1000))
            stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=16)
            ids = np.arange(0, 1000, 17)
            pixels[layout, split] = [stage.views(ids, ids % 64)[0], stage.views(ids, None)[0]]
            assert arrays.pictures.name(999)
    for split in ("train", "test"):
        for a, b in zip(pixels["folders", split], pixels["parquet", split], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(pixels["folders", "train"][1], pixels["folders", "test"][1])


def test_shards_are_packed_in_order(shards, make, builds, entries):
    got = load_dataset("imagenet", "train", data_root=shards)
    assert got.labels.tolist() == [(i * 53) % 1000 for i in range(20)]
    for i in range(20):
        assert got.pictures.read(i) == make.picture(20 + i, 30 - i, i, "JPEG")
    folder = shards / "imagenet/data"
    where = [got.pictures.name(i) for i in (0, 9, 10, 19)]
    first, second = (folder / f"train-0000{i}-of-00002.parquet" for i in range(2))
    rows = [(0, first), (9, first), (0, second), (9, second)]
    assert where == [f"the image in row {row} of {path}" for row, path in rows]
    (entry,) = entries()
    names = {"encoded.bin", "offsets.npy", "labels.npy", "meta.json"}
    assert {p.name for p in entry.iterdir()} == names
    assert isinstance(got.pictures.data, np.memmap)
    assert load_dataset("imagenet", "train", data_root=shards).pictures is got.pictures
    assert len(builds) == 1


def test_memory_stays_bounded_however_shards_are_grouped(shards, monkeypatch):
    """One row group of 24 MB is packed with a few batches in Arrow's memory."""
    rng = np.random.default_rng(0)
    rows = [{"bytes": rng.bytes(20_000), "path": None} for _ in range(1200)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": [i % 1000 for i in range(1200)]})
    folder = shards / "imagenet/data"
    for path in folder.glob("train-*"):
        path.unlink()
    # The smallest unit that can be read is a page: here 16 rows.
    pq.write_table(table, folder / TRAIN, row_group_size=1200, write_batch_size=16)
    assert pq.ParquetFile(folder / TRAIN).num_row_groups == 1
    del table
    start, held = pa.total_allocated_bytes(), []
    batches = ShardSource.encoded_batches

    def watched(source, rows):
        for batch in batches(source, rows):
            held.append(pa.total_allocated_bytes() - start)
            yield batch

    monkeypatch.setattr(ShardSource, "encoded_batches", watched)
    got = load_dataset("imagenet", "train", data_root=shards)
    assert len(held) == 1200 // 64 + 1
    assert 0 < max(held) < 6e6
    for i in (0, 63, 64, 1199):
        assert got.pictures.read(i) == rows[i]["bytes"]


def test_a_bad_picture_is_named(shards, make, tree):
    data = [make.picture(20, 20, i, "JPEG") for i in range(8)]
    data[5] = data[5][:-200]
    folder = shards / "imagenet/data"
    make.parquet(
        folder / "validation-00000-of-00001.parquet", data, [0] * 8, image="image", names=NAMES
    )
    arrays = load_dataset("imagenet", "test", data_root=shards)  # packing does not decode
    stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=16)
    stage.views([4], [0])
    text = message(stage.views, [4, 5], [0, 0])
    assert re.search(r"the image in row 5 of \S+validation-00000-of-00001.parquet is not", text)
    bad = tree / "val/a/1.png"
    bad.write_bytes(bad.read_bytes()[:50])
    arrays = load_dataset(f"folder:{tree}", "test")
    stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=16)
    assert f"the image {bad} is not a readable" in message(stage.views, [1], [0])


# ---- the cache


DAMAGE = [
    lambda e: (e / "meta.json").write_text("{"),
    lambda e: np.save(e / "labels.npy", np.zeros(6, np.int64)),
    lambda e: np.save(e / "offsets.npy", np.arange(7)),
    lambda e: [os.truncate(e / n, 5) for n in ("encoded.bin", "paths.bin") if (e / n).exists()],
    lambda e: [(e / n).unlink(missing_ok=True) for n in ("encoded.bin", "sizes.npy")],
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("layout", ["packed", "index"])
def test_a_damaged_entry_is_built_again(shards, tree, builds, layout, damage, forget, entries):
    name = "imagenet" if layout == "packed" else f"folder:{tree}"
    want = load_dataset(name, "test", data_root=shards)
    wanted = [want.pictures.read(i) for i in range(6)]
    (entry,) = entries()
    damage(entry)
    forget()
    got = load_dataset(name, "test", data_root=shards)
    assert [got.pictures.read(i) for i in range(6)] == wanted
    assert got.labels.tolist() == want.labels.tolist()
    assert got.fingerprint == want.fingerprint
    assert len(builds) == 2
    assert entries() == [entry]


def test_fingerprint_of_a_folder(tree, tmp_path, builds, make, forget):
    def fingerprint(root):
        forget()
        got = load_dataset(f"folder:{root}", "train")
        assert re.fullmatch("[0-9a-f]{16}", got.fingerprint)
        return got.fingerprint

    first = fingerprint(tree)
    assert fingerprint(tree) == first
    assert len(builds) == 1
    moved = tmp_path / "elsewhere/moved"
    moved.parent.mkdir()
    tree.rename(moved)
    assert fingerprint(moved) == first
    seen = {first}
    changes = [
        lambda: (moved / "train/a/0.png").rename(moved / "train/a/9.png"),
        lambda: (moved / "train/a/1.png").rename(moved / "train/b/1.png"),
        lambda: make.tree(moved, {"train/b/in/new/0.png": make.picture(20, 20)}),
    ]
    for number, change in enumerate(changes):
        change()
        for folder, _, _ in os.walk(moved):  # some file systems have slow clocks
            os.utime(folder, (number, number))
        seen.add(fingerprint(moved))
        assert len(seen) == number + 2, number
    # A file of another size, moved into place as careful writers do.
    (moved / "train/new.png").write_bytes(make.picture(99, 99))
    (moved / "train/new.png").replace(moved / "train/a/2.png")
    os.utime(moved / "train/a", (77, 77))
    assert fingerprint(moved) not in seen


def test_fingerprint_of_shards(shards, make, tmp_path, forget):
    def fingerprint(root=shards):
        forget()
        return load_dataset("imagenet", "train", data_root=root).fingerprint

    first = fingerprint()
    path = shards / "imagenet/data" / "train-00001-of-00002.parquet"
    os.utime(path, ns=(1, 1))
    assert fingerprint() == first
    assert fingerprint(shutil.copytree(shards, tmp_path / "copy")) == first
    table = pq.read_table(path)
    relabelled = table.set_column(1, "label", [[5] * 10])
    pq.write_table(relabelled.replace_schema_metadata(table.schema.metadata), path)
    second = fingerprint()
    data = [row["bytes"] for row in table["image"].to_pylist()]
    data[3] = data[3][:-1] + b"x"  # of the same length
    make.parquet(path, data, [5] * 10, image="image", names=NAMES)
    assert len({first, second, fingerprint()}) == 3


def test_a_file_written_over_in_place(tree, make):
    name = f"folder:{tree}"
    arrays = load_dataset(name, "train")
    first = arrays.fingerprint
    path = tree / "train/a/0.png"
    stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=16)
    stage.views([0], None)
    before = path.read_bytes()
    os.utime(path, (5, 5))
    stage.views([0], None)  # the same content: copied, or touched
    assert load_dataset(name, "train", look=True).fingerprint == first
    for data in (before[:-20] + bytes([before[-20] ^ 1]) + before[-19:], make.picture(50, 50)):
        path.write_bytes(data)
        assert f"{path} has changed since it was indexed" in message(stage.views, [0], None)
        assert load_dataset(name, "train").fingerprint == arrays.fingerprint  # nobody looked
        again = load_dataset(name, "train", look=True)
        assert again.fingerprint not in (arrays.fingerprint, first)
        arrays = again
        stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=16)
    assert decode_view(again.pictures.read(0), "", 16, None).shape == (3, 16, 16)
    path.unlink()
    assert f"cannot read {path}: No such" in message(stage.views, [0], None)


def test_too_little_room_is_said_before_copying(shards, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9))
    monkeypatch.setattr(store, "synced", lambda path: pytest.fail("wrote"))
    text = message(load_dataset, "imagenet", "train", data_root=shards)
    assert "packing imagenet takes about" in text
    assert "0.0 GB are free; set EKD_CACHE_DIR" in text


def test_files_that_change_while_they_are_listed(tree, monkeypatch):
    monkeypatch.setattr(store, "folders_unchanged", lambda folders: False)
    text = message(load_dataset, f"folder:{tree}", "train")
    assert "changed while they were read" in text
