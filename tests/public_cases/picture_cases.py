"""Pictures that are not what they seem, and data that are incomplete or change meanwhile."""

from __future__ import annotations

import functools
import io
import json
import os
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cases import Answer, Case, Hands
from launchers_run import command
from PIL import Image

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import check_dataset, load_dataset, scan
from ekd_ray.data.decode import decode_any, decode_view, picture_size
from ekd_ray.data.views import crop_bits
from ekd_ray.engine.data_pin import pin_data
from ekd_ray.engine.resolve import check_images, describe_images, left_out, resolve, split_sizes
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import split_ids
from ekd_ray.errors import OtherData, UserError
from ekd_ray.results.records import FAILURE, RunRecord
from ekd_ray.scale.worker import TrainOptions, train_run
from ekd_ray.studies.fitting import fit_values
from ekd_ray.studies.pipeline import open_run

Files = dict[str, bytes]
PICTURES, DATA = "pictures", "data"


def picture(seed: int = 0, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels).convert(mode), kind, **options)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def grey16() -> bytes:
    ramp = np.linspace(0, 65535, 24 * 24).astype(np.uint16).reshape(24, 24)
    return saved(Image.fromarray(ramp), "PNG")


def floats() -> bytes:
    return saved(Image.fromarray(np.zeros((24, 24), np.float32)), "TIFF")


def giant() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(picture(51, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def spoilt() -> bytes:
    """A PNG with both its ends, and noise between."""
    data = bytearray(picture(52, "PNG"))
    data[60:200] = bytes(140)
    return bytes(data)


def folder(hands: Hands, added: Files = {}, gone: tuple[str, ...] = ()) -> str:  # noqa: B006
    """Two classes of ten training and two test pictures, with what is `added` and `gone`."""
    files = {
        f"{side}/{name}/{i:02d}.jpg": picture(100 * place + i)
        for place, (side, name, count) in enumerate(
            [("train", "cat", 10), ("train", "dog", 10), ("test", "cat", 2), ("test", "dog", 2)]
        )
        for i in range(count)
    }
    for name, data in (files | added).items():
        if not name.startswith(gone or "/"):
            path = hands.folder / "pets" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return f"folder:{hands.folder / 'pets'}"


def answer(call: Callable[[], list[str]]) -> Answer:
    try:
        return Answer(0, "\n".join(call()))
    except UserError as error:
        return Answer(2, str(error))


def look(
    hands: Hands, added: Files = {}, gone: tuple[str, ...] = (), sample: int = 500, **settings: bool  # noqa: B006
) -> Answer:  # fmt: skip
    """The words of the plan on such a folder, or the refusal."""
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    hands.patch.setattr(scan, "_SAMPLE", sample)
    config = DistillConfig(dataset=folder(hands, added, gone), image_size=24, **settings)

    def plan() -> list[str]:
        check_dataset(config.dataset)
        check_images(config, None)
        return describe_images(config, None)

    return answer(plan)


def seen(name: str, data: bytes, *words: str, code: int = 0, **options: Any) -> Case:
    """A row with one more training picture of cats."""
    path = f"train/cat/{options.pop('path', 'odd.png')}"
    hand_in = functools.partial(look, added={path: data}, **options)
    return Case(PICTURES, name, hand_in, code, words)


def like_others(kind: str, path: str, **options: Any) -> Case:
    """A row with a picture of this kind, which trains as the others do."""

    def hand_in(hands: Hands) -> Answer:
        data = picture(1, kind, **options)
        found = look(hands, {f"train/cat/{path}": data})
        arrays = load_dataset(f"folder:{hands.folder / 'pets'}", "train")
        assert len(arrays) == 21 and "skipped" not in found.text
        (index,) = [i for i in range(21) if str(arrays.pictures.path(i)).endswith(path)]
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode_any(arrays.pictures.read(index), "it"), want)
        return found

    return Case(PICTURES, kind.lower(), hand_in)


def upright(hands: Hands) -> Answer:
    """A photo that lies on its side is turned: in training, as `predict` reads it, and its crop."""
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    rng = np.random.default_rng(3)
    shown = Image.fromarray(rng.integers(0, 256, (40, 24, 3), dtype=np.uint8))
    stored = shown.transpose(Image.Transpose.ROTATE_90)  # what a camera saves
    data, plain = saved(stored, "PNG", exif=exif), saved(shown, "PNG")
    np.testing.assert_array_equal(decode_any(data, "it"), np.asarray(shown))
    assert picture_size(data, "it") == (24, 40)
    bits = crop_bits(np.array([5]), np.array([3]), seed=7)[0]
    for some in (None, bits):
        np.testing.assert_array_equal(
            decode_view(data, "it", 16, some), decode_view(plain, "it", 16, some)
        )
    return look(hands, {"train/cat/x.png": data})


def leave_out(hands: Hands) -> Answer:
    """Neither training nor validation has them, and the sizes of the plan are those."""
    copies = {"train/dog/copy.jpg": picture(200), "train/cat/twice.jpg": picture(0)}
    added = {"train/cat/cut.jpg": picture(7)[:300], "test/cat/cut.jpg": picture(7)[:300], **copies}
    found = look(hands, added, skip_damaged=True, exclude_duplicates=True)
    config = DistillConfig(
        dataset=f"folder:{hands.folder / 'pets'}", skip_damaged=True, exclude_duplicates=True,
        validation_fraction=0.2,
    )  # fmt: skip
    arrays = load_dataset(config.dataset, "train")
    kept = np.concatenate(split_ids(config, arrays.labels))
    names = {Path(str(arrays.pictures.path(i))).name for i in kept}
    assert len(kept) == sum(split_sizes(config)) == 20
    assert not names & {"cut.jpg", "copy.jpg", "twice.jpg"}
    assert len(left_out(config, "test", None)) == 1
    return found


def emptied(*names: str, copies: bool = False) -> Callable[[Hands], Answer]:
    """All pictures of these folders are damaged, or also lie in another place."""

    def hand_in(hands: Hands) -> Answer:
        files = {f"{name}/{i:02d}.jpg": b"x" for name in names for i in range(10)}
        if not copies:
            return look(hands, files, skip_damaged=True)
        same = {f"test/cat/copy{i}.jpg": picture(i) for i in range(10)}  # of train/cat
        return look(hands, same, exclude_duplicates=True)

    return hand_in


def fitted(hands: Hands) -> Answer:
    """A recipe's rules count what is used."""
    added = {"train/cat/cut.jpg": picture(7)[:300], "train/cat/twice.jpg": picture(0)}
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    chosen = {"dataset": folder(hands, added), "skip_damaged": True, "exclude_duplicates": True}
    found = fit_values({"distill": chosen}, {"validation_fraction": {}}, given=(), data_root=None)
    return Answer(0, "\n".join(found["distill"]["fitted"]))


def ramp(hands: Hands) -> Answer:
    pixels = decode_any(grey16(), "it")[..., 0].ravel()
    assert pixels[0] == 0 and pixels[-1] == 255 and abs(int(pixels[288]) - 128) <= 1
    return look(hands, {"train/cat/deep.png": grey16()})


def looked_once(hands: Hands) -> Answer:
    """The second look reads the cache; a picture that was written over is looked at again."""
    first = look(hands)
    looked: list[int] = []
    hands.patch.setattr(scan, "_known", {})
    real = scan._see
    hands.patch.setattr(scan, "_see", lambda *args: (looked.append(1), real(*args))[1])
    config = DistillConfig(dataset=f"folder:{hands.folder / 'pets'}", image_size=24)
    assert describe_images(config, None) == []
    for size, way in ((32, "enlarged"), (16, "reduced")):
        (text,) = describe_images(config.replace(image_size=size), None)
        assert "of 24 pixels" in text and f"{way} to {size}" in text
    assert not looked
    (kept,) = (hands.folder / "cache").rglob("*-scan-*.json")
    kept.write_text('{"scan": {"images": {}, "damaged": {}}, "sha256": ""}')  # what we never write
    hands.patch.setattr(scan, "_known", {})
    assert describe_images(config, None) == []
    assert looked
    path = hands.folder / "pets/train/cat/03.jpg"
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    hands.patch.setattr(scan, "_known", {})
    config = DistillConfig(dataset=f"folder:{hands.folder / 'pets'}")
    assert first.code == 0
    return answer(lambda: [check_images(config, None) or ""])


def notes_beside(hands: Hands) -> Answer:
    """Boxes, licences and lists beside pictures are none that somebody meant to train on."""
    found = look(hands, {"train/cat/boxes.txt": b"x", "train/cat/00.xml": b"x"})
    assert "skipped" not in found.text, found
    return found


def planned(hands: Hands, *flags: str) -> Answer:
    name = folder(hands, {"train/cat/cut.jpg": picture(7)[:300], "train/cat/x.heic": b"x"})
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    given = ("--student", "resnet8", "--method", "none", "--set", "batch_size=4", *flags)
    return hands.launch("distill", "--dataset", name, *given, "--epochs", "1", "--dry-run")


def unlisted(hands: Hands) -> Answer:
    """Tiny ImageNet, whose list of labels names a picture that is not there."""
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    root, lines = hands.folder / "tiny-imagenet-200", []
    (root / "val/images").mkdir(parents=True)
    for i in range(200):
        name = f"n{i:08d}"
        (root / f"train/{name}/images").mkdir(parents=True)
        (root / f"train/{name}/images/a.JPEG").write_bytes(b"x")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
        if i != 7:
            (root / f"val/images/val_{i}.JPEG").write_bytes(b"x")
    (root / "val/val_annotations.txt").write_text("".join(lines))

    def check() -> list[str]:
        check_dataset("tiny_imagenet", data_root=hands.folder)
        return []

    return answer(check)


# ---- data


def shard(path: Path, rows: int, names: int = 10) -> None:
    images = pa.array([{"bytes": picture(i, "PNG"), "path": ""} for i in range(rows)])
    table = pa.table({"img": images, "label": [i % names for i in range(rows)]})
    label = {"names": [f"c{i}" for i in range(names)], "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}, "label": label}
    head = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(head), path)


def shards(
    hands: Hands, name: str, files: dict[str, int], card: object = None, **of: int
) -> Answer:
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    for file, rows in files.items():
        shard(hands.folder / "cifar10" / file, rows, **of)
    if card:
        text = f"---\n{yaml.safe_dump({'dataset_info': card})}---\n# Words\n"
        (hands.folder / "cifar10" / "README.md").write_text(text)

    def check() -> list[str]:
        check_dataset(name.format(hands.folder), data_root=hands.folder)
        return []

    return answer(check)


ONE = {"train-00000-of-00001.parquet": 20, "test-00000-of-00001.parquet": 10}
TORN = {"train-00000-of-00002.parquet": 9, "test-00000-of-00001.parquet": 9}
CARD = {"splits": [{"name": "train", "num_examples": 50}, {"name": "test", "num_examples": 10}]}
TRUE = {"splits": [{"name": "train", "num_examples": 20}, {"name": "test", "num_examples": 10}]}


def small(hands: Hands, dataset: str) -> DistillConfig:
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    return DistillConfig(
        dataset=dataset, student="resnet8", method="none", batch_size=4, image_size=24,
        validation_fraction=0.2,
    )  # fmt: skip


def resumed(
    hands: Hands, change: Callable[[Path], object], older: bool = False, added: Files = {}  # noqa: B006
) -> Answer:  # fmt: skip
    """A study's folder opened again, after its pictures have changed."""
    base = small(hands, folder(hands, added))
    config, out = StudyConfig(distill=base, space={"lr": {"low": 0.01, "high": 0.1}}), Path("run")
    open_run(out.absolute(), config, resume=False)
    file = out / "study.yaml"
    if older:
        header = yaml.safe_load(file.read_text())
        del header["data"], header["checksum"]  # it had neither
        file.write_text(yaml.safe_dump(header))
    before = file.read_bytes()
    change(hands.folder / "pets")

    def again() -> list[str]:
        open_run(out.absolute(), config, resume=True)
        return ["opened"]

    found = answer(again)
    assert found.code == 0 or file.read_bytes() == before
    return found


def add(name: str) -> Callable[[Path], object]:
    return lambda pets: (pets / name).write_bytes(picture(999))


def overwrite(name: str, where: int = 200) -> Callable[[Path], object]:
    """Another byte in the picture, in place: the times of its folders stay."""

    def change(pets: Path) -> None:
        with open(pets / name, "r+b") as file:
            file.seek(where)
            byte = file.read(1)
            file.seek(where)
            file.write(bytes([byte[0] ^ 1]))

    return change


def touch(pets: Path) -> None:
    for path in (pets / "train").rglob("*.jpg"):
        os.utime(path)


def trial_elsewhere(hands: Hands) -> Answer:
    """A trial on a node whose picture is another than that of the node that began the study."""
    config = small(hands, folder(hands))
    pin = pin_data(config, None)
    options = TrainOptions(data_root=None, threads=1, pin=pin)
    final = RunRecord(  # trains on all, and validates on none
        folder=hands.folder / "final", stage=RunStage.FINAL, name="x",
        config=resolve(config.replace(validation_fraction=0.0, epochs=1)).to_dict(),
    )  # fmt: skip
    final.folder.mkdir()
    assert train_run(final, print, options=options) is not None
    overwrite("train/dog/04.jpg")(hands.folder / "pets")
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache of the node"))
    run = RunRecord(
        folder=hands.folder / "trial", stage=RunStage.SEARCH, name="trial 0", number=0,
        config=resolve(config).to_dict(),
    )  # fmt: skip
    run.folder.mkdir()
    with pytest.raises(OtherData) as stopped:
        train_run(run, print, options=options)
    assert not (run.folder / "history.jsonl").exists() and not (run.folder / FAILURE).exists()
    return Answer(2, str(stopped.value))


def run_again(hands: Hands, change: Callable[[Path], object], *, teacher: bool = False) -> Answer:
    """A single training, which is continued after its pictures have changed."""
    hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
    settings = ("batch_size=4", "image_size=24", "validation_fraction=0.2")
    given = ["--dataset", folder(hands), "--epochs", "1", "--out", "run"]
    given += [word for setting in settings for word in ("--set", setting)]
    name = "train-teacher" if teacher else "distill"
    given += ["--model", "resnet8"] if teacher else ["--student", "resnet8", "--method", "none"]
    begun = command(name, *given)
    assert begun.returncode == 0, begun
    (hands.folder / "run/result.json").unlink()  # as if it had been killed
    change(hands.folder / "pets")
    done = command(name, *given, "--resume")
    return Answer(done.returncode, done.stdout + done.stderr)


def rename_class(pets: Path) -> None:
    for side in ("train", "test"):
        (pets / side / "cat").rename(pets / side / "zebra")  # labels change places


BITMAP = {"train/cat/x.bmp": saved(Image.new("RGB", (200, 200), "navy"), "BMP")}
UMLAUT = "k\u00e4fer"
APART = unicodedata.normalize("NFD", UMLAUT)

CASES = [
    Case(PICTURES, "16 bits", ramp, words=("16 bits", "deep.png")),
    like_others("TIFF", "x.tif"),
    like_others("GIF", "x.gif"),
    like_others("BMP", "x.BMP"),
    like_others("WEBP", "x.webp", lossless=True),
    seen("pages of a tiff", animated("TIFF"), "several frames", "first", path="x.tiff"),
    seen("animated gif", animated("GIF"), "several frames", path="x.gif"),
    seen("tiff of floats", floats(), "x.tif", "32 bits", code=2, path="x.tif"),
    seen("heic", b"x", "1 .heic", "skipped", path="x.heic"),
    Case(PICTURES, "notes", notes_beside),
    seen("cmyk", picture(1, mode="CMYK"), "CMYK", "RGB", path="x.jpg"),
    seen("palette", picture(1, "PNG", "P", transparency=3), "transparency"),
    seen("rgba", picture(1, "PNG", "RGBA"), "transparency"),
    Case(PICTURES, "turned", upright, words=("EXIF orientation", "turned as it says")),
    seen("animated png", animated("PNG"), "several frames", "first"),
    seen("animated webp", animated("WEBP"), "several frames", path="x.webp"),
    seen("other ending", picture(60, "PNG"), path="x.jpg"),
    seen("cut jpeg", picture(61)[:300], "x.jpg", "--skip-damaged", code=2, path="x.jpg", sample=1),
    seen("cut png", picture(61, "PNG")[:300], "odd.png", code=2, sample=1),
    seen("spoilt, sample", spoilt(), sample=1, path="zz.png"),
    seen("spoilt, all", spoilt(), "zz.png", code=2, sample=1, path="zz.png", check_images=True),
    seen("giant", giant(), "odd.png", "exceeds", code=2),
    seen("html", b"<html>404", "odd.png", code=2),
    seen("empty file", b"", "odd.png", "of 25", "UnidentifiedImage", code=2, sample=1),
    seen("Thumbs.db", b"x", path="Thumbs.db"),
    Case(PICTURES, "left out", leave_out, words=("damaged picture", "left out", "a test picture")),
    Case(PICTURES, "a class that would be left out", emptied("train/cat"), 2, ("1 of 2", "'cat'")),
    Case(PICTURES, "a class that is in test", emptied(copies=True), 2, ("all train", "'cat'")),
    Case(PICTURES, "all that would be left out", emptied("train/cat", "train/dog"), 2,
         ("2 of 2",)),
    Case(PICTURES, "a test that would be left out", emptied("test/cat", "test/dog"), 2,
         ("all test", "2 of 2")),
    Case(PICTURES, "a class of test that is left out", emptied("test/cat"), 0, ("left out",)),
    Case(PICTURES, "left out of rules", fitted, words=("of 20 pictures validate",)),
    Case(PICTURES, "looked once", looked_once, 2, ("03.jpg",)),
    Case(PICTURES, "refused by a plan", planned, 2, ("cut.jpg", "--skip-damaged")),
    Case(
        PICTURES, "left out by a plan", lambda hands: planned(hands, "--skip-damaged"), 0,
        ("cut.jpg", "left out", "1 .heic"),
    ),
    Case(PICTURES, "empty class", functools.partial(
            look, added={"train/cat/x.heic": b"x"}, gone=("train/cat/0",)
        ), 2, ("cat",)),
    Case(
        PICTURES, "class without test pictures",
        functools.partial(look, gone=("test/cat/0",), added={"test/cat/x.heic": b"x"}), 0,
        ("1 of 2 classes", "test picture", "cat", "1 .heic"),
    ),
    Case(
        PICTURES, "class in test alone", functools.partial(look, added={"test/fox/a.jpg": b"x"}), 2,
        ("fox",),
    ),
    Case(
        PICTURES, "class by case",
        functools.partial(look, added={"test/Cat/a.jpg": picture(5)}, gone=("test/cat",)), 2,
        ("case", "Cat"),
    ),
    Case(
        PICTURES, "class by Unicode form",
        functools.partial(
            look,
            added={f"train/{UMLAUT}/a.jpg": picture(5), f"test/{APART}/a.jpg": picture(6)},
        ),
        2, ("Unicode form",),
    ),
    Case(
        PICTURES, "two that look the same",
        functools.partial(
            look,
            added={f"train/{name}/a.jpg": picture(5) for name in (UMLAUT, APART)},
        ),
        2, ("look the same",),
    ),
    Case(
        PICTURES, "two by case",
        functools.partial(
            look,
            added={f"{s}/Cat/a.jpg": picture(5 + len(s)) for s in ("train", "test")},
        ),
        0, ("by case alone", "Cat, cat"),
    ),
    Case(
        PICTURES, "in train and test",
        functools.partial(look, added={"train/cat/copy.jpg": picture(200)}), 0,
        ("1 repeats a test picture", "--exclude-duplicates"),
    ),
    Case(
        PICTURES, "under two labels",
        functools.partial(look, added={"train/dog/copy.jpg": picture(0)}), 0,
        ("1 repeats an earlier training picture", "1 under another label"),
    ),
    Case(
        PICTURES, "in no class", functools.partial(look, added={"train/lone.jpg": picture(5)}), 0,
        ("lone.jpg", "no class folder"),
    ),
    Case(PICTURES, "label without picture", unlisted, 2, ("val_7.JPEG",)),
    Case(
        DATA, "CIFAR of fewer rows",
        lambda hands: shards(hands, "cifar10", ONE), 2, ("20 rows", "50,000"),
    ),
    Case(
        DATA, "a shard missing",
        lambda hands: shards(hands, "cifar10", TORN),
        2, ("train-00001-of-00002",),
    ),
    Case(
        DATA, "CIFAR of other classes",
        lambda hands: shards(hands, "cifar10", ONE, names=9), 2, ("9 classes",),
    ),
    Case(
        DATA, "fewer rows than the card says",
        lambda hands: shards(hands, "hf:{}/cifar10", ONE, CARD), 2, ("20 rows", "50", "README.md"),
    ),
    Case(
        DATA, "as many rows as the card says",
        lambda hands: shards(hands, "hf:{}/cifar10", ONE, [TRUE | {"config_name": "plain"}]),
    ),
    Case(
        DATA, "another training picture",
        lambda hands: resumed(hands, add("train/cat/new.jpg")), 2,
        ("train images", "20 images there and 21 here"),
    ),
    Case(
        DATA, "another test picture",
        lambda hands: resumed(hands, add("test/dog/new.jpg")), 2, ("test images", "4 images"),
    ),
    Case(
        DATA, "a training picture written over",
        lambda hands: resumed(hands, overwrite("train/cat/03.jpg")), 2,
        ("train images", "other data", "as many images"),
    ),
    Case(
        DATA, "a test picture written over",
        lambda hands: resumed(hands, overwrite("test/cat/01.jpg")), 2, ("test images",),
    ),
    Case(
        DATA, "the midst of a large bitmap written over",
        lambda hands: resumed(hands, overwrite("train/cat/x.bmp", 60_000), added=BITMAP), 2,
        ("train images",),
    ),
    Case(DATA, "new times alone", lambda hands: resumed(hands, touch), 0, ("opened",)),
    Case(DATA, "a trial elsewhere", trial_elsewhere, 2, ("train images", "the same data")),
    Case(
        DATA, "a single training", lambda hands: run_again(hands, overwrite("train/cat/03.jpg")), 2,
        ("other data", "train images"),
    ),
    Case(
        DATA, "a teacher's training",
        lambda hands: run_again(hands, add("test/dog/new.jpg"), teacher=True), 2,
        ("test images", "4 images there and 5 here"), slow=True,
    ),
    Case(DATA, "a single training on the same data", lambda hands: run_again(hands, touch)),
    Case(DATA, "other labels", lambda hands: resumed(hands, rename_class), 2, ("of other labels",)),
    Case(DATA, "the same data", lambda hands: resumed(hands, lambda pets: None), 0, ("opened",)),
    Case(
        DATA, "a study of an older release",
        lambda hands: resumed(hands, add("train/cat/new.jpg"), older=True), 0, ("opened",),
    ),
]  # fmt: skip
