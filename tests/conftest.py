"""Shared by every test: one cache of decoded images, one torch thread."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launchers_run import run_here
from memory_groups import MEMORY_LIMITS

from ekd_ray.errors import continue_with


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that `quick_ids` does not name are slow. Files that start Ray come first: one begun
    last would keep a single worker waiting."""
    for item in items:
        quick = item.get_closest_marker("quick_ids")
        if quick and not any(text in item.name for text in quick.args):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many inputs the fuzzers tried."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "fuzz":
                terminalreporter.write_line(f"fuzz: {value}")


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's cache is read or written; figures do not depend on cores."""
    before = os.environ.get("EKD_CACHE_DIR")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers: what one has decoded the others find
    os.environ["EKD_CACHE_DIR"] = str(folder / "ekd-cache")
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["EKD_CACHE_DIR"]
    else:
        os.environ["EKD_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def _nothing_to_continue() -> Iterator[None]:
    """A command that a test ran in this process is not what a later one's message names."""
    yield
    continue_with(None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of one's own: who writes its pid to `cgroup.procs` there gets no more than
    `limit_memory` says, and is killed by the kernel when it needs more."""
    root = Path("/sys/fs/cgroup")
    root = root / "memory" if (root / "memory").is_dir() else root
    folder = root / f"ekd-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    if not any((folder / name).exists() for name in MEMORY_LIMITS):
        folder.rmdir()
        pytest.skip("control groups do not limit memory here")
    yield folder
    for _ in range(100):  # until the kernel has let go of who was in it
        try:
            return folder.rmdir()
        except OSError:
            time.sleep(0.1)


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """A launcher or command in this process, in a folder of its own: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EKD_DATA_ROOT", raising=False)

    def run(name: str, *argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_here(name, *argv)
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, captured.out, captured.err

    return run
