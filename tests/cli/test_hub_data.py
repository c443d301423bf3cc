"""`hf:PATH` in flags and recipes: seen from where the command was given, like `folder:PATH`."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.models import build_model, save_weights


@pytest.fixture(autouse=True)
def pets(tmp_path, monkeypatch):
    """60 and 20 random pictures of three named classes in tmp_path/pets; and a teacher."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
    }
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "pets").mkdir()
    for split, count in (("train", 60), ("test", 20)):
        rows = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(rows, kind), "label": [i % 3 for i in range(count)]})
        path = tmp_path / f"pets/{split}-00000-of-00001.parquet"
        pq.write_table(table.replace_schema_metadata(meta), path)
    torch.manual_seed(0)
    save_weights(
        build_model("resnet8", 3), tmp_path / "teacher.safetensors", model_name="resnet8",
        num_classes=3, mean=(0.5,) * 3, std=(0.5,) * 3, log_prior=-0.7,
    )  # fmt: skip
    return f"hf:{tmp_path / 'pets'}"


RUN = ("--teacher", "resnet8", "--student", "resnet8", "--teacher-weights", "teacher.safetensors",
       "--set", "validation_fraction=0.25", "--set", "batch_size=15", "--epochs", 2)  # fmt: skip


def test_a_path_is_that_of_the_command(launch, pets):
    code, out, error = launch("distill", "--dataset", "hf:pets", *RUN, "--dry-run", "--json")
    assert code == 0, error
    assert json.loads(out)["dataset"] == pets
    code, out, error = launch(
        "distill", "--dataset", "digits", "--student", "resnet8", "--set", "method=none",
        "--ood-dataset", "hf:./pets", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(out)["ood_dataset"] == pets
    code, out, _ = launch("distill", "--dataset", "hf:pets", *RUN, "--dry-run")
    assert code == 0
    assert f"{pets}: 45 training and 15 validation images of 32 x 32, 3 classes, 162 views" in out
    code, _, error = launch("distill", "--dataset", "hf:dogs", *RUN, "--dry-run")
    assert code == 2 and "dogs" in error


def test_the_teachers_cache_is_filled(launch, pets):
    code, out, error = launch("cache", "fill", "--dataset", "hf:pets", *RUN, "--json")
    assert code == 0, error
    assert 80 <= json.loads(out)["computed"] <= 90  # 45 images, 2 epochs; few views coincide
    (table,) = list_tables()
    assert table.rows == 60 * 162
    assert json.loads(launch("cache", "ls", "--json")[1])[0]["dataset"] == pets
