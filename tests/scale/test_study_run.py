"""Whole studies on a real local Ray: killed, resumed, failing, nested."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ekd_ray.results import Bundle, Study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
TRIALS = 6


def flags(out: Path, *extra: str) -> list[str]:
    return [
        "--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "120",
        "--epochs", "3", "--trials", str(TRIALS), "--seeds", "1", "--top-k", "1",
        "--max-concurrent", "2",
        "--set", "baselines=[none]", "--set", "champions=[authors]", "--set", "teacher=resnet8",
        "--set", "teacher_training={epochs: 1}", "--out", str(out), *extra,
    ]  # fmt: skip


def start(out: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launchers" / "tune_cifar.py"), *flags(out, *extra)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # A shell has interrupts ignored for a test-suite that runs in its background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def results(out: Path) -> dict[str, str]:
    return {str(p): p.read_text() for p in out.glob("trials/*/result.json")}


def stop_after(driver: subprocess.Popen[str], out: Path, trials: int, sign: int) -> str:
    """Send a signal once so many trials have ended; returns what was said on stderr."""
    deadline = time.monotonic() + 240
    while len(results(out)) < trials and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver.poll() is None, driver.communicate()[1]
    os.kill(driver.pid, sign)
    return driver.communicate(timeout=120)[1]


def finish(out: Path) -> dict[str, Any]:
    """Let a study that was stopped end; returns its report. One trial at a time, each of which asks
    the teacher itself: every process more takes seconds to import torch."""
    resumed = start(
        out, "--resume", "--json", "--max-concurrent", "1", "--set", "teacher_fill=lazy"
    )
    stdout, stderr = resumed.communicate(timeout=360)
    assert resumed.returncode == 0, stderr
    return json.loads(stdout)


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study that gets SIGKILL after two trials, is continued and ends."""
    out = tmp_path_factory.mktemp("study") / "run"
    stop_after(start(out), out, 2, signal.SIGKILL)
    before = results(out)
    return {"out": out, "before": before, "report": finish(out)}


@pytest.mark.slow  # test_exit_codes.py has the signal, the tests below a study that goes on
def test_a_study_that_is_asked_to_stop_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    """SIGTERM is handled as Ctrl-C is, in Tune's loop too."""
    out = tmp_path / "run"
    driver = start(out)
    said = stop_after(driver, out, 1, signal.SIGTERM)
    assert driver.returncode == 130, said
    assert not re.search("Traceback|stack trace|PC: @|SIGTERM", said), said
    assert said.rstrip().endswith(f"ekd-ray tune --resume --out {out}")
    before = results(out)
    finish(out)
    after = results(out)
    assert {path: after[path] for path in before} == before
    assert len(after) == TRIALS


@pytest.mark.slow  # test_exit_codes.py has the signals, test_session_end.py what is left of Ray
def test_a_study_that_is_interrupted_twice_ends_at_once_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    driver = start(out)
    deadline = time.monotonic() + 240
    while not results(out) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    started = psutil.Process(driver.pid).children(recursive=True)
    assert any(process.name() == "raylet" for process in started)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.3)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=30)[1]
    assert driver.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("ended at once; continue with: ")
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    before = results(out)
    finish(out)
    after = results(out)
    assert {path: after[path] for path in before} == before
    assert len(after) == TRIALS


def test_no_finished_trial_is_lost_or_repeated(killed_and_resumed: dict[str, Any]) -> None:
    before, after = killed_and_resumed["before"], results(killed_and_resumed["out"])
    assert len(before) >= 2
    assert {path: after[path] for path in before} == before
    assert len(after) == TRIALS
    for text in after.values():
        epochs = [row["epoch"] for row in json.loads(text)["history"]]
        assert epochs == list(range(1, len(epochs) + 1)), "an epoch is missing or there twice"


def test_the_journal_agrees_with_the_records(killed_and_resumed: dict[str, Any]) -> None:
    out = killed_and_resumed["out"]
    storage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    trials = optuna.load_study(study_name=None, storage=storage).get_trials()
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    records = Study.load(out).records()
    assert [trial.number for trial in trials] == [record.number for record in records]
    for trial, record in zip(trials, records, strict=True):
        assert trial.state == states[record.status]
        assert trial.params == record.params
        assert trial.intermediate_values == {r["epoch"]: r["val_top1"] for r in record.history}


def test_the_bundle_gives_the_reported_accuracy(killed_and_resumed: dict[str, Any]) -> None:
    report = killed_and_resumed["report"]
    bundle = Bundle.load(report["bundle"])
    found = bundle.verify(evaluate=True)
    assert found.ok, found.problems
    assert found.metrics["test_top1"] == report["model"]["test_top1"]
    roles = {entry["name"]: entry["role"] for entry in report["leaderboard"]}
    assert next(iter(roles.values())) == "winner" and roles["none"] == "baseline"
    assert roles["authors' values"] in ("winner", "champion")


def test_the_winner_trains_again_to_the_same_bits(
    killed_and_resumed: dict[str, Any], tmp_path: Path, launch: Any
) -> None:
    """In another process than Ray's, from the bundle of a study that was killed."""
    bundle = killed_and_resumed["report"]["bundle"]
    code, stdout, stderr = launch(
        "reproduce", bundle, "--json", "--exact", "--out", tmp_path / "again"
    )
    assert code == 0, stderr
    found = json.loads(stdout)
    assert (found["verdict"], found["first"]) == ("bit-identical", None)
    assert found["test_top1"] == killed_and_resumed["report"]["model"]["test_top1"]


def test_the_search_never_read_the_test_split(killed_and_resumed: dict[str, Any]) -> None:
    out = killed_and_resumed["out"]
    for path in (*out.glob("trials/*/result.json"), *out.glob("confirm/select-*/result.json")):
        assert "test_" not in path.read_text()
    finals = list(out.glob("confirm/final-*/result.json"))
    tested = [row.name for row in Study.load(out).leaderboard() if row.test]
    assert {"authors' values", "none"} <= {*tested}
    assert len(finals) == len(tested), "the winner, the champion and the student alone"
    assert all("test_top1" in path.read_text() for path in finals)


def test_another_configuration_is_refused_before_it_runs(
    killed_and_resumed: dict[str, Any], launch: Any
) -> None:
    arguments = flags(killed_and_resumed["out"], "--resume", "--seed", "7")
    code, _, stderr = launch("tune_cifar", *arguments)
    assert code == 2
    assert stderr.count("\n") == 1
    assert "another configuration: seed is 0 there and 7 here" in stderr
