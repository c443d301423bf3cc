"""Two users on one cache: what the other one has planted there reaches no run."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from engine_runs import assert_same_run, state

import ekd_ray.data.datasets as datasets
import ekd_ray.engine.compiling as compiling
import ekd_ray.engine.teacher.source as teachers
import ekd_ray.engine.teacher.table as tables
from ekd_ray.data import load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.source import table_spec
from ekd_ray.engine.teacher.table import list_tables, open_table
from ekd_ray.errors import UserError
from ekd_ray.files import default_cache_dir
from ekd_ray.losses.methods import with_method

OTHER = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acts as a second user")


@pytest.fixture
def shared(monkeypatch):
    """A cache folder that both users reach; who may write there is up to the test."""
    folder = Path(tempfile.mkdtemp(prefix="ekd"))
    folder.chmod(0o755)
    monkeypatch.setenv("EKD_CACHE_DIR", str(folder))
    monkeypatch.setattr(teachers, "_tables", {})
    monkeypatch.setattr(datasets, "_opened", {})
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def config(tiny, with_teacher):
    """Both epochs see the same views."""
    return with_method(tiny(), "kd", **with_teacher, augment="none", teacher_cache="on")


@pytest.fixture(scope="module")
def live(config):
    """The run without a cache."""
    result = distill(config.replace(teacher_cache="off"), threads=1)
    return result, state(result)


@pytest.fixture
def spec(config, run_data):
    resolved = resolve(config)
    return table_spec(resolved, run_data(resolved), precision="float32")


def as_other(act):
    """Do something as the other user, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(OTHER)
        os.setuid(OTHER)
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def give_away(path):
    """A folder and all in it, as if the other user had made it."""
    for part in (path, *path.rglob("*")):
        os.chown(part, OTHER, OTHER, follow_symlinks=False)


def plant_table(spec, folder):
    """A whole table of zeros, every check word of which fits: they are no secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "tables_dir", lambda: folder)
        table = open_table(spec)
        ids = np.arange(spec.num_samples * spec.num_views)
        rows = np.zeros((len(ids), spec.row_format.width), np.uint16)
        table.write(ids // spec.num_views, ids % spec.num_views, rows)
        table.close()


def run(config):
    """The run's result; the last warning that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = distill(config, threads=1)
    return found, [str(warning.message) for warning in caught]


def test_in_a_shared_folder_each_user_has_a_place(shared, spec, config, live):
    """Planted before the first run; what the first run has made, the second one reads."""
    shared.chmod(0o1777)
    as_other(lambda: plant_table(spec, shared / "teachers"))
    found, said = run(config)
    assert_same_run(found, *live)
    own = shared / f"u{os.geteuid()}"
    assert any(str(own) in line and "chmod" in line for line in said)
    assert default_cache_dir() == own
    (table,) = list_tables()
    assert (table.filled, own in table.folder.parents) == (48, True)
    as_other(lambda: plant_table(spec, shared / "teachers"))
    with pytest.raises(AssertionError):  # nor does the other one get into that place
        as_other(lambda: (own / "teachers" / "mine").mkdir())
    assert_same_run(run(config)[0], *live)
    assert list_tables().__next__().filled == 48


def plant_as_given(shared, spec):
    """A folder that was theirs once, in a cache that is closed by now."""
    plant_table(spec, shared / "teachers")
    give_away(spec.folder())


def plant_by_link(shared, spec):
    elsewhere = shared / "elsewhere"
    plant_table(spec, elsewhere)
    give_away(elsewhere)
    (shared / "teachers").mkdir()
    spec.folder().symlink_to(elsewhere / spec.folder().name)


def plant_in_open_file(shared, spec):
    plant_table(spec, shared / "teachers")
    (spec.folder() / "rows.bin").chmod(0o666)


def plant_one_file(shared, spec):
    plant_table(spec, shared / "teachers")
    give_away(spec.folder() / "rows.bin")


def plant_hard_link(shared, spec):
    """Their file under a name in a folder of ours."""
    plant_one_file(shared, spec)
    os.link(spec.folder() / "rows.bin", shared / "theirs.bin")


PLANTS = [plant_as_given, plant_by_link, plant_in_open_file, plant_one_file, plant_hard_link]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_table_that_another_could_have_written_is_made_again(plant, shared, spec, config, live):
    plant(shared, spec)
    assert list(list_tables()) == []
    found, said = run(config)
    assert_same_run(found, *live)
    assert any("another user could have written" in line for line in said)
    (table,) = list_tables()
    assert table.filled == 48
    assert len([*table.folder.iterdir()]) == 3


def test_a_place_that_another_has_taken_is_refused(shared, config):
    shared.chmod(0o1777)
    own = shared / f"u{os.geteuid()}"
    as_other(own.mkdir)
    with pytest.raises(UserError, match="EKD_CACHE_DIR") as refused:
        distill(config, threads=1)
    assert "\n" not in str(refused.value)
    own.rmdir()
    as_other(lambda: own.symlink_to("/"))
    with pytest.raises(UserError, match="EKD_CACHE_DIR"):
        default_cache_dir()


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json", ""])
def test_decoded_pictures_of_another_are_decoded_again(name, shared, monkeypatch):
    expected = load_dataset("synthetic", "train")
    pixels = np.array(expected.images)
    (entry,) = (path for path in (shared / "datasets").iterdir() if path.is_dir())
    with open(entry / "images.npy", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    give_away(entry / name)
    monkeypatch.setattr(datasets, "_opened", {})
    with pytest.warns(UserWarning, match="another user could have written"):
        again = load_dataset("synthetic", "train")
    assert again.fingerprint == expected.fingerprint
    assert (again.images == pixels).all()


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077])
def test_a_cache_is_closed_whatever_the_umask(umask, shared, config, live):
    """So that one's own files are trusted, and nobody is let in by accident."""
    before = os.umask(umask)
    try:
        shutil.rmtree(shared)
        assert_same_run(run(config)[0], *live)
        teachers._tables.clear()
        datasets._opened.clear()
        found, said = run(config)
    finally:
        os.umask(before)
    assert_same_run(found, *live)
    assert said == []
    parts = [shared, *(part for part in shared.rglob("*") if part.suffix != ".lock")]
    assert {part.name for part in parts} >= {"teachers", "rows.bin", "images.npy"}
    for part in parts:
        assert part.stat().st_mode & (0o022 | (umask if part.is_dir() else 0)) == 0, part


@pytest.fixture
def place_of_programs(monkeypatch):
    """Where torch is told to keep what it compiles, as each process asks for it."""

    def place():
        monkeypatch.delenv(compiling._VARIABLE, raising=False)
        compiling._keep_programs_private()
        return Path(os.environ[compiling._VARIABLE])

    return place


@pytest.mark.parametrize("planted", ["open to a group", "theirs", "in a folder of theirs", "link"])
def test_programs_that_another_could_have_left_are_not_run(planted, shared, place_of_programs):
    """Also once the cache is closed again by `chmod -R go-w`, and below the first level."""
    compiled = shared / "compiled"
    program = compiled / "ab" / "program.py"
    program.parent.mkdir(parents=True)
    program.touch()
    if planted == "open to a group":
        compiled.chmod(0o775)
    elif planted == "link":
        compiled.rename(shared / "elsewhere")
        compiled.symlink_to(shared / "elsewhere")
    else:
        give_away(compiled if planted == "theirs" else program.parent)
    for part in shared.rglob("*"):
        part.chmod(part.stat().st_mode & ~0o022)
    place = place_of_programs()
    assert not [*place.iterdir()]
    assert place.stat().st_mode & 0o777 == 0o700


def test_programs_are_kept_and_out_of_reach_whatever_the_umask(shared, place_of_programs):
    before = os.umask(0)
    try:
        program = place_of_programs() / "ab" / "program.py"
        program.parent.mkdir()
        program.touch()
    finally:
        os.umask(before)
    with pytest.raises(AssertionError):
        as_other(lambda: program.write_text("planted"))
    assert place_of_programs() == program.parent.parent == shared / "compiled"
    assert program.exists()
    os.chown(shared / "compiled", 0, 0)

    def ask():
        place = place_of_programs()
        assert shared not in place.parents and place.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(place)

    as_other(ask)


@pytest.mark.parametrize("epochs", [0, 1], ids=["no table", "a table of half the rows"])
def test_a_cache_that_may_only_be_read(epochs, shared, tiny, with_teacher):
    """Root's, read by another: rows that are there serve, the live teacher gives the others."""
    weights = shared / "teacher.safetensors"
    shutil.copyfile(with_teacher["teacher_weights"], weights)
    weights.chmod(0o644)
    settings = {**with_teacher, "teacher_weights": str(weights), "teacher_cache": "on"}
    config = with_method(tiny(), "kd", **settings)  # whose epochs see other views
    expected = distill(config.replace(teacher_cache="off"), threads=1)
    bits = state(expected)
    if epochs:
        distill(config.replace(epochs=epochs), threads=1)
    teachers._tables.clear()
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}

    def read():
        found, said = run(config)
        assert_same_run(found, expected, bits)
        assert [("cannot be used" in line, "live teacher" in line) for line in said] == (
            [] if epochs else [(True, True)]
        )

    as_other(read)
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
