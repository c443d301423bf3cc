"""The record of what a run ran on: enough to compare, nothing that tells whose machine it was."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import ekd_ray
from ekd_ray.engine import environment as environments
from ekd_ray.engine.environment import environment

ROOM = Path(ekd_ray.__file__).parent


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOM), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_names_packages_processor_threads_and_revision() -> None:
    found = environment()
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
    assert found["float32"] == "ieee"
    assert json.loads(json.dumps(found)) == found
    if (ROOM.parent / ".git").exists():
        assert found["git_revision"] == git("rev-parse", "HEAD")
        assert found["git_dirty"] is bool(git("status", "--porcelain", "--", "."))


def test_it_does_not_tell_whose_machine_it_was() -> None:
    text = json.dumps(environment())
    names = [getpass.getuser(), platform.node(), str(Path.home()), str(ROOM), "/"]
    secrets = [v for k, v in os.environ.items() if len(v) > 8 and ("PATH" in k or "KEY" in k)]
    found = [name for name in (*names, *secrets) if len(name) > 1 and name in text]
    assert not found


def test_a_copy_outside_of_git_has_no_revision(monkeypatch) -> None:
    """Nor has one that lies in somebody else's repository."""
    monkeypatch.setattr(environments, "output_of", lambda command: None)
    assert environments._git() == {"git_revision": None, "git_dirty": None}
    outputs = {"ls-files": "__init__.py", "rev-parse": "abc", "status": " M loop.py"}
    monkeypatch.setattr(environments, "output_of", lambda command: outputs[command[3]])
    assert environments._git() == {"git_revision": "abc", "git_dirty": True}
