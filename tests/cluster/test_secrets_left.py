"""Known secrets are in a driver's environment, and in nothing that its study leaves anywhere.

Two real studies, one with a Ray of its own and one on a cluster of two nodes; of both every file
is read, Ray's logs among them, and its mode looked at.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_marks import IN_CHAOS
from clusters import cluster

from ekd_ray.results import Study

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
NAMES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN",
    "GOOGLE_API_KEY", "GCS_HMAC_SECRET", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_SECRET", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "EKD_CANARY_DATABASE",
)  # fmt: skip
CANARIES = {name: f"canary{zlib.crc32(name.encode()):08x}secret" for name in NAMES}
STUDY = (
    "--dataset", "digits", "--pair", "resnet20-resnet8", "--method", "none",
    "--train-subset", "120", "--epochs", "1", "--trials", "2", "--seeds", "1", "--top-k", "1",
    "--max-concurrent", "2",
    "--set", "baselines=[]", "--set", "champions=[]",
)  # fmt: skip


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder with a short path, for all that a user has: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="ekd"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(environment: dict[str, str], root: Path, *argv: str) -> str:
    """What a command printed, all of it."""
    places = {
        "HOME": str(root / "home"), "TMPDIR": str(root / "tmp"),
        "EKD_CACHE_DIR": str(root / "cache"), "MLFLOW_TRACKING_USERNAME": "me",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    for name in ("home", "tmp"):
        (root / name).mkdir(exist_ok=True)
    printed = ""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-m", "ekd_ray", *argv], cwd=root, text=True, timeout=900,
            capture_output=True, env={**environment, **CANARIES, **places},
        )  # fmt: skip
        printed += done.stdout + done.stderr
        if "Ray did not start in time" not in done.stderr:  # as on a machine that is too busy
            break
        argv = (*argv, "--resume")
    assert done.returncode == 0, printed
    return printed


def check_no_canary(printed: str, *folders: Path) -> list[Path]:
    """All files below the folders, in none of which a canary is, nor in the names."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for name, canary in CANARIES.items():
        assert canary not in printed, f"{name} was printed"
        assert not [path for path in files if canary in str(path)]
        found = [path for path in files if canary.encode() in path.read_bytes()]
        assert not found, f"{name} is in {found}"
    return files


def check_modes(files: list[Path], *, forbidden: int = 0, wanted: int = 0) -> None:
    """Every file, and the folder in which it lies, has the bits that the umask leaves it."""
    for path in {*files, *(path.parent for path in files)}:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & forbidden and mode & wanted == wanted, f"{path} has {mode:o}"


def test_a_study_with_a_ray_of_its_own(root: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "RAY_TMPDIR": str(root)}
    storage = f"sqlite:///file:{root / 'optuna.db'}?uri=true&token=${{EKD_CANARY_DATABASE}}"
    own_word = ("--optuna-storage", storage, "--track", f"mlflow:sqlite:///{root / 'mlflow.db'}")
    before = os.umask(0o077)
    try:
        printed = run(
            environment, root, "tune", *STUDY, *own_word, "--keep-ray-logs", "--out", "run"
        )
        folder = max(root.glob("ekd+?????"), key=lambda path: path.stat().st_mtime)
        assert str(folder) in printed
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        logs = {path.name for path in folder.rglob("*.log")}
        assert {"raylet.out", "gcs_server.out"} < {p.name for p in folder.rglob("*.out")}
        assert "runtime_env_agent.log" in logs, "the file that once had the keys"
        printed += run(environment, root, "export", "run", "--out", "best")
        files = check_no_canary(printed, root)
        assert len(files) > 100
        rays = [path for path in files if path.relative_to(root).parts[0].startswith("ekd+")]
        ours = [path for path in files if path not in rays and path.parent != root]
        check_modes(ours, forbidden=0o077)
        # Nothing is kept where nobody asked for it.
        printed = run(environment, root, "tune", "--resume", "--out", "run", *own_word)
        check_no_canary(printed, root)
        assert not [*root.glob("ekd.*")]
    finally:
        os.umask(before)


@IN_CHAOS  # faster: the one before
def test_a_study_on_two_nodes(root: Path) -> None:
    before = os.umask(0o002)
    try:
        with cluster() as made:
            made.add(cpus=1, PYTHONPATH=str(Path(__file__).parents[2]))
            made.add(cpus=1, PYTHONPATH=str(Path(__file__).parents[2]))
            environment = made.environment()
            printed = run(
                environment, root, "tune", *STUDY, "--address", made.address, "--out", "run"
            )
            assert "runtime_env_agent.log" in {path.name for path in made.folder.rglob("*.log")}
            files = check_no_canary(printed, root, made.folder)
            assert len([p for p in files if p.name == "raylet.out"]) == 2
        records = Study.load(root / "run").records()
        assert [record.status for record in records] == ["complete"] * 2
        ours = [path for path in files if path.is_relative_to(root / "run")]
        check_modes(ours, wanted=0o020)
        cached = [path for path in files if path.is_relative_to(root / "cache")]
        cached = [path for path in cached if path.suffix != ".lock"]  # empty
        check_modes(cached, forbidden=0o022)  # whatever the umask: docs/cache.md
    finally:
        os.umask(before)
