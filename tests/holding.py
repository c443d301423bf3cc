"""Processes that stand still at a named point, so that a kill finds them there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOLDS = Path(__file__).with_name("holds")  # its sitecustomize.py says what a hold is
# Until a process must have come to its point, or ended: many times what it takes on a busy machine.
LIMIT = 480.0


@dataclass(frozen=True)
class Held:
    """A process that stands at a point."""

    file: Path
    pid: int
    label: str

    def release(self) -> None:
        self.file.unlink(missing_ok=True)

    def kill(self, pid: int | None = None) -> None:
        """Kill it, or another one while it stands there; what still lives may go on."""
        kill(pid or self.pid)
        self.release()


def kill(pid: int) -> None:
    """SIGKILL a process that this test has started, or a child of it; wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while time.monotonic() < until and is_alive(pid):
            time.sleep(0.01)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Holds:
    """A folder of holds, and what stands at them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def variables(self) -> dict[str, str]:
        """With these a process minds the holds, and all that it starts."""
        return {
            "PYTHONPATH": f"{HOLDS}:{ROOT}",
            "EKD_HOLDS": str(self.folder),
            "PYTHONUNBUFFERED": "1",
        }

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        return {**base, **self.variables}

    def arm(self, point: str, *words: str, once: bool = False) -> None:
        """Hold the first process that comes to a point whose label has all of these words.

        Args:
            once: only if no process of the run that it is at was held like this before.
        """
        name = f"{point}.{next(self._names):04d}"
        new = self.folder / f"{name}.tmp"
        new.write_text(json.dumps({"words": words, "once": once}))
        new.rename(self.folder / f"{name}.armed")

    def armed(self) -> list[str]:
        return [path.read_text() for path in self.folder.glob("*.armed")]

    def clear(self) -> None:
        """Disarm all, and let go on what is held."""
        for path in self.folder.iterdir():
            if path.suffix != ".struck":
                path.unlink(missing_ok=True)

    def held(self) -> list[Held]:
        found = []
        for path in sorted(self.folder.glob("*.held")):
            with contextlib.suppress(OSError):
                said = json.loads(path.read_text())
                if "pid" in said:  # else it is about to say so
                    found.append(Held(path, said["pid"], said["label"]))
        return found

    def wait(self, driver: Any, limit: float = LIMIT) -> Held | None:
        """The process that stands at a point; None if the driver ended and nobody came there.

        Raises:
            AssertionError: neither within the limit.
        """
        until = time.monotonic() + limit
        while time.monotonic() < until:
            over = driver.poll() is not None
            if held := self.held():
                return held[0]
            if over:
                return None
            time.sleep(0.01)
        raise AssertionError(f"nothing came to {self.armed()} in {limit:g} s")
