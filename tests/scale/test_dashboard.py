"""optuna-dashboard opens a study's journal: started, and asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from search_runs import EPOCHS, run, study_of

from ekd_ray.results.records import JOURNAL

pytest.importorskip("optuna_dashboard")
TRIALS = 6


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """The address of a dashboard that was started as docs/search.md says."""
    run(tmp_path, study_of("tpe", trials=TRIALS), TRIALS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).with_name("optuna-dashboard")
    server = subprocess.Popen(
        [command, tmp_path / JOURNAL, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    try:
        while True:
            try:
                get(f"{address}/api/studies")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, server.stderr
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_it_shows_every_trial_with_its_state_values_and_epochs(
    dashboard: str, tmp_path: Path
) -> None:
    (summary,) = get(f"{dashboard}/api/studies")["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == (tmp_path.name, ["maximize"])
    detail = get(f"{dashboard}/api/studies/{summary['study_id']}?after=0")
    assert detail["objective_names"] == ["val_top1"]
    trials = {trial["number"]: trial for trial in detail["trials"]}
    assert sorted(trials) == list(range(TRIALS))
    stopped = {number for number, trial in trials.items() if trial["state"] == "Pruned"}
    assert stopped == {2, 5}
    for number, trial in trials.items():
        assert len(trial["intermediate_values"]) == (3 if number in stopped else EPOCHS)
        assert {param["name"] for param in trial["params"]} >= {"lr", "momentum"}
        if number not in stopped:
            assert trial["values"] == [trial["intermediate_values"][-1]["value"]]
