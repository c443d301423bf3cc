"""The guides for people who call from Python: the loops of their own, and the notebook."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL)


def defined(code: str, name: str):
    namespace: dict = {}
    exec(code, namespace)  # our own page
    return namespace[name]


def easy_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images [8, 3, 32, 32] whose colour is their class."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(3, (8,), generator=generator) for _ in range(count)]
    return [(nn.functional.one_hot(y, 3)[:, :, None, None].expand(-1, -1, 32, 32).float(), y)
            for y in labels]  # fmt: skip


def small_student() -> nn.Module:
    """Sees colours alone, which is quick to learn."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


class Knowing(nn.Module):
    """A teacher that knows the classes."""

    def forward(self, images):
        return 5 * images.mean(dim=(2, 3))


def test_the_plain_loop_distils() -> None:
    distil = defined(blocks("own-loop.md")[0], "distil")
    losses = distil(small_student(), Knowing(), easy_batches(12), epochs=4)
    assert len(losses) == 48
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


@pytest.mark.slow  # Lightning is slow to import
def test_the_lightning_module_distils(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    module = defined(blocks("own-loop.md")[1], "Distillation")
    model = module(small_student(), Knowing())
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(easy_batches(12), batch_size=None)
    trainer.fit(model, batches, batches)
    assert trainer.callback_metrics["val_top1"] > 0.9
    assert {"train_ce", "train_kd", "train_ekd"} <= trainer.callback_metrics.keys()


def test_examples_of_a_loop_have_at_most_forty_lines() -> None:
    assert all(code.count("\n") <= 40 for code in blocks("own-loop.md"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
        filter(None, [str(GUIDE.parents[1]), os.environ.get("PYTHONPATH")])))  # fmt: skip
    notebook = nbformat.read(GUIDE / "python.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    nbclient.NotebookClient(
        notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    kinds = set(itertools.chain.from_iterable(shown))
    assert "text/html" in kinds  # the study, the bundle and the tables
    assert any("Study" in str(data.get("text/html")) for data in shown)
    assert any("plotly" in kind for kind in kinds)
