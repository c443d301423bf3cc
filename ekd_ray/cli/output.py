"""Output that commands share: results for programs, plans for people."""

from __future__ import annotations

import json
import os
from typing import Any


def print_json(value: Any) -> None:
    """Results for programs, on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_plan(text: str, values: dict[str, Any], *, as_json: bool) -> None:
    """A plan on standard output: in words, or the configuration as JSON."""
    if as_json:
        print_json(values)
    else:
        print(text)


def set_up_ray(address: str | None, *, keep_logs: bool = False) -> None:
    """Make the cluster of --address the one that Ray is told of; `keep_logs` is --keep-ray-logs."""
    from ekd_ray.scale.cluster import ADDRESS  # loads ray
    from ekd_ray.scale.ray_folder import KEEP

    if address:
        os.environ[ADDRESS] = address
    if keep_logs:
        os.environ[KEEP] = "1"
