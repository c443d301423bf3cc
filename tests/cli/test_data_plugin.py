"""The data set of the guide as a plugin: run, filled for, searched by Ray, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from launchers_run import command

from ekd_ray.data import DATASETS, load_dataset, register_dataset

SPLITS = ("train", "test")
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "own-data.md"
RUN = ("--plugin", "birds.py", "--dataset", "birds", "--data-root", ".", "--student", "resnet8",
       "--set", "method=none", "--set", "validation_fraction=0.25", "--set", "batch_size=15",
       "--epochs", "1")  # fmt: skip


@pytest.fixture
def birds(tmp_path, monkeypatch):
    """birds.py as the guide has it, and birds.npz: 60 and 20 pictures of three classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    (plugin,) = re.findall(r"```python\n(# birds.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "birds.py").write_text(plugin)
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in zip(SPLITS, (60, 20), strict=True):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "birds.npz", **arrays)
    return tmp_path


@pytest.mark.slow  # test_plugin_flags.py has a run with parts of one's own
def test_one_run(birds):
    done = command("distill", *RUN, "--out", "run", "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads((birds / "run/result.json").read_text())
    config = yaml.safe_load((birds / "run/config.yaml").read_text())
    assert [stamp.partition("@")[0] for stamp in config["plugins"]] == ["birds"]
    with np.load("birds.npz") as found:
        arrays = {split: (found[f"{split}_images"], found[f"{split}_labels"]) for split in SPLITS}
    register_dataset("same", arrays.get)
    try:
        assert result["data_fingerprint"] == load_dataset("same", "train").fingerprint
    finally:
        del DATASETS["same"]
    # No plugin, no such data; and the file it reads is looked for before anything else.
    refused = command("distill", *RUN[2:], "--dry-run")
    assert refused.returncode == 2 and "unknown dataset 'birds'" in refused.stderr
    (birds / "birds.npz").unlink()
    refused = command("distill", *RUN, "--dry-run")
    assert refused.returncode == 2 and "birds reads birds.npz, which is not in" in refused.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_search(birds):
    """Each trial runs in a process of Ray, which knows the name by the plugin that came along."""
    done = command("tune_cifar", *RUN, "--out", "study", "--trials", "2", "--seeds", "1",
                   "--top-k", "1", "--max-concurrent", "1", "--quiet")  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    configs = [yaml.safe_load(p.read_text()) for p in birds.glob("study/trials/*/config.yaml")]
    assert [config["dataset"] for config in configs] == ["birds"] * 2
