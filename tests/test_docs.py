"""The documents: the example of a method works, the settings' tables and the site build."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.losses import methods
from ekd_ray.losses.objective import METHODS, Objective, resolve_method

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example():
    """The page's method, registered for one test."""
    loss, entry = python_blocks(GUIDE / "own-method.md")
    namespace = vars(methods).copy()
    exec(loss, namespace)  # our own page
    exec("from __future__ import annotations\n" + entry, namespace)
    yield namespace["jsd_loss"]
    del METHODS["jsd"]


def test_the_example_of_a_method_is_the_jensen_shannon_divergence(example):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    p, q = (functional.softmax(z / 4.0, dim=1) for z in (student, teacher))
    m = (p + q) / 2
    kl = [torch.distributions.Categorical(probs=x) for x in (p, q, m)]
    expected = sum(torch.distributions.kl_divergence(x, kl[2]).mean() for x in kl[:2]) / 2 * 16
    assert example(student, teacher, 4.0).item() == pytest.approx(expected.item())
    objective = Objective(resolve_method(DistillConfig(method="jsd")))
    target = torch.randint(7, (5,), generator=generator)
    total, terms = objective(student, teacher, target, 1)
    ce = functional.cross_entropy(student, target)
    assert terms["kd"].item() == pytest.approx(expected.item())
    assert total.item() == pytest.approx(0.1 * ce.item() + 0.9 * expected.item(), rel=1e-6)


def test_the_tables_of_settings_name_every_setting():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from hooks import on_page_markdown
    finally:
        sys.path.pop(0)
    page = on_page_markdown((ROOT / "docs" / "reference" / "settings.md").read_text())
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == [*DistillConfig.names(), *StudyConfig.names()]
    assert "| `validation_fraction` | float | `0.1` |" in page
    assert ">= 0; <= 0.5 |" in page
    assert "one of `sgd`, `adamw` |" in page


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guide" / "digits.html").exists()
    settings = (tmp_path / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "teacher_normalization" in settings
