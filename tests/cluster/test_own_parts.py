"""docs/guide/own-parts.md as a new user reads it: its commands on a cluster of two nodes that
compute, from a folder that holds the three files and nothing else."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from chaos_marks import IN_CHAOS
from clusters import ROOT, cluster

PAGE = ROOT / "docs/guide/own-parts.md"
PARTS = ROOT / "docs/guide/own-parts"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


def run(command, cwd, environment):
    """A block of the page in a shell; `ekd-ray` is that of this checkout."""
    python = f'ekd-ray() {{ "{sys.executable}" -m ekd_ray "$@"; }}\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", python + command], cwd=cwd, capture_output=True, text=True, timeout=560,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_files_are_as_small_as_the_page_says():
    """Under 40 lines, and nothing of ekd_ray's insides."""
    files = sorted(PARTS.glob("*.py"))
    assert [file.name for file in files] == ["my_method.py", "my_model.py", "my_pictures.py"]
    for file in files:
        assert len(file.read_text().splitlines()) < 40
        tree = ast.walk(ast.parse(file.read_text()))
        modules = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        assert {m for m in modules if m.startswith("ekd_ray")} <= {"ekd_ray", "ekd_ray.losses"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
# tests/cli/test_data_plugin.py and test_plugin_flags.py search with own parts on a Ray of one node.
@IN_CHAOS
def test_parts_of_ones_own_from_search_to_prediction(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for file in PARTS.glob("*.py"):
        shutil.copy(file, here)
    search, again = blocks("bash")
    with cluster() as made:
        for cpus in (0, 1, 1):
            made.add(cpus=cpus, PYTHONPATH=str(ROOT))
        environment = made.environment(EKD_CACHE_DIR=str(tmp_path / "cache"))
        run(search, here, environment | {"RAY_ADDRESS": made.address})
        assert len({*made.node_of_pid().values()}) == 2, "both nodes have trained trials"
    trials = [json.loads(path.read_text()) for path in here.glob("study/trials/*/result.json")]
    assert len(trials) >= 3
    assert all("jsd_share" in trial["params"] for trial in trials)
    # Elsewhere: the bundle and the teacher's weights, none of the three files.
    shutil.copytree(here / "best", there / "best")
    (there / "study/teacher").mkdir(parents=True)
    shutil.copy(here / "study/teacher/teacher.safetensors", there / "study/teacher")
    shutil.rmtree(here)
    found = run(again, there, environment)
    assert found.splitlines()[0] in ("bit-identical", "within-tolerance")
    make = "import numpy as np; from PIL import Image\nimage = np.full((40, 40, 3), 20, np.uint8)\n"
    make += "image[8:32, 8:32] = 200; Image.fromarray(image).save('picture.png')\n"
    (there / "predict.py").write_text(make + blocks("python")[0])
    names = ast.literal_eval(run(f'"{sys.executable}" predict.py', there, environment))
    assert len(names) == 1 and names[0] in ("disc", "square", "cross")
