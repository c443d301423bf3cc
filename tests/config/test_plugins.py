"""Plugins: run on the user's word only, known by their source, and taken along by it."""

import hashlib
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ekd_ray.config import DistillConfig, plugins
from ekd_ray.config.plugins import (
    LoadedPlugins,
    Plugin,
    load_named,
    load_plugin,
    load_references,
    registers,
    stamps_of,
    trust_files,
    write_sources,
)
from ekd_ray.errors import UserError

ROOT = Path(plugins.__file__).parents[2]
TABLE = {}


@registers("model", TABLE)
def register_toy(name, value):
    if name in TABLE:
        raise ValueError(f"{name} is taken")
    TABLE[name] = value


PART = "from test_plugins import register_toy\nregister_toy({name!r}, {value})\n"
TRACE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """Plugins of one test only."""
    before = {*sys.modules}
    for name in ("_loaded", "_parts", "_pickled_parts"):
        monkeypatch.setattr(plugins, name, {})
    monkeypatch.setattr(plugins, "_trusts_files", False)
    monkeypatch.setattr(plugins._finder, "modules", {})
    yield
    TABLE.clear()
    for name in {*sys.modules} - before:
        del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def in_new_process(code, cwd, **environment):
    path = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip


# What a plugin is


def test_a_file_registers_its_parts_and_is_known_by_its_source(tmp_path):
    text = PART.format(name="a", value=1)
    found = load_plugin(str(write(tmp_path / "my_parts.py", text)))
    assert TABLE == {"a": 1}
    digest = hashlib.sha256(f"my_parts.py\0{len(text)}\0{text}".encode()).hexdigest()
    assert found.stamp == f"my_parts@{digest}"
    assert stamps_of([("model", "a"), ("model", "resnet8"), ("dataset", "a"), ("model", None)]) == (
        found.stamp,
    )
    assert load_plugin(str(tmp_path / "my_parts.py")) is found, "once"


@pytest.mark.parametrize("changed", ["text", "path", "added"])
def test_every_file_counts_in_the_hash(changed):
    files = {"a/__init__.py": "x = 1\n", "a/b.py": "y = 1\n"}
    other = {
        "text": {**files, "a/b.py": "y = 2\n"},
        "path": {"a/__init__.py": "x = 1\n", "a/c.py": "y = 1\n"},
        "added": {**files, "a/c.py": ""},
    }[changed]
    assert Plugin.of_files("a", files, "").sha256 != Plugin.of_files("a", other, "").sha256


def test_a_package_is_its_files_whichever_module_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "my_pack/__init__.py", "")
    write(tmp_path / "my_pack/values.py", "VALUE = 7\n")
    write(tmp_path / "my_pack/models.py", "from .values import VALUE\n"
          "from test_plugins import register_toy\nregister_toy('p', VALUE)\n")  # fmt: skip
    found = load_plugin("my_pack.models")
    assert TABLE == {"p": 7}
    assert set(found.files) == {"my_pack/__init__.py", "my_pack/values.py", "my_pack/models.py"}


def test_of_an_installed_module_with_much_source_the_hash_alone_goes_along(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "LARGEST", 10)
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "my_parts.py", PART.format(name="a", value=1))
    found = load_plugin("my_parts")
    assert found.files is None and TABLE == {"a": 1}
    assert write_sources(tmp_path / "out", [found.stamp]) == []


@pytest.mark.parametrize(
    ("reference", "text", "message"),
    [
        ("gone.py", None, "cannot read .*gone.py: No such file"),
        ("my-parts.py", "", "named as a module is"),
        ("json.py", "", "the name of an installed module"),
        ("no_such_module_here", None, "there is no module 'no_such_module_here'"),
        ("a b", None, "a module or a FILE.py"),
        ("sys", None, "has no source"),
        ("__main__.py", "", "named as a module is"),
        ("__init__.py", "", "named as a module is"),
        ("leaver.py", "import sys\nsys.exit(2)\n", "leaver.py, line 2 fails: SystemExit: 2"),
        ("broken.py", "x = 1\nraise OSError('no luck')\n", "broken.py, line 2 fails: OSError: no"),
        ("typo.py", "x = (\n", "typo.py.* fails: SyntaxError"),
    ],
)
def test_a_plugin_that_does_not_serve_is_one_sentence(tmp_path, reference, text, message):
    if text is not None:
        write(tmp_path / reference, text)
    if reference.endswith(".py"):
        reference = str(tmp_path / reference)
    with pytest.raises(UserError, match=message):
        load_plugin(reference)
    assert not plugins._loaded and not plugins._finder.modules


def test_a_plugin_that_fails_leaves_nothing_behind(tmp_path):
    file = write(tmp_path / "my_parts.py", PART.format(name="a", value=1) + "1 / 0\n")
    with pytest.raises(UserError, match="line 3 fails: ZeroDivisionError"):
        load_plugin(str(file))
    assert TABLE == {} and "my_parts" not in sys.modules
    file.write_text(PART.format(name="a", value=2))
    load_plugin(str(file))
    assert TABLE == {"a": 2}


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path, monkeypatch):
    """Its old code would run here, under the hash of the new one."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = write(tmp_path / "my_parts.py", "x = 1\n")
    importlib.import_module("my_parts")
    file.write_text("x = 10\n")
    for reference in (str(file), "my_parts"):
        with pytest.raises(UserError, match=r"my_parts.py was changed .* start a new process"):
            load_plugin(reference)
    other = write(tmp_path / "others.py", "x = 1\n")
    load_plugin(str(other))
    other.write_text("x = 2\n")
    with pytest.raises(UserError, match=r"others.py was changed .* start a new process"):
        load_plugin(str(other))


def test_a_file_that_imports_its_neighbour_is_refused_unless_that_is_a_plugin_too(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "helper_here.py", "x = 1\n")
    file = write(tmp_path / "my_parts.py", "import helper_here\n")
    with pytest.raises(UserError, match=r"imports helper_here beside it.*--plugin helper_here.py"):
        load_plugin(str(file))
    del sys.modules["helper_here"]
    load_plugin(str(tmp_path / "helper_here.py"))
    assert load_plugin(str(file)).name == "my_parts"


def test_a_package_without_its_init_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "bare_pack/parts.py", "")
    with pytest.raises(UserError, match=r"'bare_pack' has no __init__.py"):
        load_plugin("bare_pack.parts")


def test_a_part_that_is_replaced_goes_along_no_more():
    """A cell that is run again: elsewhere the new part alone is registered."""
    stamps = []
    for value in (1, 2):
        exec(f"register('mine', {value})", {"__name__": "__main__", "register": register_toy})
        stamps += stamps_of([("model", "mine")])
    assert TABLE == {"mine": 2} and len({*stamps}) == 2
    assert [plugin.stamp for plugin in plugins._loaded.values()] == stamps[1:]
    with pytest.raises(UserError, match="not loaded any more"):
        write_sources(Path("nowhere"), stamps[:1])


def test_a_part_of_a_script_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(plugins, "LARGEST", 1000)
    exec("register('mine', 'x' * 2000)", {"__name__": "__main__", "register": register_toy})
    with pytest.raises(UserError, match="let it read its data from a file"):
        stamps_of([("model", "mine")])


def test_two_plugins_of_one_name_are_refused(tmp_path):
    load_plugin(str(write(tmp_path / "one/my_parts.py", "")))
    with pytest.raises(UserError, match="two plugins my_parts"):
        load_plugin(str(write(tmp_path / "two/my_parts.py", "x = 1\n")))


# The user's word


def named(tmp_path, *, text=None):
    """A folder with the source of a plugin, its stamp, and the file that it makes when it runs."""
    ran = tmp_path / "ran"
    text = text or TRACE.format(str(ran))
    write(tmp_path / "plugins/my_parts.py", text)
    return Plugin.of_files("my_parts", {"my_parts.py": text}, "").stamp, ran


def test_what_a_file_names_is_not_run_unless_the_user_trusts_it(tmp_path):
    stamp, ran = named(tmp_path)
    with pytest.raises(UserError, match=r"my_parts.py.*--plugin.*--trust-plugins"):
        load_named([stamp], tmp_path / "plugins", named_by=tmp_path / "study.yaml")
    assert not ran.exists()
    trust_files()
    load_named([stamp], tmp_path / "plugins", named_by=tmp_path / "study.yaml")
    assert ran.exists()


def test_what_was_given_already_is_the_users_word(tmp_path):
    stamp, ran = named(tmp_path)
    load_plugin(str(tmp_path / "plugins/my_parts.py"))
    assert ran.exists()
    load_named([stamp], tmp_path / "plugins", named_by=tmp_path / "study.yaml")


def test_source_that_was_changed_is_refused_before_it_runs(tmp_path):
    stamp, ran = named(tmp_path)
    file = tmp_path / "plugins/my_parts.py"
    file.write_text(file.read_text() + "# and more\n")
    trust_files()
    with pytest.raises(UserError, match="not the code that this was made with"):
        load_named([stamp], tmp_path / "plugins", named_by=tmp_path / "study.yaml")
    load_plugin(str(file))
    ran.unlink()
    with pytest.raises(UserError, match="made with another my_parts"):
        load_named([stamp], tmp_path / "plugins", named_by=tmp_path / "study.yaml")
    assert not ran.exists()


def test_plugins_that_a_file_names_may_import_each_other(tmp_path):
    texts = {"a_first": "from z_last import VALUE\nassert VALUE == 3\n", "z_last": "VALUE = 3\n"}
    stamps = []
    for name, text in texts.items():
        write(tmp_path / f"{name}.py", text)
        stamps.append(Plugin.of_files(name, {f"{name}.py": text}, "").stamp)
    trust_files()
    load_named(stamps, tmp_path, named_by=tmp_path / "x")
    assert sys.modules["a_first"].VALUE == 3


@pytest.mark.parametrize("by", ["file", "module"])
def test_a_recipes_plugins_need_the_users_word(tmp_path, monkeypatch, by):
    monkeypatch.syspath_prepend(tmp_path / "path")
    ran = tmp_path / "ran"
    for folder in ("here", "path"):
        write(tmp_path / folder / f"parts_{folder}.py", TRACE.format(str(ran)))
    reference = {"file": "parts_here.py", "module": "parts_path"}[by]
    recipe = tmp_path / "here/recipe.yaml"
    with pytest.raises(UserError, match=f"--plugin {reference}"):
        load_references([reference], named_by=recipe)
    assert not ran.exists()
    trust_files()
    (found,) = load_references([reference], named_by=recipe)
    assert ran.exists() and plugins._loaded == {found.name: found}


def test_a_configuration_file_loads_its_plugins(tmp_path):
    stamp, ran = named(tmp_path)
    config = DistillConfig(plugins=(stamp,))
    write(tmp_path / "config.yaml", config.to_yaml())
    with pytest.raises(UserError, match="--trust-plugins"):
        DistillConfig.from_yaml(tmp_path / "config.yaml")
    with plugins.files_trusted(True):
        assert DistillConfig.from_yaml(tmp_path / "config.yaml") == config
    assert ran.exists() and not plugins._trusts_files


@pytest.mark.parametrize("value", ["parts", ["parts"], [3], ["parts@12"], ["../x@" + "0" * 64]])
def test_what_is_no_stamp_is_refused(tmp_path, value):
    trust_files()
    with pytest.raises(UserError, match="NAME@SHA256"):
        load_named(value, tmp_path, named_by=tmp_path / "x")
    with pytest.raises(UserError):
        DistillConfig.from_dict({"plugins": value})


@pytest.mark.parametrize(
    "values", [{"study": [1]}, {"study": 3}, {"study": {"distill": [1]}}, {}, {"study": None}]
)
def test_a_damaged_study_names_none(values):
    assert plugins.stamps_in_study(values) == ()


def test_the_source_is_part_of_the_fingerprint():
    one, two = (DistillConfig(plugins=(f"p@{digit * 64}",)).fingerprint() for digit in "ab")
    assert len({one, two, DistillConfig().fingerprint()}) == 3


# Where they go


def test_sources_that_were_written_are_read_back(tmp_path):
    text = PART.format(name="a", value=1)
    found = load_plugin(str(write(tmp_path / "my_parts.py", text)))
    assert write_sources(tmp_path / "out", [found.stamp]) == ["plugins/my_parts.py"]
    assert (tmp_path / "out/plugins/my_parts.py").read_text() == text


def test_another_process_gets_them_with_what_is_pickled(tmp_path):
    file = write(tmp_path / "here/my_parts.py", PART.format(name="a", value=41))
    found = load_plugin(str(file))
    load_plugin(str(write(tmp_path / "here/others.py", "1 / 0 if __name__ != 'others' else 0\n")))
    (tmp_path / "carried.pkl").write_bytes(pickle.dumps(LoadedPlugins((found.stamp,))))
    file.unlink()  # another machine has no such file
    done = in_new_process(
        "import pickle, inspect; pickle.load(open('carried.pkl', 'rb'))\n"
        "from ekd_ray.config.plugins import stamps_of\n"
        "import my_parts, test_plugins\n"
        "import sys; assert 'others' not in sys.modules, 'only what is used goes along'\n"
        "print(test_plugins.TABLE, *stamps_of([('model', 'a')]), inspect.getsource(my_parts))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{{'a': 41}} {found.stamp} {found.files['my_parts.py']}\n"


def test_what_a_script_registers_goes_by_value(tmp_path):
    script = write(
        tmp_path / "script.py",
        "import pickle\n"
        "from test_plugins import register_toy, TABLE\n"
        "from ekd_ray.config.plugins import LoadedPlugins, stamps_of\n"
        "FACTOR = 6\n"
        "def build(x):\n    return FACTOR * x\n"
        "register_toy('mine', lambda x: 0)\n"
        "register_toy('mine', build)  # a cell that is run again\n"
        "(stamp,) = stamps_of([('model', 'mine')])\n"
        "assert stamps_of([('model', 'mine')]) == (stamp,)\n"
        "open('carried.pkl', 'wb').write(pickle.dumps(LoadedPlugins((stamp,))))\n"
        "print(stamp)\n",
    )
    first = in_new_process(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')",
                           tmp_path)  # fmt: skip
    assert first.returncode == 0, first.stderr
    done = in_new_process(
        "import pickle; pickle.load(open('carried.pkl', 'rb'))\n"
        "from ekd_ray.config.plugins import stamps_of\n"
        "from test_plugins import TABLE\n"
        "print(TABLE['mine'](7), *stamps_of([('model', 'mine')]))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"42 {first.stdout}"


def test_installed_packages_bring_their_plugins_and_a_broken_one_stops_nobody(tmp_path):
    write(tmp_path / "good_one.py", PART.format(name="good", value=1))
    write(tmp_path / "bad_one.py", "1 / 0\n")
    entries = "[ekd_ray.plugins]\na = bad_one\nb = good_one\n"
    info = tmp_path / "some_parts-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: some-parts\nVersion: 1.0\n")
    write(info / "entry_points.txt", entries)
    code = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ekd_ray.config.plugins import load_installed, stamps_of\n"
        "load_installed(); load_installed()\n"
        "from test_plugins import TABLE\n"
        "print(json.dumps([TABLE, stamps_of([('model', 'good')])]))"
    )
    done = in_new_process(code, "/")
    table, stamps = json.loads(done.stdout)
    assert table == {"good": 1} and stamps[0].startswith("good_one@")
    assert done.stderr.count("ZeroDivisionError") == 1
