"""The folder of a Ray of our own: private, removed at its end, or by the next start."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ekd_ray.errors import UserError
from ekd_ray.scale import ray_folder
from ekd_ray.scale.ray_folder import KEEP, private_folder

HOLDER = """
import sys
from ekd_ray.scale.ray_folder import private_folder
with private_folder() as folder:
    folder.mkdir()
    (folder / "log").touch()
    print(folder.parent, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    with tempfile.TemporaryDirectory(prefix="ekd") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv(KEEP, raising=False)
        yield Path(folder)


def hold() -> tuple[subprocess.Popen[str], Path]:
    """Another driver with a folder of its own."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    return holder, Path(holder.stdout.readline().strip())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_looks_in_and_nothing_stays(base: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with contextlib.suppress(KeyboardInterrupt), private_folder() as folder:
            folder.mkdir()
            folder.chmod(0o777)  # as Ray does
            assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
            assert folder.parent.parent == base
            raise KeyboardInterrupt
    finally:
        os.umask(before)
    assert not [*base.iterdir()]


def test_only_what_a_dead_driver_left_is_removed(base: Path, tmp_path: Path) -> None:
    (alive, held), (killed, left) = hold(), hold()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    foreign = base / "ekd.12345"
    foreign.symlink_to(tmp_path)
    (tmp_path / "precious").touch()
    (base / "ekd.other.txt").touch()
    assert (left / "r" / "log").exists()
    with private_folder():
        assert not left.exists(), "its driver is dead"
        assert (held / "r" / "log").exists(), "its driver lives"
        assert (tmp_path / "precious").exists() and foreign.is_symlink()
    assert alive.stdin
    alive.stdin.close()
    assert alive.wait() == 0
    assert not held.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="makes a folder of another user")
def test_a_folder_of_another_user_is_left_alone(base: Path) -> None:
    theirs = base / "ekd.abcde"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with private_folder():
        pass
    assert theirs.exists()


def test_logs_are_kept_where_asked_for(base: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(KEEP, "1")
    with private_folder() as folder:
        (folder / "session_latest" / "logs").mkdir(parents=True)
    said = capsys.readouterr().err.rpartition(": ")[2].strip()
    assert Path(said) == folder / "session_latest" / "logs" and Path(said).is_dir()
    monkeypatch.delenv(KEEP)
    with private_folder():
        pass
    assert Path(said).is_dir(), "not by the next start either"


def test_ray_folder_is_short_enough_for_sockets(base: Path, monkeypatch) -> None:
    longest = base / ("x" * (ray_folder._LONGEST - len(str(base)) - 1))
    monkeypatch.setenv("RAY_TMPDIR", str(longest))
    with private_folder() as folder:
        socket = folder / "session_2000-01-01_00-00-00_000000_4194304" / "sockets" / "plasma_store"
        assert len(str(socket)) == (103 if sys.platform == "darwin" else 107)
    monkeypatch.setenv("RAY_TMPDIR", f"{longest}x")
    with pytest.raises(UserError, match="RAY_TMPDIR must have at most"), private_folder():
        pass
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(tempfile, "tempdir", f"{longest}x")
    with private_folder() as folder:
        assert folder.parent.parent == Path("/tmp"), "what nobody named is replaced"


def test_a_start_whose_folder_was_taken_for_a_left_one_makes_another(base: Path, monkeypatch):
    """A sweep may come between a folder and its lock."""
    lock, taken = ray_folder._lock_owner, []

    def swept(folder: Path) -> int | None:
        if not taken:
            taken.append(folder)
            ray_folder.shutil.rmtree(folder)
        return lock(folder)

    monkeypatch.setattr(ray_folder, "_lock_owner", swept)
    with private_folder() as folder:
        assert folder.parent.is_dir() and folder.parent != taken[0]
