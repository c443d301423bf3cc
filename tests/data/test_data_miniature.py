"""The generated miniature: learnable, the same every time, and honest about bad wishes."""

import io
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ekd_ray.data import load_dataset, stage_images
from ekd_ray.data.miniature import main, write_miniature
from ekd_ray.errors import UserError

SMALL = {"classes": 8, "train_per_class": 3, "test_per_class": 2, "size": 20}


def pictures(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.JPEG"))}


def test_folders(tmp_path):
    write_miniature(tmp_path / "a", **SMALL)
    files = pictures(tmp_path / "a")
    assert len(files) == 8 * 3 + 8 * 2
    assert "train/n00000007/n00000007_2.JPEG" in files
    assert "val/n00000000/n00000000_1.JPEG" in files
    assert len(set(files.values())) == 40
    sizes = set()
    for data in files.values():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        # Quality 75 halves the standard's table, which starts with 16.
        assert image.quantization[0][0] == 8
        sizes |= set(image.size)
    assert min(sizes) == 20
    assert max(sizes) == 25
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_shards_hold_the_same(tmp_path):
    write_miniature(tmp_path / "a", **SMALL)
    write_miniature(tmp_path / "b", **SMALL, parquet=True)
    files = pictures(tmp_path / "a")
    for side, prefix, count in (("train", "train", 3), ("val", "validation", 2)):
        shards = sorted((tmp_path / "b").glob(f"{prefix}-*-of-{count:05d}.parquet"))
        assert len(shards) == count
        rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
        assert [row["image"]["bytes"] for row in rows] == [
            data for name, data in files.items() if name.startswith(side)
        ]
        per_class = len(rows) // 8
        assert [row["label"] for row in rows] == [i // per_class for i in range(len(rows))]


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_miniature(tmp_path / name, **SMALL, seed=seed)
    a, b, c = (pictures(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not set(a.values()) & set(c.values())


def test_classes_can_be_learned(tmp_path):
    (tmp_path / "empty").mkdir()
    write_miniature(tmp_path / "empty", classes=50, train_per_class=1, test_per_class=2, size=24)
    stages = {
        split: stage_images(
            load_dataset(f"folder:{tmp_path / 'empty'}", split),
            "cpu",
            scheme="resized_crop",
            image_size=8,
        )
        for split in ("train", "test")
    }
    train, _ = stages["train"].views(np.arange(50), None)
    test, labels = stages["test"].views(np.arange(100), None)
    distance = (test.float()[:, None] - train.float()[None]).flatten(2).square().sum(2)
    assert (distance.argmin(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"classes": 1}, "classes must be >= 2, got 1"),
        ({"train_per_class": 0}, "train_per_class must be >= 1, got 0"),
        ({"test_per_class": -1}, "test_per_class must be >= 1, got -1"),
        ({"size": 7}, "size must be >= 8, got 7"),
    ],
)
def test_bad_wishes(tmp_path, wish, words):
    with pytest.raises(UserError, match=words):
        write_miniature(tmp_path / "a", **(SMALL | wish))
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        write_miniature(tmp_path / "full", **SMALL)
    with pytest.raises(UserError, match="cannot write the miniature"):
        write_miniature(tmp_path / "full" / "x" / "y", **SMALL)
    assert main([str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"full"}


def test_command_line(tmp_path):
    flags = "--classes 3 --train-per-class 2 --test-per-class 1 --size 16 --parquet --seed 5"
    command = [sys.executable, "-m", "ekd_ray.data.miniature", str(tmp_path / "a"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    write_miniature(
        tmp_path / "b",
        classes=3,
        train_per_class=2,
        test_per_class=1,
        size=16,
        parquet=True,
        seed=5,
    )
    names = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
