"""The clock is set back while a run is interrupted, or within it: nothing depends on it."""

from __future__ import annotations

import contextlib
import os
import time

from engine_runs import Killed, assert_same_run, state

from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import read_history
from ekd_ray.losses.methods import with_method

HOUR = 3600


def test_a_run_goes_on_under_a_clock_that_was_set_back(
    tiny, with_teacher, own_cache, tmp_path, monkeypatch
):
    """Its files are of the future then; the clock goes back once more after each epoch."""
    config = with_method(tiny(epochs=3), "kd", **with_teacher, teacher_cache="on")
    expected = distill(config, threads=1)
    weights, real, back = state(expected), time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() - back[0])

    def on_epoch(row):
        back[0] += HOUR
        if back[0] == HOUR:
            raise Killed

    with contextlib.suppress(Killed):
        distill(config, out=tmp_path, on_epoch=on_epoch, threads=1, checkpoint_seconds=0)
    for path in (*tmp_path.rglob("*"), *own_cache.rglob("*")):
        os.utime(path, (real() + HOUR, real() + HOUR))
    found = distill(config, out=tmp_path, on_epoch=on_epoch, threads=1, checkpoint_seconds=0)
    assert_same_run(found, expected, weights)
    assert back[0] == 3 * HOUR
    assert all(0 <= row["seconds"] < HOUR for row in read_history(tmp_path))
