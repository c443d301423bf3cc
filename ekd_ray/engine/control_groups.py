"""The limits that control groups, which containers are made of, set on CPUs and memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1024.0  # more CPUs than a run has threads
_GROUPS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = _GROUPS, root: Path = _ROOT) -> float:
    """CPUs that the control groups of this process leave it; all there could be without a limit.

    A group of version 2 says `QUOTA PERIOD` in one file, one of version 1 in two.
    """
    quotas = [_UNLIMITED]
    for folder in _folders("cpu", groups, root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if float(quota) > 0:  # version 1 has -1 for no limit, version 2 `max`
                    quotas.append(float(quota) / float(period))
    return min(quotas)


def memory_limit(groups: Path = _GROUPS, root: Path = _ROOT) -> int:
    """Bytes of memory that the control groups of this process leave it, at most the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders("memory", groups, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # `max`
                limits.append(int((folder / name).read_text()))
    return min(limits)


def _folders(kind: str, groups: Path, root: Path) -> Iterator[Path]:
    """The group of this process that limits `kind`, in each version, and those above it.

    Within a container its own one is the root.
    """
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds and kind not in kinds.split(","):
                continue
            place = root / kind if kinds else root
            own = place / name.strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(place))
