"""The limit that control groups, which containers are made of, set on CPUs."""

from __future__ import annotations

import contextlib
from pathlib import Path

_UNLIMITED = 1024.0  # more CPUs than a run has threads


def cpu_quota(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """CPUs that the control groups of this process leave it; all there could be without a limit.

    A group of version 2 says `QUOTA PERIOD` in one file, one of version 1 in two. The groups above
    count too; within a container its own one is the root.
    """
    quotas = [_UNLIMITED]
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds and "cpu" not in kinds.split(","):
                continue
            place = root / "cpu" if kinds else root
            own = place / name.strip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(place):
                    quotas.append(_quota_in(folder))
    return min(quotas)


def _quota_in(folder: Path) -> float:
    """CPUs that one control group allows."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if float(quota) > 0:  # version 1 has -1 for no limit, version 2 `max`
                return float(quota) / float(period)
    return _UNLIMITED
