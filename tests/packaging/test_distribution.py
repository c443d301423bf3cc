"""What would be published: every file of it, and that it works from an empty folder."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

import ekd_ray

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "search_spaces").rglob("*.yaml"))


def clean_environment() -> dict[str, str]:
    """Variables for a process that is to know nothing of this one's ekd_ray and Ray."""
    ours = ("EKD_", "RAY_", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@dataclass(frozen=True)
class Artefacts:
    """What would be published."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Built from the checkout, the wheel from the source archive; or those in $EKD_DIST."""
    given = os.environ.get("EKD_DIST")
    folder = Path(given) if given else tmp_path_factory.mktemp("dist")
    if not given:
        build = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True, text=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Artefacts(sdist.resolve(), wheel.resolve())


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder that was empty when commands began in it."""

    environment: Path
    folder: Path

    def run(self, program: str, *arguments: object) -> str:
        """Run a program of the environment in the folder; returns its standard output."""
        home = self.environment / "home"
        done = subprocess.run(
            [self.environment / "bin" / program, *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, check=False, timeout=800,
            env={**clean_environment(), "HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
                 "EKD_CACHE_DIR": str(home / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a fresh environment, beside the packages that this process has.

    They are found through a path file, which does not read the path files beside them: so an
    editable installation of the checkout is not seen.
    """
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
         "--no-deps", artefacts.wheel], check=True, env=clean_environment(),
    )  # fmt: skip
    (packages,) = environment.glob("lib/python*/site-packages")
    shared = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "shared.pth").write_text("\n".join(shared))
    (environment / "home").mkdir()
    return Installed(environment, tmp_path_factory.mktemp("empty"))


def files(*folders: str) -> set[str]:
    """The checkout's files, those in a folder if any is named, as they are tracked or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return {name for name in listed if (ROOT / name).is_file()}


def names_in_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_else(artefacts: Artefacts) -> None:
    metadata = f"ekd_ray-{ekd_ray.__version__}.dist-info"
    expected = {
        *files("ekd_ray"),
        *(f"ekd_ray/{name}" for name in files("search_spaces")),
        *(f"{metadata}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt",
                                            "licenses/LICENSE", "top_level.txt")),
    }  # fmt: skip
    found = names_in_wheel(artefacts.wheel)
    assert found - expected == set()
    assert expected - found == set()
    archive = zipfile.ZipFile(artefacts.wheel)
    for recipe in RECIPES:
        assert archive.read(f"ekd_ray/{recipe}") == (ROOT / recipe).read_bytes()


def test_the_source_archive_holds_what_git_tracks(artefacts: Artefacts) -> None:
    with tarfile.open(artefacts.sdist) as archive:
        members = {PurePosixPath(m.name) for m in archive.getmembers() if m.isfile()}
    found = {str(PurePosixPath(*name.parts[1:])) for name in members}
    made = {name for name in found if name.startswith("ekd_ray.egg-info/")}
    assert found - made - {"PKG-INFO", "setup.cfg"} == files()


def test_the_index_takes_them(artefacts: Artefacts) -> None:
    check = [sys.executable, "-m", "twine", "check", "--strict", artefacts.sdist, artefacts.wheel]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metadata_name_version_licence_and_command(artefacts: Artefacts) -> None:
    archive = zipfile.ZipFile(artefacts.wheel)
    home = f"ekd_ray-{ekd_ray.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{home}/METADATA"))
    assert metadata["Version"] == ekd_ray.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("Project-URL")
    assert archive.read(f"{home}/entry_points.txt").decode().split() == [
        "[console_scripts]", "ekd-ray", "=", "ekd_ray.cli.main:main",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study(installed: Installed) -> Path:
    """The folder of a study of two trials, by the installed command."""
    installed.run("ekd-ray", "--help")
    assert list(installed.folder.iterdir()) == []
    installed.run(
        "ekd-ray", "tune", "--dataset", "digits", "--pair", "resnet20-resnet8",
        "--train-subset", 120, "--epochs", 2, "--trials", 2, "--seeds", 1, "--top-k", 1,
        "--set", "baselines=[none]", "--set", "champions=[authors]", "--set", "teacher=resnet8",
        "--set", "teacher_training={epochs: 1}", "--max-concurrent", 1,
        "--set", "teacher_fill=lazy", "--out", "runs/first",
    )  # fmt: skip
    return installed.folder / "runs" / "first"


def test_the_checkout_is_not_seen(installed: Installed) -> None:
    code = "import ekd_ray, importlib.metadata as m; print(ekd_ray.__file__, m.version('ekd_ray'))"
    path, version = installed.run("python", "-c", code).split()
    assert Path(path).is_relative_to(installed.environment)
    assert version == ekd_ray.__version__


def test_a_study_of_two_trials_leaves_all_that_it_should(installed: Installed, study: Path) -> None:
    assert [path.name for path in installed.folder.iterdir()] == ["runs"]
    assert len(list(study.glob("trials/*/result.json"))) == 2
    page = (study / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script>" in page and "<style>" in page
    code = (
        "import sys, json, numpy as np; from ekd_ray import results;"
        "b = results.Bundle.load(sys.argv[1]); print(json.dumps(b.verify(evaluate=True).problems))"
    )
    assert json.loads(installed.run("python", "-c", code, study / "best")) == []
    environment = json.loads((study / "best" / "environment.json").read_text())
    assert environment["packages"]["ekd_ray"] == ekd_ray.__version__
    assert environment["git_revision"] is None


def test_every_recipe_is_found_and_legal(installed: Installed) -> None:
    code = (
        "from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe\n"
        "for path in SEARCH_SPACES.rglob('*.yaml'):\n"
        "    Recipe.load(path).config\n"
        "    print(path.relative_to(SEARCH_SPACES.parent))"
    )
    found = installed.run("python", "-c", code).splitlines()
    assert sorted(map(Path, found)) == RECIPES


def test_the_image_is_built_from_the_same_wheel(artefacts: Artefacts, tmp_path: Path) -> None:
    """What the Dockerfile copies is enough for it, and its list of packages is the project's."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    build, _, image = text.rpartition("\nFROM ")
    for line in re.findall(r"^COPY (.*)$", build, re.MULTILINE):
        for name in line.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tmp_path / name)
            else:
                shutil.copyfile(ROOT / name, tmp_path / name)
    wheel = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", tmp_path]
    subprocess.run(wheel, check=True, capture_output=True)
    (made,) = (tmp_path / "dist").glob("*.whl")
    assert names_in_wheel(made) == names_in_wheel(artefacts.wheel)
    (script,) = re.findall(r"^RUN (python -c .*?) *\\\n *>", build, re.MULTILINE | re.DOTALL)
    packages = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert packages == [*project["dependencies"], *project["optional-dependencies"]["vit"]]
    assert "--requirement /requirements.txt" in image and "--no-deps /wheel/*.whl" in image
