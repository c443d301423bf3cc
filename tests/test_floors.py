"""DESIGN's floors: arrows only point down, read from the import statements themselves."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ekd_ray

LIBRARY = Path(ekd_ray.__file__).parent
ROOT = LIBRARY.parent
MODULES = sorted(LIBRARY.rglob("*.py"))
LAUNCHERS = sorted((ROOT / "launchers").glob("*.py"))

BASE = {"config", "objectives", "settings", "yaml_files", "errors", "files", "__version__"}
# Room -> the rooms and modules of the library that it may import besides itself.
FLOORS = {
    "models": {"errors", "files"},
    "losses": BASE,
    "data": BASE,
    "remote": {"errors", "files"},
    "engine": BASE | {"losses", "data", "models"},
    "results": BASE | {"losses", "data", "models", "engine", "remote"},
    "scale": BASE
    | {"losses", "data", "models", "engine"}
    | {"results.study", "results.leaderboard", "results.paired"},
    "errors": set(),
    "files": {"errors"},
    "yaml_files": {"errors"},
    "objectives": {"errors"},
    "settings": {"errors", "yaml_files"},
    "config": {"errors", "objectives", "settings", "yaml_files"},
    "references": {"errors"},
    "recipes": BASE | {"losses", "references"},
}
HEAVY = {"torch", "torchvision", "ray", "optuna", "sklearn", "pyarrow", "tensorboard", "plotly"}


def name_of(path):
    """`scale.space` of ekd_ray/scale/space.py; a package by its own name."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, *, nested=True):
    """(line, dotted name) of every import; `nested=False` only those run at import time."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif nested or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        ):
            pending += ast.iter_child_nodes(node)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_the_walk_sees_imports_of_every_kind():
    tree = ast.parse(
        "import a.b\nfrom c import d\nclass K:\n  import e\n"
        "def f():\n  from g import h\n  if True:\n    import i\n"
    )
    assert {name for _, name in imports(tree)} == {"a.b", "c.d", "e", "g.h", "i"}
    assert {name for _, name in imports(tree, nested=False)} == {"a.b", "c.d", "e"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_only_from_below(path):
    room = name_of(path).split(".")[0]
    if room not in FLOORS:
        # The top floor (cli, commands, pipeline, ...) may import everything.
        assert path.parent == LIBRARY, f"{room} has no line in DESIGN's table of floors"
        return
    allowed = FLOORS[room]
    for line, name in imports(parse(path)):
        package, _, target = name.partition(".")
        if package != "ekd_ray" or target.split(".")[0] == room:
            continue
        legal = any(target == item or target.startswith(f"{item}.") for item in allowed)
        assert legal, f"{path}:{line}: {room} may not import ekd_ray.{target}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_scale_knows_ray_and_optuna(path):
    if name_of(path).split(".")[0] == "scale":
        return
    found = {name.split(".")[0] for _, name in imports(parse(path))} & {"ray", "optuna"}
    if name_of(path) == "results.importance":  # a study in memory, for Optuna's evaluators
        found -= {"optuna"}
    assert not found, f"{path} imports {found}"


def test_no_room_imports_the_top_floor():
    top = {name_of(path) for path in MODULES if path.parent == LIBRARY} - set(FLOORS) - {""}
    assert {"cli", "commands", "pipeline"} <= top
    for path in MODULES:
        if path.parent != LIBRARY or name_of(path) in FLOORS:
            targets = {name.split(".")[1] for _, name in imports(parse(path)) if "." in name
                       and name.startswith("ekd_ray.")}  # fmt: skip
            assert not targets & top, path


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launchers_are_thin_and_start_fast(path):
    """--help must not wait for torch or Ray; and a launcher holds no logic."""
    tree = parse(path)
    tops = [name.split(".") for _, name in imports(tree, nested=False)]
    assert not {parts[0] for parts in tops} & HEAVY
    assert {parts[1] for parts in tops if parts[0] == "ekd_ray"} <= {"cli", "flags"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert not any(isinstance(node, ast.For | ast.While) for node in ast.walk(tree))


@pytest.mark.parametrize("path", [*MODULES, *LAUNCHERS], ids=lambda path: path.stem)
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def modules_after(code):
    """Names of the modules that a new process has loaded after `code`."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout))


def test_the_command_line_loads_nothing_heavy():
    loaded = modules_after(
        "import ekd_ray.cli as cli, ekd_ray.flags as flags\n"
        "args = flags.parser('x', search=True).parse_args(\n"
        "    ['--dataset', 'digits', '--pair', 'resnet20-resnet8'])\n"
        "cli.study_config(args)"
    )
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_a_trial_does_not_wait_for_what_only_others_need():
    loaded = modules_after("import ekd_ray.engine.distill, ekd_ray.scale.worker")
    slow = {"sklearn", "scipy.stats", "torch._dynamo", "torch.distributed.fsdp", "triton"}
    assert "torch" in loaded and not loaded & {*slow, "torch.distributed.tensor"}
