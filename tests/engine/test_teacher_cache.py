"""The teacher's table on disk: what is trusted, what is not, and what happens to a bad folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import ekd_ray.engine.teacher.source as teachers
import ekd_ray.engine.teacher.table as cache
from ekd_ray.engine.teacher.source import affordable
from ekd_ray.engine.teacher.table import (
    RowFormat,
    TableSpec,
    find_table,
    list_tables,
    open_table,
    read_spec,
)
from ekd_ray.errors import UserError

FACTS = {"teacher": "resnet8", "dataset": "synthetic", "strong": False, "view_seed": None}
SPEC = TableSpec(num_samples=12, num_views=5, row_format=RowFormat(num_classes=7), facts=FACTS)
SAMPLES, VIEWS = (ids.ravel() for ids in np.divmod(np.arange(60), 5))


def rows_of(samples, views, *, seed=0, width=7):
    """Made-up rows uint16 [B, width], a function of sample, view and seed."""
    return np.stack(
        [
            np.random.default_rng([seed, s, v]).integers(0, 1 << 16, width, dtype=np.uint16)
            for s, v in zip(samples, views, strict=True)
        ]
    )


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path))


@pytest.fixture
def table():
    """A table of 60 rows, all of them written."""
    made = open_table(SPEC)
    made.write(SAMPLES, VIEWS, rows_of(SAMPLES, VIEWS))
    return made


def found(table):
    return table.read(SAMPLES, VIEWS)[1]


def on_disk(table, name):
    """The file itself as bytes, to be changed in place: [60, bytes of an entry]."""
    return np.memmap(table.folder / name, np.uint8, "r+").reshape(60, -1)


# Reading and writing


def test_rows_come_back_in_any_order_and_more_than_once(table):
    order = np.random.default_rng(0).integers(0, 60, 200)
    rows, there = table.read(SAMPLES[order], VIEWS[order])
    assert (rows.dtype, rows.shape, there.dtype) == (np.uint16, (200, 7), np.bool_)
    assert there.all()
    assert (rows == rows_of(SAMPLES, VIEWS)[order]).all()


def test_what_was_not_written_is_missing():
    table = open_table(SPEC)
    assert not found(table).any()
    some = np.array([3, 17, 59])
    table.write(SAMPLES[some], VIEWS[some], rows_of(SAMPLES[some], VIEWS[some]))
    assert np.flatnonzero(found(table)).tolist() == some.tolist()
    assert (table.filled(), table.sound()) == (3, (3, 0))


def test_a_row_of_zeros_is_a_row():
    """The file is full of zeros from the start: the check word tells them from a row."""
    table = open_table(SPEC)
    table.write(SAMPLES[:1], VIEWS[:1], np.zeros((1, 7), np.uint16))
    assert np.flatnonzero(found(table)).tolist() == [0]


# What is not trusted


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize(("name", "size"), [("rows.bin", 14), ("words.bin", 4)])
def test_a_changed_byte_makes_the_row_missing(table, name, size, change):
    """A row for each of its bytes, and no other row with it."""
    on_disk(table, name)[np.arange(size), np.arange(size)] ^= change
    assert np.flatnonzero(~found(table)).tolist() == list(range(size))
    assert (table.filled(), table.sound()) == (60, (60 - size, size))


def test_a_half_written_row_is_missing(table):
    """The first half of a new row over an old one, as a process killed in between leaves it."""
    new = rows_of(SAMPLES, VIEWS, seed=1).view(np.uint8).reshape(60, 14)
    on_disk(table, "rows.bin")[20, :7] = new[20, :7]
    on_disk(table, "rows.bin")[21] = new[21]  # whole, but its word never came
    assert np.flatnonzero(~found(table)).tolist() == [20, 21]


def test_a_row_in_another_rows_place_is_missing(table):
    for name in ("rows.bin", "words.bin"):
        part = on_disk(table, name)
        part[[4, 5]] = part[[5, 4]]  # the same sample, neighbouring views
        part[33] = part[3]
    assert np.flatnonzero(~found(table)).tolist() == [4, 5, 33]


@pytest.mark.parametrize("fact", ["teacher_sha256", "data_fingerprint", "view_scheme"])
def test_the_rows_of_another_table_are_missing(table, fact):
    """Check words are of the teacher's weights, the pictures and the views."""
    other = open_table(replace(SPEC, facts={**FACTS, fact: "1"}))
    for name in ("rows.bin", "words.bin"):
        shutil.copyfile(table.folder / name, other.folder / name)
    assert other.filled() == 60
    assert not found(other).any()
    assert other.sound() == (0, 60)


def test_writing_again_heals_a_row(table):
    on_disk(table, "rows.bin")[7] ^= 0xFF
    table.write(SAMPLES[7:8], VIEWS[7:8], rows_of(SAMPLES[7:8], VIEWS[7:8]))
    assert found(table).all()


# Which table


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, num_samples=13),
        replace(SPEC, num_views=6),
        replace(SPEC, row_format=RowFormat(num_classes=8)),
        replace(SPEC, row_format=RowFormat(num_classes=7, top=3)),
        replace(SPEC, facts={**FACTS, "strong": True}),
        replace(SPEC, facts={**FACTS, "view_seed": 0}),
    ],
)
def test_whatever_decides_a_row_decides_the_table(other):
    assert other.key != SPEC.key
    assert other.folder() != SPEC.folder()


def test_names_that_no_folder_can_have(tmp_path):
    facts = {"teacher": "timm:vit/tiny", "dataset": "folder:/data/my birds"}
    table = open_table(replace(SPEC, facts=facts))
    assert table.folder.parent == tmp_path / "teachers"
    assert table.folder.name.startswith("timm-vit-tiny-my-birds-")


def shorten(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


def change_meta(folder, key, value):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, key: value}))


DAMAGES = {
    "short rows": lambda folder: shorten(folder / "rows.bin"),
    "short words": lambda folder: shorten(folder / "words.bin"),
    "no rows": lambda folder: (folder / "rows.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "torn meta": lambda folder: shorten(folder / "meta.json", 20),
    "binary meta": lambda folder: (folder / "meta.json").write_bytes(b"\xff\x00"),
    "other meta": lambda folder: (folder / "meta.json").write_text('{"top": null}'),
    "a list": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "a number": lambda folder: (folder / "meta.json").write_text("3"),
    **{
        f"{key} {value!a}": lambda folder, key=key, value=value: change_meta(folder, key, value)
        for key, values in {
            "num_samples": (None, "x", -1, 0, 2.5, 10**12, True),
            "num_views": ([1], None),
            "num_classes": ("x", None),
            "top": ("x", 9, -3),
            "teacher": (None, "\ud800"),
            "dataset": (5,),
        }.items()
        for value in values
    },
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_again(damage, table):
    table.close()
    DAMAGES[damage](table.folder)
    assert read_spec(table.folder) is None
    assert list(list_tables()) == []
    new = open_table(SPEC)
    assert not found(new).any()
    new.write(SAMPLES, VIEWS, rows_of(SAMPLES, VIEWS))
    assert found(new).all()
    assert list(new.folder.parent.iterdir()) == [new.folder]


def test_a_table_that_another_process_made_first_is_taken(table, monkeypatch):
    """It looked, found none, and comes second with its own empty folder."""
    whole, looks = cache._is_whole, []
    monkeypatch.setattr(
        cache, "_is_whole", lambda *args: looks.append(args) or (len(looks) > 1 and whole(*args))
    )
    assert found(open_table(SPEC)).all()
    assert list(table.folder.parent.iterdir()) == [table.folder]


# Looking at the cache


@pytest.mark.parametrize(("classes", "top", "row"), [(10, None, 20), (1000, 8, 34)])
def test_the_announced_size_is_the_size_of_the_files(classes, top, row):
    spec = replace(SPEC, row_format=RowFormat(num_classes=classes, top=top))
    folder = open_table(spec).folder
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    assert sizes == {"rows.bin": 60 * row, "words.bin": 60 * 4}
    assert spec.size == sum(sizes.values())


def test_tables_are_listed_by_name_with_what_they_take(tmp_path):
    assert list(list_tables()) == []
    wide = replace(SPEC, num_samples=10_000, row_format=RowFormat(num_classes=500))
    other = replace(SPEC, facts={**FACTS, "teacher": "a-teacher"})
    open_table(other)
    open_table(wide).write(np.array([9_999]), np.array([4]), np.ones((1, 500), np.uint16))
    (tmp_path / "teachers" / ".half-made").mkdir()
    (tmp_path / "teachers" / "foreign").mkdir()
    first, second = list_tables()
    assert first.folder == other.folder()
    assert (first.rows, first.filled, first.bytes_full) == (60, 0, 60 * 18)
    assert (second.rows, second.filled, second.bytes_full) == (50_000, 1, wide.size)
    assert second.meta == wide.identity
    assert 0 < second.bytes_used < wide.size / 100  # sparse
    assert second.modified >= first.modified


def test_a_table_is_found_by_the_beginning_of_its_name():
    others = [replace(SPEC, facts={**FACTS, "teacher": name}) for name in ("resnet20", "vgg8")]
    folders = [open_table(spec).folder for spec in (SPEC, *others)]
    assert find_table("vgg") == folders[2]
    assert find_table("resnet8") == folders[0]
    assert find_table(folders[1].name) == folders[1]
    for name, state in (("resnet", "2 tables"), ("wrn", "no table"), (".", "no table")):
        with pytest.raises(UserError, match=f"{state} .* {name!r}") as refused:
            find_table(name)
        assert "\n" not in str(refused.value)


# Whether there is room


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of the disk."""
    usage = shutil.disk_usage(".")
    return lambda count: monkeypatch.setattr(
        teachers.shutil, "disk_usage", lambda path: usage._replace(free=count)
    )


def test_a_table_takes_at_most_half_of_the_free_disk(own_cache, free):
    free(2000)
    assert affordable(1000)
    assert not affordable(1001)
    assert not own_cache.exists()  # looking makes no folder
    own_cache.mkdir(parents=True)
    assert affordable(1000)


def test_a_folder_without_write_permission_has_no_room(own_cache, monkeypatch):
    monkeypatch.setattr(teachers.os, "access", lambda path, mode: False)
    assert not affordable(1)
