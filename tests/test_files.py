"""What is read from others is a plain file of bounded size; where we write there are no links."""

import ast
import os
import socket
from pathlib import Path

import pytest

import ekd_ray
from ekd_ray import files
from ekd_ray.config import DistillConfig
from ekd_ray.config.plugins import load_plugin
from ekd_ray.data.corruptions import published_pictures
from ekd_ray.data.decode import fit_file
from ekd_ray.data.shards import _open_table
from ekd_ray.data.store import _load_array
from ekd_ray.engine.checkpoint import DamagedCheckpoint, _read
from ekd_ray.engine.history import read_rows
from ekd_ray.engine.measure.calibration import Calibration
from ekd_ray.engine.measure.inheritance import Inheritance
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.measure.shift import Shift
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.teacher import classifier
from ekd_ray.engine.teacher.table import read_spec
from ekd_ray.errors import UserError
from ekd_ray.files import NoSuchFile, check_name, check_own_folder, expand_home
from ekd_ray.models import read_metadata
from ekd_ray.results.bundle_files import manifest_problems
from ekd_ray.results.records import read_record
from ekd_ray.results.study_reader import read_parquet
from ekd_ray.studies.pipeline import check_writable
from ekd_ray.studies.recipes import Recipe

LIBRARY = Path(ekd_ray.__file__).parent


def extend(path):
    recipe = path.with_name("recipe.yaml")
    recipe.write_text(f"extends: {path.name}\n")
    return Recipe.load(recipe)


def open_table(path):
    with _open_table(path):
        pass


# Of each reader: the name that the file has, and what is called.
READERS = {
    "recipe": ("a.yaml", Recipe.load),
    "extends": ("a.yaml", extend),
    "study": ("study.yaml", Recipe.of_study),
    "configuration": ("a.yaml", DistillConfig.from_yaml),
    "weights": ("a.safetensors", read_metadata),
    "picture": ("a.png", lambda path: fit_file(str(path), 32, margin=False)),
    "results table": ("trials.parquet", read_parquet),
    "parquet shard": ("a.parquet", open_table),
    "arrow shard": ("a.arrow", open_table),
    "array": ("labels.npy", _load_array),
    "history": ("history.jsonl", read_rows),
    "predictions": ("a.safetensors", Predictions.load),
    "plugin": ("own_part.py", lambda path: load_plugin(str(path))),
    "result": ("result.json", lambda path: read_record(path.parent)),
    "settings": ("config.yaml", lambda path: read_record(path.parent)),
    "corruptions": ("corruptions.json", Shift.load),
    "what is inherited": ("inherited.json", Inheritance.load),
    "published pictures": ("fog.npy", lambda path: published_pictures(path.parent, "fog", 10)),
    "teacher's figures": ("teacher.json", lambda path: TeacherFigures.read(path.parent)),
    "calibration": ("calibration.json", lambda path: Calibration.load(path.parent)),
    "manifest": ("MANIFEST", lambda path: manifest_problems(path.parent)),
}
ENDLESS = {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
@pytest.mark.timeout(60)  # of one that reads without end
def test_every_reader_refuses_what_has_no_end(name, read, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(UserError) as refused:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.timeout(60)
def test_readers_of_own_files_take_it_for_damage(make, tmp_path):
    make(tmp_path / "meta.json")
    make(tmp_path / "checkpoint.pt")
    make(tmp_path / "classifier.safetensors")
    assert read_spec(tmp_path) is None
    assert classifier.read_rows(tmp_path, 10) is None
    with pytest.raises(DamagedCheckpoint):
        _read(tmp_path / "checkpoint.pt")


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has 107 bytes at most
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def make_large(path):
    with open(path, "wb") as file:
        file.truncate(files.MOST_DATA + 1)  # without a byte on the disk


STRANGE = {
    "FIFO": ("a", os.mkfifo, "FIFO"),
    "device": ("a", ENDLESS["device"], "device"),
    "socket": ("a", make_socket, "socket"),
    "folder": ("a", Path.mkdir, "folder"),
    "large": ("a", make_large, "bytes"),
    "missing": ("a", Path, "No such file"),
    "null in its name": ("a\0b", Path, "null"),
    "long name": ("x" * 300, Path, "too long"),
}
PRIMITIVES = (files.read_bytes, files.read_text, files.read_json, files.sha256_file,
              files.check_plain)  # fmt: skip


@pytest.mark.parametrize(("name", "make", "word"), STRANGE.values(), ids=STRANGE)
@pytest.mark.timeout(60)
def test_strange_files_are_named(name, make, word, tmp_path):
    make(tmp_path / name)
    for read in PRIMITIVES:
        with pytest.raises(UserError, match=word) as refused:
            read(tmp_path / name)
        assert str(refused.value).isprintable()
        assert isinstance(refused.value, NoSuchFile) == (word == "No such file")


def test_plain_files_are_read(tmp_path):
    (tmp_path / "a").write_bytes('{"ä": 1}\r\n'.encode())
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert files.read_bytes(tmp_path / name) == '{"ä": 1}\r\n'.encode()
        assert files.read_text(tmp_path / name) == '{"ä": 1}\n'
        assert files.read_json(tmp_path / name) == {"ä": 1}
        files.check_plain(tmp_path / name)


def test_a_file_that_lies_about_its_size_is_bounded():
    """Those of /proc have none."""
    with pytest.raises(UserError, match="more than 3 bytes"):
        files.read_bytes("/proc/self/status", most=3)


@pytest.mark.parametrize("content", [b"\xff", b"[", b"[" * 10_000, b"9" * 5_000])
def test_damaged_json_is_a_sentence(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


def test_a_torn_line_of_a_history_may_be_nested_deep(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"epoch": 1}\n' + "[" * 100_000)
    assert read_rows(tmp_path / "history.jsonl") == [{"epoch": 1}]


PLANTED = {
    "journal": ("optuna.journal", lambda path, target: path.symlink_to(target), "symbolic link"),
    "lock": (".lock", lambda path, target: path.symlink_to(target), "symbolic link"),
    "log": ("driver.log", lambda path, target: path.symlink_to(target), "symbolic link"),
    "to nowhere": ("history.jsonl", lambda path, target: path.symlink_to("none"), "symbolic link"),
    "FIFO": ("trials/0000/history.jsonl", lambda path, target: os.mkfifo(path), "FIFO"),
    "folder": ("report", lambda path, target: path.symlink_to(target.parent), "symbolic link"),
    "scratch": (".ray", lambda path, target: path.symlink_to(target.parent), "symbolic link"),
}


@pytest.mark.parametrize(("name", "plant", "word"), PLANTED.values(), ids=PLANTED)
def test_nothing_is_written_through_a_link(name, plant, word, tmp_path):
    target = tmp_path / "elsewhere" / "precious"
    target.parent.mkdir()
    target.write_text("precious")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    plant(path, target)
    with pytest.raises(UserError, match=word) as refused:
        check_writable(tmp_path / "run")
    assert str(path) in str(refused.value)
    assert target.read_text() == "precious" and [*target.parent.iterdir()] == [target]


def test_a_folder_may_itself_be_a_link_and_have_locks_of_optuna(tmp_path):
    (tmp_path / "run" / "trials").mkdir(parents=True)
    (tmp_path / "run" / "optuna.journal.lock").symlink_to("optuna.journal")
    (tmp_path / "link").symlink_to("run")
    check_writable(tmp_path / "link")
    # Below the top nobody makes locks.
    (tmp_path / "run" / "trials" / "optuna.journal.lock").symlink_to("optuna.journal")
    with pytest.raises(UserError, match="symbolic link"):
        check_writable(tmp_path / "run")


def test_a_deep_folder_is_looked_through(tmp_path):
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
        deep.mkdir()
    check_own_folder(tmp_path)
    (deep / "a").symlink_to("b")
    with pytest.raises(UserError, match="symbolic link"):
        check_own_folder(tmp_path)


# Where a file is opened past the readers: our own, written by this process, or the system's.
OWN = {
    "plugins.py": "Path(module.__cached__).read_bytes",
    "environment.py": "Path('/proc/cpuinfo').read_text",
    "control_groups.py": "read_text",  # the kernel's
    "doctor_command.py": "/",
    "exports.py": "open(path, 'rb')",  # what was just written
    "table.py": "folder /",  # of the size that its specification says
    "main.py": "os.devnull",
    "ray_folder.py": "os.O_NOFOLLOW",  # to be locked
    "progress.py": "os.O_NOFOLLOW",  # whether it is locked
    "checkpoint.py": "io.BytesIO",
    "decode.py": "io.BytesIO",
    "method_checks.py": "torch.load(file",
    "corruptions.py": "Image.open(file",  # in memory
    "scan.py": "Image.open(file",  # which `open_plain` has opened
    "files.py": "open(",
    "node_probe.py": "open(path)",  # sent to nodes that may lack the package
}
# Libraries' own, by path: each is called behind `check_plain` or a reader, as READERS tests.
BY_PATH = {
    "predictions.py": "safe_open", "gallery.py": "safe_open", "weights.py": "(path",
    "checkpoints.py": "(path",
    "study_reader.py": "pq.read_table(path)", "reproduce.py": "load_file",
    "store.py": "path", "shards.py": "path", "corruptions.py": "np.load(path",
}  # fmt: skip
OPENERS = ("open", "os.open", "torch.load", "np.load", "np.memmap", "safe_open", "load_file",
           "safetensors.torch.load_file", "pq.read_table", "pq.ParquetFile", "pa.memory_map",
           "Image.open", "json.load", "yaml.load", "yaml.safe_load")  # fmt: skip


def reads(tree):
    """(line, call) of what opens a file to read it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        mode = ast.unparse(node.args[1]) if name == "open" and len(node.args) > 1 else "'r'"
        writes = name == "open" and mode[1] in "wax"
        opens = name in OPENERS or name.endswith((".read_text", ".read_bytes", ".open"))
        if opens and not writes and not name.endswith("_files.read_text"):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: path.stem)
def test_files_are_read_by_one_reader(path):
    """A new place that reads a file goes through `ekd_ray.files`, or has its reason here."""
    known = [table[path.name] for table in (OWN, BY_PATH) if path.name in table]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [call for call in reads(tree) if not any(words in call[1] for words in known)]
    assert not found


def test_the_scan_sees_it():
    source = "p.read_text()\nopen(p)\nopen(p, 'rb')\nopen(p, 'wb')\nnp.load(p)\nread_text(p)"
    assert [line for line, _ in reads(ast.parse(source))] == [1, 2, 3, 5]


# Names


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 3000, "~" + "a" * 300, "a\0b", "~a\0b"])
def test_a_name_that_no_file_could_have(path):
    for read in (check_name, expand_home):
        with pytest.raises(UserError, match="cannot read"):
            read(path)


def test_the_home_of_nobody_is_a_plain_name():
    assert expand_home("~nosuchuser/x") == Path("~nosuchuser/x")
    assert expand_home("~/x") == Path.home() / "x"
    others = {p.name for p in LIBRARY.rglob("*.py") if "expanduser" in p.read_text()}
    # The probe has none of ours where it runs, and `os.path`'s raises nothing.
    assert others == {"files.py", "node_probe.py"}, "Path's own raises for an unknown user"


def test_a_place_to_write_is_tried_before_it_is_needed(tmp_path):
    files.check_file_place(tmp_path / "new" / "report.html")
    assert [*(tmp_path / "new").iterdir()] == []
    (tmp_path / "file").touch()
    for check, path, word in (
        (files.check_file_place, tmp_path / "new", "is a folder"),
        (files.check_file_place, tmp_path / "file" / "report.html", "cannot write to"),
        (files.check_folder_place, tmp_path / "file", "cannot write to"),
    ):
        with pytest.raises(UserError, match=word):
            check(path)
