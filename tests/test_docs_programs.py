"""The programs in the documents run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from ekd_ray.data import load_dataset
from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.models import build_model, save_weights

DOCS = Path(__file__).parents[1] / "docs"


def programs(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def teacher_of_digits() -> torch.nn.Module:
    """A resnet8 that has learned a little."""
    arrays = load_dataset("digits", "train")
    torch.manual_seed(0)
    model = build_model("resnet8", 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for rows in torch.arange(20 * 64).split(64):
        images = torch.from_numpy(arrays.images[rows]).float() / 255
        labels = torch.from_numpy(arrays.labels[rows])
        optimizer.zero_grad()
        functional.cross_entropy(model((images - 0.5) / 0.5), labels).backward()
        optimizer.step()
    return model.eval()


def test_the_loop_of_the_caches_page_distils_from_an_exported_table(
    launch, monkeypatch, tmp_path
) -> None:
    """Filled, exported, read: its views are those that the teacher saw, and its student learns."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    teacher = teacher_of_digits()
    path = tmp_path / "teacher.safetensors"
    save_weights(
        teacher, path, model_name="resnet8", num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    code, _, error = launch(
        "cache", "fill", "--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8",
        "--teacher-weights", path, "--epochs", 2, "--train-subset", 128, "--method", "kd",
        "--set", "validation_fraction=0.25", "--set", "batch_size=16",
        "--set", "precision=float32", "--quiet",
    )  # fmt: skip
    assert code == 0, error
    (table,) = list_tables()
    code, out, _ = launch("cache", "export", table.folder.name[:14], "--out", "labels.parquet")
    assert code == 0 and out.startswith(f"labels.parquet: {table.filled} rows, ")
    assert launch("cache", "export", "nothing", "--out", "labels.csv")[0] == 2
    (program,) = programs("cache.md")
    found: dict = {}
    torch.manual_seed(0)
    exec(program, found)  # our own page
    pictures = torch.stack([found["make_view"](*row) for row in found["rows"]]) / 255
    with torch.no_grad():
        asked = teacher((pictures - 0.5) / 0.5)
        student = found["student"](pictures)
    assert len(found["rows"]) == table.filled
    np.testing.assert_allclose(found["logits"], asked, rtol=2e-3, atol=2e-3)
    soft = (asked / 4).softmax(1)
    chance, learnt = (
        functional.kl_div(answers, soft, reduction="batchmean").item()
        for answers in (soft.mean(0).log().expand_as(soft), (student / 4).log_softmax(1))
    )
    assert learnt < 0.7 * chance
