"""Other libraries' searches, called through their own ask and tell (extra `bench`)."""

from __future__ import annotations

from benchmarks.simulate import Contestant

OPPONENTS: dict[str, Contestant] = {}
