"""Marks of tests that are too long for `make test-slow`."""

from __future__ import annotations

import os

import pytest

IN_CHAOS = pytest.mark.skipif(not os.environ.get("EKD_CHAOS_NODES"), reason="minutes: make chaos")
