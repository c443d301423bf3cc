"""Rows of a leaderboard in words."""

from __future__ import annotations

from collections.abc import Sequence

from ekd_ray.config.phrases import joined

LABELS = {"none": "student alone", "kd": "KD", "ekd-softmax": "EKD, softmax teacher"}
PLURALS = ("authors' values", "defaults")


def label(name: str) -> str:
    """A leaderboard row in words: a baseline's, or `trial 7`."""
    return LABELS.get(name, name)


def noun_of(name: str) -> str:
    """A leaderboard row as a sentence has it: `the student alone`, `the point from runs/a`."""
    if name.startswith("from "):
        return f"the point {name}"
    return f"the {label(name)}" if name in ("none", *PLURALS) else label(name)


def name_missed(missed: Sequence[str]) -> str:
    """The rows that the winner does not beat: `No gain shown over KD`; empty where it beats all."""
    return f"No gain shown over {joined([noun_of(name) for name in missed])}" if missed else ""
