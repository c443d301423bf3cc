"""Code of a file is never run, and nobody else reads or reaches a study."""

from __future__ import annotations

import ast
from pathlib import Path

import pyarrow as pa
import pytest

import ekd_ray

LIBRARY = Path(ekd_ray.__file__).parent
SOURCES = sorted([*LIBRARY.rglob("*.py"), *(LIBRARY.parent / "launchers").glob("*.py")])
# Modules that execute what they read, and the functions of others that can.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
# Of them, what writes only.
WRITERS = {"dumps", "dump", "Pickler", "register_pickle_by_value", "unregister_pickle_by_value"}
# What was pickled in the same program: a module that was given in Python, which is a plugin
# (test_plugins.py: run on the user's word only), and a job by the pipe of its parent.
OWN_PICKLES = {"given.py": "pickle.loads", "background.py": "pickle.load"}
ARCHIVES = {"tarfile", "zipfile"}


def unsafe_calls(tree):
    """(line, name) of calls that could run code from a file, or write outside of a folder."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        module, _, function = name.rpartition(".")
        known = {
            module in UNSAFE_MODULES and function not in WRITERS,
            name.endswith("torch.load") and words.get("weights_only") != "True",
            name == "np.load" and words.get("allow_pickle") != "False",
            name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load")
            and words.get("Loader") not in ("_Loader", "yaml.SafeLoader"),
            name in ("eval", "exec", "__import__", "os.system"),
            function in ("extractall", "extract", "unpack_archive", "get_pickled_error"),
            words.get("shell") == "True",
        }  # fmt: skip
        if True in known:
            yield node.lineno, name


def unsafe_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES | ARCHIVES:
            yield node.lineno, f"from {node.module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_executes_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [call for call in unsafe_calls(tree) if OWN_PICKLES.get(path.name) != call[1]]
    found = [*calls, *unsafe_imports(tree)]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)", "cloudpickle.loads(b)", "torch.load(p)", "np.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "eval(t)",
        "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)", "tar.extractall(p)",
        "from pickle import load", "subprocess.run(t, shell=True)", "trial.get_pickled_error()",
    ],
)  # fmt: skip
def test_the_scan_sees_it(line):
    tree = ast.parse(line)
    assert list(unsafe_calls(tree)) + list(unsafe_imports(tree))


def test_a_table_cannot_have_a_file_from_elsewhere_exported(tmp_path):
    """`confirm.parquet` names folders: one outside of the study is not followed."""
    import json

    from ekd_ray.config import DistillConfig, StudyConfig
    from ekd_ray.errors import UserError
    from ekd_ray.results.bundle_export import export_bundle
    from ekd_ray.results.study import Study
    from ekd_ray.results.study_reader import write_parquet

    config = DistillConfig(dataset="digits", student="resnet8", method="none")
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    for name in ("model.safetensors", "result.json"):
        (outside / name).write_text("{}")
    (run / "study.yaml").write_text(f"study: {json.dumps(StudyConfig(distill=config).to_dict())}")
    row = {"name": "trial 0", "seed": 1, "config": json.dumps(config.to_dict()), "reason": None}
    rows = [
        {**row, "stage": "select", "folder": "confirm/x", "val_top1": 0.5, "test_top1": None},
        {**row, "stage": "final", "folder": "../outside", "val_top1": None, "test_top1": 0.5},
    ]
    write_parquet(run / "confirm.parquet", pa.Table.from_pylist(rows))
    with pytest.raises(UserError, match=r"names '.*\.\./outside', which lies outside of the study"):
        export_bundle(Study.load(run), tmp_path / "best")
    assert not (tmp_path / "best").exists()


def test_pickles_in_a_studys_scratch_are_gone_before_anything_could_read_them(tmp_path):
    """Ray Tune would restore from them."""
    from ekd_ray.scale.trainer import SCRATCH
    from ekd_ray.studies.pipeline import _sweep

    planted = tmp_path / SCRATCH / "tune" / "tuner.pkl"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    _sweep(tmp_path)
    assert not planted.parent.parent.exists()
