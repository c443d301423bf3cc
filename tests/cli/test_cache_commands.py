"""launchers/cache.py: the tables of the teacher cache, listed, filled, verified, removed."""

import functools
import json
import os
import shutil
import time

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.models import build_model, save_weights


@pytest.fixture
def cache(launch, monkeypatch, tmp_path):
    """The launcher, over an empty cache."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    return functools.partial(launch, "cache")


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    save_weights(
        build_model("resnet8", 10), path, model_name="resnet8", num_classes=10,
        mean=(0.5,) * 3, std=(0.5,) * 3, log_prior=-0.7,
    )  # fmt: skip
    return path


RUN = ("--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--epochs", 2,
       "--train-subset", 80, "--set", "validation_fraction=0.25",
       "--set", "batch_size=20")  # fmt: skip


def test_fill_then_a_run_asks_nothing(cache, teacher, monkeypatch):
    code, out, _ = cache("fill", *RUN, "--teacher-weights", teacher, "--seeds", "3,4", "--json")
    assert code == 0
    # 60 training images, 2 epochs, 2 seeds; few draws of 81 views coincide.
    computed = json.loads(out)["computed"]
    assert 220 <= computed <= 240
    (table,) = list_tables()
    assert table.filled == computed and table.rows == 1438 * 81
    code, out, _ = cache("fill", *RUN, "--teacher-weights", teacher, "--seeds", "3")
    assert code == 0 and out.splitlines()[-1].startswith("0 rows computed")
    monkeypatch.setattr(
        "ekd_ray.engine.teacher.source._network", lambda *a: pytest.fail("the network was asked")
    )
    config = DistillConfig(
        dataset="digits", teacher="resnet8", student="resnet8", teacher_weights=str(teacher),
        method="ekd", epochs=2, train_subset=80, validation_fraction=0.25, batch_size=20, seed=4,
    )  # fmt: skip
    assert distill(config, threads=1).metrics["epoch"] == 2


@pytest.mark.parametrize(("epochs", "rows"), [(2, 2 * 3 * 60), (1000, 60 * 81)])
def test_a_dry_fill_counts_and_computes_nothing(cache, teacher, epochs, rows):
    """60 training images have 81 views each."""
    flags = ("--teacher-weights", teacher, "--seeds", "3,4,5", "--epochs", epochs, "--dry-run")
    code, out, error = cache("fill", *RUN, *flags)
    assert code == 0, error
    assert f"rows       at most {rows:,}, those that 3 seeds will read" in out
    assert json.loads(cache("fill", *RUN, *flags, "--json")[1])["epochs"] == epochs
    assert not list(list_tables())


def test_list_verify_and_remove(cache, teacher):
    assert cache("ls")[1].startswith("no tables")
    cache("fill", *RUN, "--teacher-weights", teacher)
    (table,) = list_tables()
    name = table.folder.name
    assert name.startswith("resnet8-digits-")
    code, out, _ = cache("ls")
    assert code == 0 and name in out and str(1438 * 81) in out
    (listed,) = json.loads(cache("ls", "--json")[1])
    assert listed["filled"] == table.filled and listed["dataset"] == "digits"
    assert cache("verify")[0] == 0
    rows = table.folder / "rows.bin"
    content = bytearray(rows.read_bytes())
    place = next(i for i in range(0, len(content), 20) if any(content[i : i + 20]))
    content[place] ^= 1
    rows.write_bytes(content)
    code, out, _ = cache("verify", name[:12], "--json")
    assert code == 1 and json.loads(out) == {name: {"sound": table.filled - 1, "damaged": 1}}
    assert cache("rm")[0] == 2
    assert cache("rm", "--unused-days", 1)[0] == 0 and table.folder.exists()
    old = time.time() - 2 * 86400
    for path in table.folder.iterdir():
        os.utime(path, (old, old))
    assert cache("rm", "--unused-days", 1)[1] == f"removed {name}\n"
    assert not table.folder.exists()


def test_a_damaged_table_is_named_and_the_others_are_looked_at(cache, teacher):
    cache("fill", *RUN, "--teacher-weights", teacher)
    (table,) = list_tables()
    damaged = table.folder.with_name("aaa-damaged")
    shutil.copytree(table.folder, damaged)
    meta = json.loads((damaged / "meta.json").read_text())
    (damaged / "meta.json").write_text(json.dumps({**meta, "num_samples": None}))
    code, out, err = cache("ls", "--json")
    assert (code, [row["table"] for row in json.loads(out)]) == (0, [table.folder.name])
    assert damaged.name in err and err.count("\n") == 1
    code, out, err = cache("verify", "--json")
    assert code == 1 and [*json.loads(out)] == [table.folder.name] and damaged.name in err
    damaged.with_name("aaa-link").symlink_to(teacher.parent)
    assert cache("rm", "aaa-link")[0] == cache("rm", damaged.name)[0] == 0
    assert teacher.exists() and not damaged.exists() and cache("verify")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fill", *RUN], "teacher-weights"),
        (["fill", *RUN, "--method", "none"], "has no teacher"),
        (["fill", *RUN, "--seeds", "1,x"], "--seeds takes whole numbers"),
        (["verify", "nothing"], "no table of the teacher cache"),
        (["rm"], "rm removes named tables"),
    ],
)
def test_mistakes_end_with_one_sentence(argv, words, cache):
    code, out, err = cache(*argv)
    assert code == 2 and words in err and err.count("\n") == 1 and not out


def test_a_quiet_fill_prints_nothing(cache, teacher):
    fill = ("fill", *RUN, "--teacher-weights", teacher, "--quiet")
    assert cache(*fill) == (0, "", "")
    (table,) = list_tables()
    assert table.filled
