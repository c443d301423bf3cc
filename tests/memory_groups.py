"""The kernel's control groups: a process in one is killed when it needs more memory."""

from __future__ import annotations

from pathlib import Path

MEMORY_LIMITS = ("memory.limit_in_bytes", "memory.max")  # of version 1, of version 2


def limit_memory(group: Path, size: int) -> None:
    """Set the bytes that the processes of a group get together."""
    next(group / name for name in MEMORY_LIMITS if (group / name).exists()).write_text(str(size))


def join_group(group: Path, pid: int) -> None:
    """Move a process there; what it has already got is not counted."""
    (group / "cgroup.procs").write_text(str(pid))
