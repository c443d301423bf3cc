"""Data sets of one's own: what `load` may return, what is found out, stored and refused."""

import functools
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import message, refused

import ekd_ray.data.facts as facts
import ekd_ray.data.loaded as loaded
from ekd_ray.config import plugins
from ekd_ray.data import (
    DATASETS,
    EncodedImages,
    ImageArrays,
    check_dataset,
    dataset_info,
    load_dataset,
    num_train,
    register_dataset,
    stage_images,
)
from ekd_ray.data.conformance import check_dataset as check_conformance


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


@pytest.fixture
def arrays(make):
    """{split: (images [N, 32, 32, 3], labels)} of 30 and 10 random pictures of ten classes."""
    images = make.images(40).transpose(0, 2, 3, 1)
    labels = np.arange(40) % 10
    return {"train": (images[:30], labels[:30]), "test": (images[30:], labels[30:])}


class Pairs:
    """A map-style dataset of what it is given."""

    def __init__(self, pictures, labels):
        self.pairs = list(zip(pictures, labels, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


class Counted:
    """A `load` that knows its calls."""

    def __init__(self, splits):
        self.splits, self.calls = splits, []

    def __call__(self, split):
        self.calls.append(split)
        return self.splits[split]


# ---- what is returned


def test_arrays_are_the_same_data_as_files_with_these_pictures(arrays, make, tmp_path):
    """The shards of cifar10 with the same pictures and labels have the same fingerprints."""
    register_dataset("mine", arrays.get)
    for split, (images, labels) in arrays.items():
        data = [make.encode(image.transpose(2, 0, 1)) for image in images]
        make.parquet(tmp_path / f"{split}-00000-of-00001.parquet", data, labels.tolist())
    for split, (images, labels) in arrays.items():
        mine = load_dataset("mine", split)
        theirs = load_dataset("cifar10", split, data_root=tmp_path)
        assert isinstance(mine, ImageArrays)
        np.testing.assert_array_equal(mine.images, images.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(mine.labels, labels)
        assert mine.fingerprint == theirs.fingerprint
        assert (mine.name, mine.split) == ("mine", split)


KINDS = {
    "PIL": Image.fromarray,
    "PIL palette": lambda a: Image.fromarray(a).convert("P", palette=Image.Palette.ADAPTIVE),
    "PIL gray": lambda a: Image.fromarray(a).convert("L"),
    "array": lambda a: a,
    "gray array": lambda a: a[:, :, 0],
    "one channel": lambda a: a[:, :, :1],
    "tensor": lambda a: torch.from_numpy(a.transpose(2, 0, 1).copy()),
    "gray tensor": lambda a: torch.from_numpy(a[None, :, :, 0].copy()),
    "file": lambda a: _file(Image.fromarray(a)),
}


def _file(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(arrays, kind):
    convert = KINDS[kind]
    splits = {
        s: Pairs([convert(a) for a in images], labels) for s, (images, labels) in arrays.items()
    }
    register_dataset("mine", splits.get)
    got = load_dataset("mine", "train").images
    for row, image in enumerate(arrays["train"][0]):
        if kind.startswith("PIL"):
            want = np.asarray(convert(image).convert("RGB"))
        elif kind in ("gray array", "one channel", "gray tensor"):
            want = np.repeat(image[:, :, :1], 3, axis=2)
        else:
            want = image
        np.testing.assert_array_equal(got[row].transpose(1, 2, 0), want)


DEEP = {
    "I;16": lambda a: Image.fromarray(a),
    "I;16B": lambda a: Image.frombytes("I;16B", a.shape[::-1], a.astype(">u2").tobytes()),
    "PNG": lambda a: Image.open(io.BytesIO(_file(Image.fromarray(a)))),
    "PNG before PIL 11": lambda a: _png_as_i(a),
    "a file's bytes": lambda a: _file(Image.fromarray(a)),
    "a TIFF": lambda a: Image.open(io.BytesIO(_file(Image.fromarray(a), "TIFF"))),
}


def _png_as_i(values):
    image = Image.fromarray(values.astype(np.int32))
    image.format = "PNG"
    return image


@pytest.mark.parametrize("size", [16, 130])  # decoded once, on demand
@pytest.mark.parametrize("kind", DEEP)
def test_gray_pictures_of_16_bits_are_scaled(kind, size):
    """65535 is white; PIL itself clips at 255."""
    values = np.random.default_rng(0).integers(0, 65536, (4, size, size), dtype=np.uint16)
    values[0, 0, :4] = (0, 65535, 128, 129)
    pictures = [DEEP[kind](picture) for picture in values]
    register_dataset("mine", lambda split: Pairs(pictures, [0, 1, 0, 1]))
    got = load_dataset("mine", "train")
    stage = stage_images(got, "cpu", scheme="none", image_size=size)
    images, _ = stage.views(np.arange(4), None)
    if size == 16:
        exact = np.rint(values / 257).astype(np.uint8)
        np.testing.assert_array_equal(images.numpy(), np.repeat(exact[:, None], 3, axis=1))
        np.testing.assert_allclose(dataset_info("mine").mean, values.mean() / 65535, atol=1e-3)
    else:
        assert images.float().mean().item() == pytest.approx(values.mean() / 257, abs=0.5)
        assert images.float().std().item() > 20


@pytest.mark.parametrize("label", [int, np.int32, torch.tensor])
def test_every_kind_of_label(arrays, label):
    splits = {s: Pairs(images, map(label, labels)) for s, (images, labels) in arrays.items()}
    register_dataset("mine", splits.get)
    assert load_dataset("mine", "train").labels.tolist() == arrays["train"][1].tolist()


def test_tensors_and_lists(arrays):
    """Tensors of images have their channels first, as everywhere in torch."""
    images, labels = arrays["train"]
    first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    splits = {"train": (first, labels.tolist()), "test": arrays["test"]}
    register_dataset("mine", splits.get)
    np.testing.assert_array_equal(load_dataset("mine", "train").images, first.numpy())


def test_pictures_of_any_size_are_seen_as_those_of_a_folder(make, tmp_path):
    """PNG keeps every pixel, so each view equals that of the same picture in a class folder."""
    data = [make.picture(30 + 7 * i, 60 - 5 * i, i) for i in range(6)]
    files = {
        f"{side}/{'ab'[i % 2]}/{i}.png": d for side in ("train", "val") for i, d in enumerate(data)
    }
    make.tree(tmp_path / "tree", files)
    opened = [Image.open(io.BytesIO(d)) for d in data]
    order = [0, 2, 4, 1, 3, 5]  # as folders are sorted
    pairs = Pairs([opened[i] for i in order], [i % 2 for i in order])
    register_dataset("mine", lambda split: pairs)
    info = dataset_info("mine")
    assert (info.encoded, info.image_size, info.view_scheme) == (True, 224, "resized_crop")
    assert (info.mean, info.std) == (DATASETS["imagenet"].mean, DATASETS["imagenet"].std)
    stages = []
    for name in ("mine", f"folder:{tmp_path / 'tree'}"):
        got = load_dataset(name, "train")
        assert isinstance(got, EncodedImages)
        assert got.labels.tolist() == [0, 0, 0, 1, 1, 1]
        stages.append(stage_images(got, "cpu", scheme="resized_crop", image_size=24))
    for views in (None, np.arange(6)):
        (a, _), (b, _) = (stage.views(np.arange(6), views) for stage in stages)
        assert torch.equal(a, b)


def test_the_fingerprint_is_of_pixels(make, monkeypatch, tmp_path):
    """Not of the PNG files that are made of them, which another library makes otherwise."""
    pictures = [Image.open(io.BytesIO(make.picture(40 + i, 50, i))) for i in range(4)]
    register_dataset("mine", lambda split: Pairs(pictures, [0, 1, 0, 1]))
    first = load_dataset("mine", "train")
    monkeypatch.setattr(loaded, "_encode_png", lambda pixels: _file(Image.fromarray(pixels)))
    again = load_dataset("mine", "train", cache_dir=tmp_path / "other")
    assert again.pictures.read(0) != first.pictures.read(0)
    assert again.fingerprint == first.fingerprint
    pictures[2] = pictures[3]
    other = load_dataset("mine", "train", cache_dir=tmp_path / "third")
    assert other.fingerprint != first.fingerprint


def test_bytes_of_a_file_are_stored_as_they_are(make):
    data = [make.picture(40 + i, 50, i, "JPEG") for i in range(4)]
    register_dataset("mine", lambda split: Pairs(data, [0, 1, 0, 1]))
    got = load_dataset("mine", "test")
    assert [got.pictures.read(i) for i in range(4)] == data
    assert got.pictures.name(2) == "the image in row 2 of load('test') of mine"


def test_the_data_root_is_given_to_a_function_that_wants_it(arrays, tmp_path):
    seen = []

    def load(split, data_root):
        seen.append(data_root)
        return arrays[split]

    register_dataset("mine", load)
    check_dataset("mine", data_root=tmp_path)
    assert set(seen) == {tmp_path}


# ---- what is found out


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((28, 28), (False, 28, "crop_flip")),
        ((64, 64), (False, 64, "crop8_flip")),
        ((128, 128), (False, 128, "crop8_flip")),
        ((129, 129), (True, 224, "resized_crop")),
        ((40, 50), (True, 224, "resized_crop")),
    ],
)
def test_kind_and_size(shape, kind):
    images = np.random.default_rng(0).integers(0, 256, (6, *shape, 3), dtype=np.uint8)
    register_dataset("mine", lambda split: (images, [0, 1, 2] * 2))
    info = dataset_info("mine")
    assert (info.encoded, info.image_size, info.view_scheme) == kind
    assert (info.num_classes, info.num_train, info.class_names) == (3, 6, ("0", "1", "2"))
    assert load_dataset("mine", "train").encoded == info.encoded


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"view_scheme": "crop"}, (False, 40, "crop")),
        ({"view_scheme": "none"}, (False, 40, "none")),
        ({"view_scheme": "resized_crop"}, (True, 224, "resized_crop")),
        ({"image_size": 40}, (False, 40, "crop_flip")),
        ({"image_size": 48}, (True, 48, "resized_crop")),
        ({"image_size": 48, "view_scheme": "resized_crop"}, (True, 48, "resized_crop")),
    ],
)
def test_what_is_given_decides(given, kind):
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    register_dataset("mine", lambda split: (images, [0, 1, 0, 1]), **given)
    info = dataset_info("mine")
    assert (info.encoded, info.image_size, info.view_scheme) == kind


def test_mean_and_deviation_are_those_of_the_training_images(arrays):
    images = (arrays["train"][0] // [1, 2, 4]).astype(np.uint8)  # channels that differ
    register_dataset("mine", {"train": (images, arrays["train"][1]), "test": arrays["test"]}.get)
    info = dataset_info("mine")
    scaled = images / 255.0
    np.testing.assert_allclose(info.mean, scaled.mean((0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(info.std, scaled.std((0, 1, 2)), atol=6e-5)
    assert len(set(info.mean)) == 3
    register_dataset("given", arrays.get, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert dataset_info("given").mean == (0.5, 0.4, 0.3)


def test_a_channel_of_one_value_is_not_divided_by_nothing(arrays):
    images, labels = arrays["train"]
    flat = images.copy()
    flat[..., 1] = 7
    register_dataset("mine", {"train": (flat, labels), "test": arrays["test"]}.get)
    assert dataset_info("mine").std[1] == 1.0


def test_class_names(arrays):
    pairs = {split: Pairs(*found) for split, found in arrays.items()}
    for found in pairs.values():
        found.classes = [f"kind{i}" for i in range(10)]
    register_dataset("mine", pairs.get)
    assert dataset_info("mine").class_names[3] == "kind3"
    register_dataset("given", arrays.get, class_names=list("abcdefghij"))
    assert load_dataset("given", "test").class_names == tuple("abcdefghij")
    # An eleventh class that no picture has.
    register_dataset("more", arrays.get, num_classes=11)
    assert load_dataset("more", "train").num_classes == 11


# ---- stored once


@pytest.mark.parametrize("scheme", [None, "resized_crop"])
def test_load_is_called_once_for_each_split(arrays, builds, forget, monkeypatch, scheme):
    """By all processes of a machine; and a complete cache may be read-only."""
    load = Counted(arrays)
    register_dataset("mine", load, view_scheme=scheme)
    check_dataset("mine")
    for _ in range(2):
        dataset_info("mine")
        assert num_train("mine") == 30
        load_dataset("mine", "train")
        load_dataset("mine", "test")
        forget()
        monkeypatch.setattr(facts, "_known", {})  # as another process begins
        monkeypatch.setattr(facts, "locked", lambda path: pytest.fail("locked"))
    assert sorted(load.calls) == ["test", "train"]
    assert len(builds) == 2


def test_constants_that_are_all_given_need_no_look(arrays, monkeypatch):
    monkeypatch.setattr(facts, "_find_out", lambda *_: pytest.fail("looked"))
    load = Counted(arrays)
    register_dataset("mine", load, image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3,
                     view_scheme="crop", class_names=list("abcdefghij"))  # fmt: skip
    assert num_train("mine") == 30
    assert load.calls == ["train"]


def test_another_version_is_stored_anew(arrays, forget):
    load = Counted(arrays)
    for version in (1, 1, 2, 2):
        DATASETS.pop("mine", None)
        register_dataset("mine", load, version=version)
        load_dataset("mine", "train")
        forget()
    assert load.calls == ["train"] * 2


PLUGIN = """
import numpy as np
from ekd_ray.data import register_dataset
def load(split, data_root):
    images = np.load(data_root / "pixels.npy") + np.uint8({offset})
    return images, np.arange(len(images)) % 2
register_dataset("mine", load, files=["pixels.npy"], version={version})
"""


def test_what_is_stored_follows_plugin_version_and_files(make, tmp_path, builds, monkeypatch):
    pixels = make.images(8).transpose(0, 2, 3, 1)
    np.save(tmp_path / "pixels.npy", pixels)

    def fingerprint(**values):
        """As a process that begins with this plugin finds it."""
        for table in ("_loaded", "_parts"):
            monkeypatch.setattr(plugins, table, {})
        monkeypatch.setattr(plugins._finder, "modules", {})
        sys.modules.pop("my_data", None)
        DATASETS.pop("mine", None)
        (tmp_path / "my_data.py").write_text(PLUGIN.format(**{"offset": 0, "version": 1, **values}))
        plugins.load_plugin(str(tmp_path / "my_data.py"))
        return load_dataset("mine", "train", data_root=tmp_path).fingerprint

    first = fingerprint()
    assert fingerprint() == first and len(builds) == 1
    assert fingerprint(offset="00") == first and len(builds) == 2  # the content, not the code
    assert fingerprint(offset=1) != first and len(builds) == 3
    assert fingerprint(version=2) == first and len(builds) == 4
    np.save(tmp_path / "pixels.npy", pixels[:6])
    os.utime(tmp_path / "pixels.npy", ns=(1, 1))
    assert fingerprint() != first and len(builds) == 5
    (tmp_path / "elsewhere").mkdir()
    text = message(check_dataset, "mine", data_root=tmp_path / "elsewhere")
    assert "reads pixels.npy, which is not in" in text


# ---- what is refused


def _raise(error):
    raise error


GOOD = (np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 0, 1])
BAD = {
    "nothing": (lambda: None, "has no {split} split; load\\('{split}'\\) of mine must return"),
    "no rows": (lambda: (GOOD[0][:0], []), "has no {split} split"),
    "an empty dataset": (lambda: Pairs([], []), "has no {split} split"),
    "no such split": (
        lambda: _raise(KeyError("no split")),
        "load\\('{split}'\\) of mine failed in line \\d+ of .*test_registered.py \\(KeyError",
    ),
    "two numbers": (lambda: (7, 8), "must be uint8 \\[N, H, W, 3\\]"),
    "a number": (lambda: 7, "must return \\(images, labels\\) or a map-style dataset, got int"),
    "a generator": (lambda: iter([]), "map-style dataset, got list_iterator"),
    "floats": (lambda: (GOOD[0] / 255.0, GOOD[1]), "must be uint8 \\[N, H, W, 3\\].*got float64"),
    "channels first": (
        lambda: (GOOD[0].transpose(0, 3, 1, 2), GOOD[1]), "got uint8 \\[4, 3, 32, 32\\]"
    ),
    "too few labels": (
        lambda: (GOOD[0], [0, 1]), "labels .* must be integers \\[4\\], got int64 \\[2\\]"
    ),
    "names": (lambda: (GOOD[0], list("abab")), "labels .* must be integers"),
    "from one": (
        lambda: (GOOD[0], [1, 2, 1, 2]), "no training image with the label 0|label 2, but"
    ),
    "negative": (lambda: (GOOD[0], [-1, 0, 1, 0]), "label -1"),
    "one class": (lambda: (GOOD[0], [0] * 4), "two classes or more"),
    "giant label": (lambda: (GOOD[0], [0, 1, 0, 10**12]), "labels? (up to )?10{12}, but"),
    "giant label of a pair": (
        lambda: Pairs(GOOD[0], [0, 1, 0, 10**20]), "label 10{20}, but labels must be 0 to"
    ),
    "beyond int64": (
        lambda: (GOOD[0], np.array([0, 1, 0, 2**64 - 1], np.uint64)), "label 18446744073709551615,"
    ),
    "many sizes": (
        lambda: ([np.zeros((s, s, 3), np.uint8) for s in (8, 9)], [0, 1]), "a list of \\(picture"
    ),
    "two pairs as a tuple": (lambda: ((GOOD[0][0], 0), (GOOD[0][1], 1)), "a list of \\(picture"),
    "PIL of 32 bits": (
        lambda: Pairs([Image.fromarray(np.zeros((8, 8), np.float32))], [0]), "the mode 'F'"
    ),
    "PIL integers": (
        lambda: Pairs([Image.fromarray(np.zeros((8, 8), np.int32))], [0]), "the mode 'I'"
    ),
    "PIL of a torn file": (
        lambda: Pairs([Image.open(io.BytesIO(_file(Image.new("L", (32, 32)))[:50]))], [0]),
        "converted to RGB",
    ),
    "no pairs": (lambda: [1, 2, 3], "row 0 .* must come as \\(picture, label\\), got int"),
    "no picture": (lambda: Pairs(["x.png"], [0]), "row 0 .* must be a PIL image.*got str"),
    "normalised": (
        lambda: Pairs([torch.zeros(3, 8, 8)], [0]), "got float32 \\[3, 8, 8\\]; leave ToTensor"
    ),
    "half a label": (lambda: Pairs(GOOD[0][:1], [0.5]), "row 0 .* has the label 0.5"),
    "a broken file": (lambda: Pairs([b"no picture"], [0]), "row 0 .* is not a readable JPEG"),
    "a broken row": (
        lambda: type("Rows", (), {"__len__": lambda s: 3, "__getitem__": lambda s, i: [][i]})(),
        "row 0 of load\\('{split}'\\) of mine failed in line \\d+ .*IndexError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_data_is_refused_before_anything_is_computed(case, split):
    if case == "one class" and split == "test":
        pytest.skip("of the training split alone")
    make_bad, words = BAD[case]
    register_dataset("mine", lambda wanted: make_bad() if wanted == split else GOOD)
    text = refused("mine", split=split)
    assert re.search(words.replace("{split}", split), text), text


def test_pictures_must_suit_the_scheme():
    images = np.zeros((4, 32, 40, 3), np.uint8)
    register_dataset("mine", lambda split: (images, [0, 1, 0, 1]), view_scheme="crop")
    assert "squares of one size for the view scheme 'crop'" in refused("mine")
    small = {"train": GOOD, "test": (GOOD[0][:, :30, :30], GOOD[1])}
    register_dataset("other", small.get)
    text = message(check_dataset, "other")
    assert "row 0 of load('test') of other has 30x30 pixels, but other has 32x32" in text


def test_a_test_label_that_training_does_not_know():
    splits = {"train": GOOD, "test": (GOOD[0], [0, 1, 2, 0])}
    register_dataset("mine", splits.get)
    assert "row 2 of load('test') of mine has the label 2, but labels must be 0 to 1" in refused(
        "mine", split="test"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_classes": 1}, "num_classes of mine must be an integer from 2 to"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "got 3 and 2 names"),
        ({"class_names": ["a", "a"]}, "different strings"),
        ({"class_names": [1, 2]}, "different strings"),
        ({"num_classes": 0}, "num_classes of mine must be an integer from 2 to"),
        ({"num_classes": "3"}, "num_classes of mine must be an integer .* got '3'"),
        ({"num_classes": True}, "num_classes of mine must be an integer"),
        ({"num_classes": 10**12}, "num_classes of mine must be an integer"),
        ({"class_names": "dog"}, "class_names of mine must be a list of different strings"),
        ({"class_names": 7}, "class_names of mine must be a list of different strings, got 7"),
        ({"files": "d.npz"}, "files of mine must be a list of different strings, got 'd.npz'"),
        ({"files": [7]}, "files of mine must be a list"),
        ({"image_size": "32"}, "image_size of mine must be an integer .* got '32'"),
        ({"image_size": 32.5}, "image_size of mine must be an integer .* got 32.5"),
        ({"version": object()}, "version of mine must be an integer"),
        ({"mean": 0.5, "std": 0.2}, "three numbers each"),
        ({"mean": "abc", "std": "abc"}, "three numbers each"),
        ({"mean": (0.5, 0.5, float("nan")), "std": (0.2,) * 3}, "three numbers each"),
        ({"view_scheme": ["crop"]}, "view scheme|augment"),
        ({"image_size": 7}, "image_size of mine must be an integer from 8 to 1024, got 7"),
        ({"mean": (0.5,) * 3}, "mean and std of mine must be three numbers each"),
        ({"mean": (125.0,) * 3, "std": (60.0,) * 3}, r"on the \[0, 1\] scale"),
        ({"mean": (0.5,) * 3, "std": (0.0,) * 3}, "std > 0"),
        ({"mean": (0.5,), "std": (0.2,)}, "three numbers each"),
        ({"view_scheme": "crop_flop"}, "Did you mean 'crop_flip'"),
    ],
)
def test_constants_out_of_bounds(given, words):
    text = message(register_dataset, "mine", lambda split: GOOD, **given)
    assert re.search(words, text), text
    assert "mine" not in DATASETS


def test_constants_of_numpy_and_paths_are_taken():
    mean = np.array((0.5, 0.4, 0.3))
    info = register_dataset("mine", lambda split: GOOD, num_classes=np.int64(2), mean=mean,
                            std=mean / 2, files=[Path("a") / "b.npz"])  # fmt: skip
    assert (info.mean, info.load_files) == ((0.5, 0.4, 0.3), ("a/b.npz",))
    assert type(info.num_classes) is int


@pytest.mark.parametrize("load", [
    lambda: GOOD, lambda data_root: GOOD, lambda split, root: GOOD, lambda *, split: GOOD,
])  # fmt: skip
def test_what_load_must_take(load):
    assert "must take the split" in message(register_dataset, "mine", load)
    assert "mine" not in DATASETS


@pytest.mark.parametrize("load", [
    {}.get, lambda *a: GOOD, lambda split, **more: GOOD, lambda split, other=3: GOOD, Counted({}),
    functools.partial(lambda more, split: GOOD, 3),
])  # fmt: skip
def test_what_load_may_take(load):
    register_dataset("mine", load)


@pytest.mark.parametrize("name", ["", "folder:x", "a/b", "..", "-x", 3, None, "two words"])
def test_names(name):
    assert "letters, digits" in message(register_dataset, name, lambda split: GOOD)


def test_a_name_is_taken_once(arrays):
    assert "there is a data set 'cifar10' already" in message(
        register_dataset, "cifar10", arrays.get
    )
    assert "must be a function" in message(register_dataset, "mine", arrays)
    register_dataset("mine", arrays.get)
    assert "there is a data set 'mine' already" in message(register_dataset, "mine", arrays.get)


# ---- the conformance suite


def _random_flip(images, labels):
    draw = np.random.default_rng()
    return images[draw.permutation(len(images))], labels


_COLOURS = np.arange(30, dtype=np.uint8)[:, None, None, None]
UNFIT = {
    "random": (lambda a: {**a, "train": _random_flip(*a["train"])}, "whenever it is read"),
    "leaking": (lambda a: {**a, "test": a["train"]}, "are training pictures too"),
    "one picture": (
        lambda a: {**a, "train": tuple(x[:11] for x in a["train"])}, "two training images"
    ),
    "blank": (
        lambda a: {**a, "train": (a["train"][0] * 0 + _COLOURS, a["train"][1])}, "of one colour"
    ),
    "copies": (
        lambda a: {**a, "train": (a["train"][0][[3] * 30], a["train"][1])}, "are copies of 1"
    ),
    "no test picture of a class": (
        lambda a: {**a, "test": tuple(x[:7] for x in a["test"])}, "has none of 7, 8, 9"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_the_suite_finds(arrays, case):
    change, words = UNFIT[case]
    register_dataset("mine", lambda split: change(arrays)[split])
    with pytest.raises(AssertionError, match=words):
        check_conformance("mine")


def test_far_statistics_fail_the_suite(arrays):
    register_dataset("mine", arrays.get, mean=(0.05,) * 3, std=(0.3,) * 3)
    with pytest.raises(AssertionError, match="near those of its training images"):
        check_conformance("mine")


@pytest.mark.parametrize("name", ["digits", "synthetic", "cifar10", "folder", "mine"])
def test_the_suite_passes(name, arrays, hub, make, tmp_path):
    if name == "folder":
        files = {
            f"{side}/{'ab'[i % 2]}/{i}.png": make.picture(40 + i, 50, 10 * j + i)
            for j, side in enumerate(("train", "val")) for i in range(6)
        }  # fmt: skip
        name = f"folder:{make.tree(tmp_path / 'tree', files)}"
    register_dataset("mine", arrays.get)
    check_conformance(name, data_root=hub)
