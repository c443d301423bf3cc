"""Reads finished or running studies, and writes and checks their winners."""

from ekd_ray.results.bundle import Bundle, Verification, export_bundle
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.records import TrialRecord
from ekd_ray.results.study import Study

__all__ = ["Bundle", "Row", "Study", "TrialRecord", "Verification", "export_bundle"]
