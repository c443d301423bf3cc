"""Class folders: ImageNet, Tiny ImageNet and a folder of one's own, and what can be wrong."""

import io
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from refusals import message, refused

import ekd_ray.data.datasets as datasets
from ekd_ray.data import (
    EncodedImages,
    check_dataset,
    dataset_info,
    load_dataset,
    num_train,
    sources,
    stage_images,
    training_labels,
)
from ekd_ray.data.registry import DATASETS

CLASSES = [f"n{i:08d}" for i in range(200)]


# ---- a folder of one's own


@pytest.fixture
def pets(tmp_path, make):
    """Two classes, nested folders, hidden files and other suffixes; held out in test/."""
    picture = make.picture
    files = {
        "train/cat/b.JPEG": picture(30, 40, 0, "JPEG"),
        "train/cat/a/z.png": picture(40, 30, 1),
        "train/cat/a/deep/q.WebP": picture(40, 50, 2, "WEBP"),
        "train/cat/.hidden.png": b"no picture",
        "train/cat/notes.txt": b"no picture",
        "train/dog/c.bmp": picture(30, 30, 3, "BMP"),
        "train/dog/.thumbs/d.png": b"no picture",
        "train/.git/e.png": b"no picture",
        "test/cat/1.jpg": picture(33, 44, 4, "JPEG"),
        "test/dog/2.jpg": picture(44, 33, 5, "JPEG"),
        "test/dog/3.jpg": picture(40, 40, 6, "JPEG"),
    }
    return make.tree(tmp_path / "pets", files)


def test_a_folder(pets, make):
    name = f"folder:{pets}"
    check_dataset(name)
    info = dataset_info(name)
    assert (info.name, info.num_classes, info.num_train) == (name, 2, 4)
    assert info.class_names == ("cat", "dog")
    assert (info.image_size, info.view_scheme, info.encoded) == (224, "resized_crop", True)
    assert (info.mean, info.std) == (DATASETS["imagenet"].mean, DATASETS["imagenet"].std)
    assert num_train(name) == 4
    train, test = (load_dataset(name, split) for split in ("train", "test"))
    assert isinstance(train, EncodedImages)
    assert (train.name, train.split, train.num_classes) == (name, "train", 2)
    assert train.labels.tolist() == training_labels(name).tolist() == [0, 0, 0, 1]
    assert test.labels.tolist() == [0, 1, 1]
    # Sorted by path within a class.
    want = ["cat/a/deep/q.WebP", "cat/a/z.png", "cat/b.JPEG", "dog/c.bmp"]
    for i, path in enumerate(want):
        assert train.pictures.name(i) == f"the image {pets / 'train' / path}"
        assert train.pictures.read(i) == (pets / "train" / path).read_bytes()
    with pytest.raises(ValueError, match="read-only"):
        train.labels[0] = 1
    images, labels = stage_images(test, "cpu", scheme="resized_crop").views([2, 0], [1, 2])
    assert images.shape == (2, 3, 224, 224)
    assert labels.tolist() == [1, 0]


def test_how_a_folder_may_be_named(pets, monkeypatch):
    absolute = load_dataset(f"folder:{pets}", "train")
    monkeypatch.chdir(pets.parent)
    monkeypatch.setenv("HOME", str(pets.parent))
    for name in ("folder:pets", "folder:./pets/", "folder:~/pets"):
        assert dataset_info(name).num_train == 4
        got = load_dataset(name, "train")
        assert (got.name, got.fingerprint) == (name, absolute.fingerprint)
        assert os.path.isabs(got.pictures.name(0).removeprefix("the image "))


@pytest.mark.parametrize("side", ["val", "valid", "validation"])
def test_names_of_the_held_out_side(pets, side, make):
    shutil.copytree(pets / "test", pets / side)
    make.tree(pets, {f"{side}/cat/extra.png": make.picture(20, 20)})
    assert len(load_dataset(f"folder:{pets}", "test")) == 3  # test/ goes before
    shutil.rmtree(pets / "test")
    check_dataset(f"folder:{pets}")
    assert len(load_dataset(f"folder:{pets}", "test")) == 4


def test_a_folder_that_does_not_serve(pets, tmp_path, make):
    name = f"folder:{pets}"
    assert "names no folder; give folder:PATH" in message(dataset_info, "folder:")
    assert "Known:" in message(dataset_info, "folders:x")
    assert "folder:PATH" in message(dataset_info, "x")
    assert "no folder ~nobody-of-that-name:" in message(dataset_info, "folder:~nobody-of-that-name")
    missing = message(dataset_info, f"folder:{tmp_path}/nowhere")
    assert re.search("there is no folder .*nowhere: check the name", missing)
    assert refused(f"folder:{tmp_path}/nowhere") == missing
    assert "Did you mean 'pets'?" in message(dataset_info, f"folder:{pets.parent}/petz")
    (tmp_path / "picture.png").touch()
    assert "picture.png is a file" in message(dataset_info, f"folder:{tmp_path}/picture.png")
    (tmp_path / "empty").mkdir()
    missing = message(dataset_info, f"folder:{tmp_path}/empty")
    assert re.search("there is no folder .*empty/train; .* needs train/<class>/", missing)

    shutil.move(pets / "test", tmp_path / "aside")
    assert f"{pets} has train/, but none of test/, val/, valid/, validation/" in refused(name)
    (pets / "test").mkdir()
    assert f"{pets}/test has no class folders" in refused(name, split="test")
    make.tree(pets, {"test/cat/1.png": b"", "test/cow/1.png": b"", "test/elk/1.png": b""})
    text = refused(name, split="test")
    assert "must have the same class folders" in text
    assert "'cow' is in" in text
    assert "and 2 more differ" in text
    shutil.rmtree(pets / "test")
    (pets / "test/cat").mkdir(parents=True)
    (pets / "test/dog").mkdir()
    assert f"class folders in {pets}/test hold no images" in message(check_dataset, name)
    assert "hold no images (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .gif)" in message(
        load_dataset, name, "test"
    )
    (pets / "train/eel").mkdir()
    (pets / "test/eel").mkdir()
    assert f"class folder {pets}/train/eel holds no image" in refused(name)
    shutil.rmtree(pets / "train/eel")
    shutil.rmtree(pets / "train/dog")
    assert "has 1 class folder, but a data set needs two" in refused(name)


def test_loops_and_dead_links(pets, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_DEPTH", 3)
    (pets / "train/dog/again").symlink_to(pets / "train/dog")
    assert "4 folders below its class; remove the link" in refused(f"folder:{pets}", checked=None)
    (pets / "train/dog/again").unlink()
    (pets / "train/dog/gone.png").symlink_to(pets / "nothing")
    text = refused(f"folder:{pets}", checked=None)
    assert "gone.png (No such file or directory)" in text
    (pets / "train/dog/gone.png").unlink()
    (pets / "train/dog/linked.png").symlink_to(pets / "train/cat/a/z.png")
    assert num_train(f"folder:{pets}") == 5


# ---- ImageNet


def test_imagenet_needs_its_1000_classes(miniatures, tmp_path):
    source = miniatures["folders"] / "imagenet"
    root = tmp_path / "root"
    for side in ("train", "val"):
        for i in range(0, 1000, 2):
            (root / "imagenet" / side).mkdir(parents=True, exist_ok=True)
            (root / "imagenet" / side / f"n{i:08d}").symlink_to(source / side / f"n{i:08d}")
    text = refused("imagenet", root)
    assert "has 500 class folders, but imagenet has 1000 classes" in text


# ---- Tiny ImageNet


def tiny_files(make, layout):
    """200 classes with one training and one validation image each, in one of three layouts."""
    images = make.images(8, 64)
    images[3, 1:] = images[3, 0]  # some of the archive's pictures are grey
    modes = ["L" if i == 3 else "RGB" for i in range(8)]
    data = [png(x, mode) for x, mode in zip(images, modes, strict=True)]
    shown = {"train": np.arange(200) % 8, "test": np.arange(200) // 8 % 8}
    files, lines = {}, []
    for label, name in enumerate(CLASSES):
        inner = "" if layout == "plain" else "images/"
        files[f"train/{name}/{inner}{name}_0.JPEG"] = data[shown["train"][label]]
        number = 199 - label
        side = "images" if layout == "archive" else name
        files[f"val/{side}/val_{number}.JPEG"] = data[shown["test"][label]]
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t63\t63\n")
    files["train/n00000003/n00000003_boxes.txt"] = b"n00000003_0.JPEG\t0\t0\t63\t63\n"
    if layout != "plain":
        files["val/val_annotations.txt"] = "".join(lines).encode()
    return files, {split: images[index] for split, index in shown.items()}


def png(image, mode):
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_tiny_imagenet_layouts_agree(tmp_path, make):
    prints = set()
    places = ("tiny_imagenet", "tiny-imagenet-200", "tiny_imagenet/tiny-imagenet-200")
    for layout, place in zip(("archive", "plain", "sorted"), places, strict=True):
        files, pixels = tiny_files(make, layout)
        root = tmp_path / layout
        make.tree(root / place, files)
        check_dataset("tiny_imagenet", data_root=root)
        assert num_train("tiny_imagenet", data_root=root) == 200
        for split in ("train", "test"):
            got = load_dataset("tiny_imagenet", split, data_root=root)
            np.testing.assert_array_equal(got.images, pixels[split])
            assert got.labels.tolist() == list(range(200))
            assert got.class_names == tuple(CLASSES)
            prints.add((split, got.fingerprint))
    assert len(prints) == 2


def test_what_can_be_wrong_with_the_archive(tmp_path, make):
    files, _ = tiny_files(make, "archive")
    base = make.tree(tmp_path / "tiny_imagenet", files)
    listed = base / "val/val_annotations.txt"
    good = listed.read_text()

    def now(split="test", checked=True):
        return refused("tiny_imagenet", tmp_path, split, checked)

    listed.write_text(good.replace("val_7.JPEG", "val_7000.JPEG"))
    assert "val_annotations.txt does not list val_7.JPEG" in now()
    listed.write_text(good.replace("n00000004", "n99999999"))
    text = now()
    assert "line 5 of" in text
    assert "'val_195.JPEG' the class 'n99999999', which has no folder in train" in text
    listed.write_bytes(b"\xff\xfe")
    assert "cannot read" in now()
    listed.unlink()
    assert "must have the same class folders" in now()
    listed.write_text(good)
    bad = base / "train/n00000009/images/n00000009_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:-900])
    text = now("train", checked=None)
    assert f"the image {bad} is not a readable JPEG" in text
    bad.write_bytes(make.picture(65, 64))
    text = now("train", checked=None)
    assert f"the image {bad} has 65x64 pixels, but tiny_imagenet has 64x64" in text


def test_a_new_picture_is_seen(tmp_path, make):
    files, _ = tiny_files(make, "archive")
    base = make.tree(tmp_path / "tiny_imagenet", files)
    first = load_dataset("tiny_imagenet", "train", data_root=tmp_path)
    # Below a class folder whose own time stays: train/<class>/images/.
    extra = base / "train/n00000005/images/more.JPEG"
    extra.write_bytes(make.encode(make.images(1, 64)[0]))
    os.utime(extra.parent, ns=(5, 5))
    datasets._opened.clear()
    second = load_dataset("tiny_imagenet", "train", data_root=tmp_path)
    assert (len(first), len(second)) == (200, 201)
    assert first.fingerprint != second.fingerprint
