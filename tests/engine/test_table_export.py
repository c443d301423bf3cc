"""A teacher's table as a file: what is in it, and that its rules make the views."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ekd_ray.engine.teacher.table as tables
from ekd_ray.data import load_dataset, stage_images
from ekd_ray.data.decode import decode_view
from ekd_ray.data.drawn_views import DrawnViews
from ekd_ray.data.strong_views import strong_augment, strong_base_views, strong_draws
from ekd_ray.data.views import apply_views, crop_bits
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import strong_images
from ekd_ray.engine.teacher.source import table_spec
from ekd_ray.engine.teacher.table import RowFormat, TableSpec, open_table
from ekd_ray.engine.teacher.table_export import describe_views, export_table
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method

FACTS = {
    "teacher": "resnet8", "teacher_sha256": "ab" * 32, "normalization": "0,0,0/1,1,1",
    "precision": "float32", "dataset": "folder:/home/me/cats", "data_fingerprint": "cd" * 8,
    "view_scheme": "crop_flip", "image_size": 32, "strong": False, "view_seed": None,
}  # fmt: skip
SAMPLES, VIEWS = np.array([0, 2, 2, 3]), np.array([161, 0, 7, 80])


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A table of 4 samples with 4 of 648 rows written, and their logits: (table, logits)."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "CHECKED_ROWS", 3)  # in two parts

    def make(top=None):
        row_format = RowFormat(num_classes=10, top=top)
        spec = TableSpec(num_samples=4, num_views=162, row_format=row_format, facts=FACTS)
        table = open_table(spec)
        logits = 5 * torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        order = [2, 0, 3, 1]  # not in that of the file
        rows = row_format.encode(logits).numpy().view(np.uint16)
        table.write(SAMPLES[order], VIEWS[order], rows[order])
        return table, logits

    return make


def read(path):
    """(columns, metadata) of either form, by its own library."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        columns = {
            name: np.stack(table[name].to_numpy()) if name in ("logits", "classes")
            else table[name].to_numpy()
            for name in table.column_names
        }  # fmt: skip
        return columns, json.loads(table.schema.metadata[b"ekd_ray"])
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
            file.metadata()["ekd_ray"]
        )


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_file_holds_the_written_rows_in_order(filled, tmp_path, suffix):
    table, logits = filled()
    path = tmp_path / f"labels.{suffix}"
    assert export_table(table.folder, path) == 4
    columns, about = read(path)
    assert {name: values.dtype.name for name, values in columns.items()} == {
        "image": "int32", "view": "int32", "logits": "float16",
    }  # fmt: skip
    assert (columns["image"].tolist(), columns["view"].tolist()) == (
        SAMPLES.tolist(), VIEWS.tolist(),
    )  # fmt: skip
    assert np.array_equal(columns["logits"], logits.numpy().astype(np.float16))
    assert about.pop("views")["padding"] == 4
    assert about == {
        "format_version": 1, "teacher": "resnet8", "teacher_sha256": "ab" * 32,
        "teacher_normalization": "0,0,0/1,1,1", "precision": "float32", "dataset": "cats",
        "data_fingerprint": "cd" * 8, "split": "train", "num_images": 4, "num_classes": 10,
        "top": None,
    }  # fmt: skip
    assert b"/home/me" not in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_table_of_the_largest_logits_keeps_their_classes_and_the_rest(filled, tmp_path, suffix):
    table, logits = filled(top=3)
    export_table(table.folder, tmp_path / f"labels.{suffix}")
    columns, about = read(tmp_path / f"labels.{suffix}")
    assert about["top"] == 3
    whole = np.repeat(columns["rest"][:, None], 10, axis=1).astype(np.float32)
    np.put_along_axis(whole, columns["classes"].astype(np.int64), columns["logits"], axis=1)
    assert np.array_equal(whole, table.spec.row_format.rounded(logits).numpy())


def test_a_damaged_row_is_left_out(filled, tmp_path):
    table, _ = filled()
    with open(table.folder / "rows.bin", "r+b") as file:
        file.seek(20 * (2 * 162 + 7))
        file.write(b"\1\2")
    assert export_table(table.folder, tmp_path / "labels.parquet") == 3
    assert read(tmp_path / "labels.parquet")[0]["view"].tolist() == [161, 0, 80]


def test_what_cannot_be_exported_is_one_sentence(filled, tmp_path):
    table, _ = filled()
    (tmp_path / "mine.parquet").write_text("years of work")
    for out, words in (("labels.csv", "is exported to .parquet or"), ("mine.parquet", "exists")):
        with pytest.raises(UserError, match=words):
            export_table(table.folder, tmp_path / out)
    assert (tmp_path / "mine.parquet").read_text() == "years of work"
    (table.folder / "words.bin").write_bytes(bytes(4 * 4 * 162))
    with pytest.raises(UserError, match="has no rows yet: fill it first"):
        export_table(table.folder, tmp_path / "labels.parquet")


# The rules, followed to the word


@pytest.mark.parametrize("scheme", ["crop_flip", "crop8_flip", "crop", "none"])
def test_the_rule_of_listed_views_makes_them(scheme):
    """With numpy alone."""
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    about = describe_views(
        TableSpec(
            num_samples=1, num_views=1, row_format=RowFormat(num_classes=2),
            facts={**FACTS, "view_scheme": scheme},
        )
    )  # fmt: skip
    pad = about.get("padding", 0)
    s = 2 * pad + 1
    padded = np.pad(images[0], ((0, 0), (pad, pad), (pad, pad)))
    last = s * s * (2 if about.get("flip") else 1) - 1
    for view in {0, last // 2, last // 3, last}:
        mirrored, dy, dx = view // s**2, view // s % s, view % s
        cut = padded[:, dy : dy + 32, dx : dx + 32]
        cut = cut[:, :, ::-1] if mirrored else cut
        made = apply_views(torch.from_numpy(images), torch.tensor([view]), scheme)[0]
        assert np.array_equal(cut, made.numpy())


def test_the_rule_of_a_pool_of_crops_makes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    files = []
    for split in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            path = tmp_path / "pictures" / split / name / "one.png"
            path.parent.mkdir(parents=True)
            noise = np.random.default_rng(index).integers(0, 256, (50 + 9 * index, 70, 3), np.uint8)
            Image.fromarray(noise).save(path)
            files.append(path)
    arrays = load_dataset(f"folder:{tmp_path / 'pictures'}", "train")
    stage = stage_images(arrays, "cpu", scheme="resized_crop", image_size=24, pool=6, seed=5)
    facts = {**FACTS, "view_scheme": "resized_crop", "image_size": 24, "view_seed": 5}
    about = describe_views(
        TableSpec(num_samples=2, num_views=6, row_format=RowFormat(num_classes=2), facts=facts)
    )
    assert (about["seed"], about["image_size"], about["count"]) == (5, 24, 6)
    for image, view in ((0, 0), (1, 5)):
        bits = crop_bits([image], [view], about["seed"])[0]
        made = decode_view(files[image].read_bytes(), "it", about["image_size"], bits)
        there = stage.views(np.array([image]), np.array([view]))[0][0]
        assert np.array_equal(made, there.numpy())


def test_the_rule_of_strong_views_makes_them(tiny, with_teacher, run_data):
    config = resolve(with_method(tiny(view_seed=3), "mlkd", **with_teacher))
    data = run_data(config)
    about = describe_views(table_spec(config, data, precision="float32", strong=True))
    images = torch.from_numpy(load_dataset("synthetic", "train").images[[4]])
    base = strong_base_views([4], [11], seed=about["seed"], num_views=about["base_count"])
    view = apply_views(images, torch.from_numpy(base), about["scheme"])
    made = strong_augment(view, strong_draws([4], [11], seed=about["seed"]))
    assert torch.equal(made, strong_images(config, data, np.array([4]), np.array([11])))


def test_the_rule_of_drawn_views_makes_them(tiny, with_teacher, run_data):
    mixed = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "view_pool": 7, "view_seed": 3}
    config = resolve(with_method(tiny(**mixed), "kd", **with_teacher))
    data = run_data(config)
    about = describe_views(table_spec(config, data, precision="float32"))
    assert (about["count"], about["base_count"], about["strong"]) == (7, 162, False)
    ids = np.array([data.train_ids[0]]), np.array([5])
    views = DrawnViews(
        config=config, base_views=about["base_count"], image_size=about["image_size"],
        num_classes=data.num_classes, partners=data.train_ids,
    )  # fmt: skip
    assert about["drawn_views"] == views.facts
    below, bases = views.below(*ids)
    images = torch.from_numpy(load_dataset("synthetic", "train").images[below])
    pictures = apply_views(images, torch.from_numpy(bases), about["scheme"])
    made, _, _ = views.finish(pictures, data.images.labels[below], *ids)
    assert torch.equal(made, data.views(*ids))
