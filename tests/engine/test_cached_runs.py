"""A run on the teacher's table is the live run, bit for bit; no disk can stop it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from engine_runs import CPU, assert_same_run, state

import ekd_ray.data.datasets as datasets
import ekd_ray.engine.distill as engine
import ekd_ray.engine.teacher.source as teachers
from ekd_ray.data import HostCopy, epoch_batches, load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import split_ids
from ekd_ray.engine.teacher.fill import FillPart, fill_tables
from ekd_ray.engine.teacher.source import LiveTeacher, Teacher, load_teacher
from ekd_ray.engine.teacher.table import RowFormat, list_tables
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_model


@pytest.fixture
def asked(monkeypatch):
    """The teachers of all runs from here on, in order."""
    made = []

    def recorded(*args, **kwargs):
        made.append(load_teacher(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(engine, "load_teacher", recorded)
    return made


@pytest.fixture
def no_network(monkeypatch):
    """From the call on, no teacher can be built."""

    def forbid():
        teachers._network.cache_clear()
        monkeypatch.setattr(teachers, "load_model", None)

    return forbid


@pytest.fixture(scope="module")
def small(tiny, with_teacher):
    """Builds a configuration under the shared teacher; with one view, epoch 2 repeats epoch 1."""

    def made(method="kd", **values):
        return with_method(tiny(), method, **{"augment": "none", **with_teacher, **values})

    return made


@pytest.fixture(scope="module")
def live(small):
    """(config, result, weights) of the live run that most tests compare with."""
    config = small()
    result = run(config, "off")
    return config, result, state(result)


def run(config, cache, **options):
    return distill(config.replace(teacher_cache=cache), threads=1, **options)


def drawn_ids(config):
    """All samples that the steps of a run see."""
    train_ids, _ = split_ids(config, load_dataset("synthetic", "train").labels)
    options = {"batch_size": config.batch_size, "seed": config.seed, "num_views": 1}
    epochs = [epoch_batches(train_ids, epoch=e + 1, **options) for e in range(config.epochs)]
    return {int(i) for batches in epochs for batch in batches for i in batch.sample_ids}


# The same bits


RUNS = {
    "kd": {"augment": "crop_flip"},
    "ekd": {"augment": "crop_flip", "learn_log_prior": True},
    "mlkd+ekd": {"view_pool": 3},
    "kd, top": {"teacher_top": 2},
    "wkd": {"augment": "crop_flip"},
    "ekd, drawn views": {
        "augment": "crop_flip",
        "view_pool": 3,
        "mixup_alpha": 1.0,
        "cutmix_alpha": 1.0,
        "auto_augment": "trivialaugment",
        "random_erasing": 0.5,
    },
}


@pytest.mark.quick_ids("[ekd]", "top", "[wkd]")
@pytest.mark.parametrize("name", RUNS)
def test_cold_and_warm_runs_equal_the_live_one(name, small, own_cache, asked, no_network):
    config = small(name.partition(",")[0], **RUNS[name])
    views = 2 if name == "mlkd+ekd" else 1
    expected = run(config, "off")
    weights = state(expected)
    assert not own_cache.exists()
    assert [teacher.computed for teacher in asked] == [96] * views  # 2 epochs of 48 images
    assert_same_run(run(config, "on"), expected, weights)
    assert all(0 < teacher.computed <= 96 for teacher in asked[views:])
    assert len(list(list_tables())) == views
    no_network()
    assert_same_run(run(config, "on"), expected, weights)
    assert [teacher.computed for teacher in asked[2 * views :]] == [0] * views


def test_a_run_takes_the_rows_it_finds_and_computes_the_others(small, own_cache, asked):
    """Another subset, seed and method on one table: parts of most batches are missing."""
    first, second = small(train_subset=60), small("ekd", train_subset=90, seed=3)
    expected = run(second, "off")
    weights = state(expected)
    run(first, "on")
    assert_same_run(run(second, "on"), expected, weights)
    there, needed = drawn_ids(first), drawn_ids(second)
    assert asked[1].computed == len(there)
    assert asked[2].computed == len(needed - there)
    assert len(needed & there) > 10
    assert len(list(list_tables())) == 1


def test_damaged_rows_are_computed_again(live, own_cache, asked):
    run(live[0], "on")
    (table,) = list_tables()
    written = np.flatnonzero(np.fromfile(table.folder / "words.bin", np.uint32))
    np.memmap(table.folder / "rows.bin", np.uint16, "r+").reshape(2000, 10)[written[:20], 3] ^= 1
    assert_same_run(run(live[0], "on"), *live[1:])
    assert [teacher.computed for teacher in asked] == [48, 20]


@pytest.fixture
def late(monkeypatch):
    """Copies to the host arrive when they are waited for; returns those that were."""
    waited = []

    class Late(HostCopy):
        arrived = False

        def values(self):
            waited.append(self)
            return super().values()

    monkeypatch.setattr(teachers, "HostCopy", Late)
    return waited


def test_rows_are_written_one_batch_behind_the_device(live, own_cache, late, run_data):
    config = resolve(live[0].replace(teacher_cache="on"))
    data = run_data(config)
    teacher = load_teacher(config, data, precision="float32", device=CPU)
    filled = []
    for ids in np.arange(48).reshape(3, 16):
        images, _ = data.images.views(ids, ids * 0)
        teacher.logits(images, ids, ids * 0)
        filled.append((teacher.table.filled(), len(late)))
    teacher.flush()
    assert [*filled, (teacher.table.filled(), len(late))] == [(0, 0), (16, 1), (32, 2), (48, 3)]
    teacher.flush()
    assert len(late) == 3


def test_a_late_device_changes_no_run_and_leaves_no_row_out(live, own_cache, late, asked):
    config = live[0].replace(teacher_cache="on")
    half = FillPart(index=0, count=2)
    held = fill_tables(config, data_root=None, seeds=[0], part=half, threads=1)
    (table,) = list_tables()
    assert 0 < held == table.filled
    assert_same_run(run(config, "on"), *live[1:])
    assert [teacher.computed for teacher in asked] == [48 - held]  # epoch 2 repeats epoch 1


@pytest.mark.quick_ids("resnet8-1000-2")
@pytest.mark.parametrize(
    ("model", "classes", "threads"),
    [("resnet20", 100, 1), ("resnet8", 1000, 1), ("resnet8", 1000, 2)],
)
def test_logits_do_not_depend_on_what_else_is_asked_for(model, classes, threads):
    """Missing rows come in batches of any size and order; a live run asks for all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LiveTeacher(
            build_model(model, classes), "half", precision="float32", channels_last=True
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    teacher = Teacher(lambda: network, RowFormat(num_classes=classes), None)
    nobody = np.zeros(64, np.int64)
    torch.set_num_threads(threads)
    try:
        together = teacher.logits(images, nobody, nobody)
        for count in (1, 2, 3, 5, 7, 11, 17, 33):
            some = torch.randperm(64, generator=generator)[:count]
            alone = teacher.logits(images[some], nobody[:count], nobody[:count])
            assert torch.equal(alone, together[some]), count
    finally:
        torch.set_num_threads(1)
    assert teacher.computed == 64 + 1 + 2 + 3 + 5 + 7 + 11 + 17 + 33


def test_trials_of_a_process_share_the_open_table(live, own_cache, run_data):
    config = resolve(live[0].replace(teacher_cache="on"))
    load = lambda: load_teacher(config, run_data(config), precision="float32", device=CPU)  # noqa: E731
    table = load().table
    assert load().table is table
    shutil.rmtree(table.folder)  # launchers/cache.py rm, by another process
    assert load().table is not table
    assert load().table.folder.is_dir()


# The teacher's classifier


def remove(path):
    path.unlink()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [remove, flip])
def test_rows_of_a_classifier_that_are_not_right_are_taken_from_the_teacher(
    spoil, small, own_cache, no_network
):
    """The first is a table of the time before they lay there."""
    config = small("wkd")
    expected = run(config, "on")
    weights = state(expected)
    (table,) = list_tables()
    kept = (table.folder / "classifier.safetensors").read_bytes()
    spoil(table.folder / "classifier.safetensors")
    assert_same_run(run(config, "on"), expected, weights)
    assert (table.folder / "classifier.safetensors").read_bytes() == kept
    no_network()
    assert_same_run(run(config, "on"), expected, weights)


def test_a_filled_table_has_the_classifier_whatever_method_asked_for_it(
    small, own_cache, no_network, monkeypatch
):
    """And nobody else may write it, or the whole table would not be read."""
    config = small("wkd")
    expected = run(config, "off")
    weights = state(expected)
    before = os.umask(0)
    try:
        fill_tables(small("kd").replace(teacher_cache="on"), data_root=None, seeds=[0], threads=1)
    finally:
        os.umask(before)
    monkeypatch.setattr(teachers, "_tables", {})  # another process opens it
    no_network()
    assert_same_run(run(config, "on"), expected, weights)


def test_the_cosines_are_those_of_the_teachers_last_layer(live, run_data):
    config = resolve(live[0].replace(teacher_cache="off"))
    teacher = load_teacher(config, run_data(config), precision="float32", device=CPU)
    expected = load_model(config.teacher, 10, config.teacher_weights).fc.weight
    assert torch.equal(teacher.classifier, expected)


def test_a_teacher_without_a_row_for_each_class_is_refused_before_compute(small):
    config = small("wkd", teacher="torchvision:squeezenet1_1")
    with pytest.raises(UserError, match=r"10 classes.*torchvision:squeezenet1_1 has none with 10"):
        resolve(config)


# No disk can stop it


def blocked(folder):
    """A file where the folder of all tables belongs: nobody can write there, not even root."""
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def read_only(folder):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.mkdir(parents=True)
    folder.chmod(0o500)


@pytest.mark.parametrize("hinder", [blocked, read_only])
def test_a_folder_that_cannot_be_written_leaves_the_live_teacher(hinder, live, own_cache, asked):
    hinder(own_cache)
    with pytest.warns(UserWarning, match="cannot be used .* live teacher") as caught:
        assert_same_run(run(live[0], "on"), *live[1:])
    assert str(own_cache) in str(caught[0].message)
    assert (asked[0].table, asked[0].computed) == (None, 96)


def test_automatic_caching_does_without_where_there_is_no_room(live, own_cache, asked, monkeypatch):
    monkeypatch.setattr(teachers, "LARGEST_TABLE", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_run(run(live[0], "auto"), *live[1:])
    assert asked[0].table is None
    assert not own_cache.exists()


def raises(descriptor, data, offset):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def falls_short(descriptor, data, offset):
    return len(data) // 2


@pytest.mark.quick_ids("0-falls_short", "41-raises")
@pytest.mark.parametrize("full", [raises, falls_short])
@pytest.mark.parametrize("after", [0, 41])
def test_a_full_disk_leaves_the_live_teacher(
    full, after, live, own_cache, asked, no_network, monkeypatch
):
    """From the start, or between a row and its word: the rows before it stay good."""
    write, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(arguments)
        return (full if len(calls) > after else write)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.warns(UserWarning, match=r"cannot be written \(No space left") as caught:
            assert_same_run(run(live[0], "on"), *live[1:])
    assert len(caught) == 1
    assert asked[0].table is None
    assert len(calls) == after + 1
    (table,) = list_tables()
    assert table.filled == after // 2
    # With room again the same table fills up.
    assert_same_run(run(live[0], "on"), *live[1:])
    assert asked[1].computed == 48 - after // 2
    no_network()
    assert_same_run(run(live[0], "on"), *live[1:])


def fill(disk, left):
    """Write until nothing goes in, then give `left` bytes back."""
    with open(disk / "filler", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - left)


def test_a_cache_on_a_full_disk_leaves_the_live_teacher(live, small_disk, asked, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(small_disk / "cache"))
    for split in ("train", "test"):
        load_dataset("synthetic", split)
    fill(small_disk, 16 * 1024)  # for some rows: a sparse table takes a page for each
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left"):
        assert_same_run(run(live[0], "on"), *live[1:])
    assert asked[0].table is None
    (small_disk / "filler").unlink()
    assert_same_run(run(live[0], "on"), *live[1:])
    assert asked[1].table.filled() == 48


@pytest.mark.parametrize("left", [0, 100_000])
def test_pictures_that_do_not_fit_are_refused_in_one_sentence(left, small_disk, monkeypatch):
    monkeypatch.setenv("EKD_CACHE_DIR", str(small_disk / "cache"))
    monkeypatch.setattr(datasets, "_opened", {})
    fill(small_disk, left)
    with pytest.raises(UserError, match=r"No space left .* EKD_CACHE_DIR") as refused:
        load_dataset("synthetic", "train")
    assert "\n" not in str(refused.value)
    assert not list(small_disk.rglob("*.npy"))
    (small_disk / "filler").unlink()
    assert len(load_dataset("synthetic", "train")) == 2000


def test_a_table_that_may_only_be_read_is_read(live, own_cache, asked, monkeypatch):
    """A read-only disk: what it holds is used, what it lacks is computed and not stored."""
    half = FillPart(index=0, count=2)
    config = live[0].replace(teacher_cache="on")
    held = fill_tables(config, data_root=None, seeds=[config.seed], part=half, threads=1)
    assert 0 < held < 48
    teachers._tables.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert_same_run(run(live[0], "on"), *live[1:])
    teachers._tables.clear()
    assert not asked[0].table.writable
    assert asked[0].computed == 2 * (48 - held)  # in both epochs
    (table,) = list_tables()
    assert table.filled == held
