"""What every test shares: one cache of decoded images per session, one torch thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's cache is read or written; figures do not depend on cores."""
    before = os.environ.get("EKD_CACHE_DIR")
    os.environ["EKD_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["EKD_CACHE_DIR"]
    else:
        os.environ["EKD_CACHE_DIR"] = before
