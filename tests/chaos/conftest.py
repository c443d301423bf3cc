"""A Ray of its own for what is killed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_run import processes


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A folder of Ray's own, so that the study's processes are known by it, and its cache."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds Ray's processes through /proc")
    folder = Path(tempfile.mkdtemp(prefix="ekd"))  # sockets want a short path
    yield {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "EKD_CACHE_DIR": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    for pid in processes({"RAY_TMPDIR": str(folder)}):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
