"""Reads finished or running studies, and writes and checks their winners.

The public names are loaded when they are first used: who reads a study needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ekd_ray.results.bundle import Bundle, Verification
    from ekd_ray.results.bundle_export import export_bundle
    from ekd_ray.results.leaderboard import Leaderboard, Row
    from ekd_ray.results.records import RunRecord
    from ekd_ray.results.study import Study

_PLACES = {
    "Bundle": "bundle", "Verification": "bundle", "export_bundle": "bundle_export",
    "Leaderboard": "leaderboard", "Row": "leaderboard", "RunRecord": "records", "Study": "study",
}  # fmt: skip

__all__ = ["Bundle", "Leaderboard", "Row", "RunRecord", "Study", "Verification", "export_bundle"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
