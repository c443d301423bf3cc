"""Reads finished or running studies, and writes and checks their winners."""

from ekd_ray.results.bundle import Bundle, Verification, export_bundle
from ekd_ray.results.leaderboard import Leaderboard, Row
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study import Study

__all__ = ["Bundle", "Leaderboard", "Row", "RunRecord", "Study", "Verification", "export_bundle"]
