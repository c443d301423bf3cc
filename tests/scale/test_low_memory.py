"""Ray's memory monitor, in a Ray of its own: it reads its settings when Ray starts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tuned_runs import tune_with

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.results.records import RunRecord, read_record, trial_folder
from ekd_ray.scale.worker import Report


def lives_long(job: RunRecord, report: Report) -> None:
    """A run that trains nothing, and would go on for a minute."""
    for epoch in range(1, 601):
        row = {"epoch": epoch, "val_top1": 0.5, "seconds": 0.1}
        with open(job.folder / HISTORY, "a") as file:
            file.write(json.dumps(row) + "\n")
        report(row)
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow  # test_private_api.py has the error, test_placement.py the reason
def test_trials_that_ray_ends_for_memory_fail_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To Ray's memory monitor one percent of this machine's memory is all that there is."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "500")
    run = tmp_path / "run"
    config = StudyConfig(
        distill=DistillConfig(dataset="digits", student="resnet8", method="none", epochs=601),
        space={"lr": {"low": 0.01, "high": 0.1}}, trials=2, scheduler="none", max_concurrent=2,
    )  # fmt: skip
    tune_with(run, config, lives_long)
    for number in range(2):
        record = read_record(trial_folder(run, number))
        assert record is not None and record.status == "failed"
        assert "by Ray because its node ran low on memory: lower --max-concurrent" in str(
            record.reason
        )
