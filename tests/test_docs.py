"""The documents: their commands are legal, the example of a method works, the settings' tables
and the site build."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launchers_run import parser_of
from torch.nn import functional

import ekd_ray as ekd
from ekd_ray.cli.main import COMMANDS, command_parser
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.method_settings import ORIGINS
from ekd_ray.data import DATASETS
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, resolve_method
from ekd_ray.losses.objective import Objective
from ekd_ray.testing import check_method

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's method, registered for one test by the import in its proof."""
    page, proof = python_blocks(GUIDE / "own-method.md")
    (tmp_path / "jsd.py").write_text(page)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict = {}
    exec(proof, namespace)  # our own page
    yield {**vars(sys.modules.pop("jsd")), **namespace}
    del METHODS["jsd"]


def test_the_example_of_a_method_is_the_jensen_shannon_divergence(example):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    p, q = (functional.softmax(z / 4.0, dim=1) for z in (student, teacher))
    m = (p + q) / 2
    kl = [torch.distributions.Categorical(probs=x) for x in (p, q, m)]
    expected = sum(torch.distributions.kl_divergence(x, kl[2]).mean() for x in kl[:2]) / 2 * 16
    assert example["jsd_loss"](student, teacher, 4.0).item() == pytest.approx(expected.item())
    objective = Objective(resolve_method(DistillConfig(method="jsd")))
    target = torch.randint(7, (5,), generator=generator)
    total, terms = objective(student, teacher, target, 1)
    ce = functional.cross_entropy(student, target)
    assert terms["kd"].item() == pytest.approx(expected.item())
    assert total.item() == pytest.approx(0.1 * ce.item() + 0.9 * expected.item(), rel=1e-6)


def test_the_example_of_a_method_passes_the_conformance_suite(example):
    example["test_jsd"]()


def test_the_example_of_a_data_set_passes_the_conformance_suite(tmp_path, monkeypatch):
    page, proof = python_blocks(GUIDE / "own-data.md")
    (tmp_path / "birds.py").write_text(page)
    draw, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 30), ("test", 9)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "birds.npz", **arrays)
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        exec(proof, {})  # our own page
        assert DATASETS["birds"].class_names == ("robin", "wren", "owl")
    finally:
        DATASETS.pop("birds", None)
        sys.modules.pop("birds", None)


@pytest.mark.slow
def test_the_example_of_features_passes_the_conformance_suite():
    file = GUIDE / "attention_transfer.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
    namespace = runpy.run_path(str(file))
    try:
        check_method("at")
    finally:
        del METHODS["at"]
    # Maps of one and four places: rows of norm 1 that differ in both squares.
    student, teacher = torch.ones(2, 3, 2, 2), torch.zeros(2, 5, 2, 2)
    teacher[:, :, 0, 0] = 2.0
    expected = ((0.5 - 1) ** 2 + 3 * 0.5**2) / 4
    assert namespace["attention_loss"](student, teacher).item() == pytest.approx(expected)


REFERENCE = runpy.run_path(str(ROOT / "docs" / "write_reference.py"))


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_the_pages_of_reference_say_what_the_code_does(name: str) -> None:
    """Else run `make reference`."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert REFERENCE["fill_page"](page) == page


def test_the_reference_has_every_setting_flag_and_name() -> None:
    pages = {
        name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in REFERENCE["PAGES"]
    }
    rows = re.findall(r"^\| `(\w+)` \|", pages["reference/settings.md"], re.MULTILINE)
    names = {*DistillConfig.names()} - {*ORIGINS}  # those of examples, which stay
    assert sorted(rows) == sorted([*names, *StudyConfig.names()])
    assert "| `validation_fraction` | float | `0.1` |" in pages["reference/settings.md"]
    assert ">= 0; <= 0.5 |" in pages["reference/settings.md"]
    for name in COMMANDS:
        part = pages["reference/commands.md"].partition(f"### ekd-ray {name}\n")[2]
        assert command_parser(name).description in part.partition("\n### ")[0]
    for name in {*ekd.__all__} - {"losses", "DistillConfig", "StudyConfig"}:
        assert f"\n### {name}\n" in pages["reference/python.md"]


def test_the_page_of_commands_begins_with_all_of_them() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    table = page.partition("| command | |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(rows))) == sorted(COMMANDS)


def test_the_tables_of_methods_show_what_is_registered():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.search(
        r"^\| `temperature` \|  \|  \| 4 \| 4 \| 4 \|  \| 4 \|  \|  \| 4 \| 8 \| 1 \|",
        page,
        re.MULTILINE,
    )
    assert "| `instance`, `class`, `batch` | `kd_weight` |  | `mlkd`, `mlkd+ekd` |" in page
    assert "| `evidential` | `log_prior` -3 to 1 |" in page


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guide" / "digits.html").exists()
    settings = (tmp_path / "reference" / "settings.html").read_text(encoding="utf-8")
    assert "teacher_normalization" in settings


def commands(page: Path) -> list[list[str]]:
    """Every command or launcher with its arguments in a page's blocks; "..." is in none."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    start = re.compile(r"(?:^|\s)(?:python (launchers/.*)|ekd-ray (.*))")
    found = (start.search(line) for line in lines)
    typed = [shlex.split(match[1] or match[2], comments=True) for match in found if match]
    return [words for words in typed if "..." not in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_the_flags_that_are_shown(page: Path) -> None:
    for program, *arguments in commands(page):
        launcher = program.startswith("launchers/")
        parser = parser_of(ROOT / program) if launcher else command_parser(program)
        try:
            parser.read(arguments)
        except UserError as error:
            pytest.fail(f"{program} {shlex.join(arguments)}: {error}")


def test_the_commands_of_the_documents_are_found() -> None:
    """Else the test above would pass with none."""
    found = [words[0] for page in PAGES for words in commands(page)]
    assert len(found) > 25
    assert {*found} >= {*COMMANDS} - {"compare"}
    assert any(name.startswith("launchers/") for name in found)


RECIPES = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if re.search("^space:", block, re.MULTILINE)
]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[page for page, _ in RECIPES])
def test_every_recipe_can_be_searched(page: str, text: str, launch, tmp_path: Path) -> None:
    if "authors." in text:  # it refers to what its pair's recipe says
        text = f"extends: cifar100/resnet32x4-resnet8x4\n{text}"
    (tmp_path / "recipe.yaml").write_text(text)
    code, out, err = launch("space", "show", tmp_path / "recipe.yaml", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["points"]) == 5


def test_three_pages_have_recipes() -> None:
    assert {page for page, _ in RECIPES} >= {"digits.md", "own-data.md", "search.md"}
