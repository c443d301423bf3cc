"""A whole study at an S3 server: killed, continued from an empty folder, exported; no secret in
any file, and no port open to the network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import SECRET, TOKEN

from ekd_ray.remote.location import parse_location, working_copy
from ekd_ray.remote.objects import open_objects
from ekd_ray.results import Bundle, Study
from ekd_ray.results.records import RESULT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
PLACE = parse_location("s3://studies/runs/whole")
TRIALS = 2


def environment() -> dict[str, str]:
    """That of a process that runs this very code."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "EKD_MIRROR_SECONDS": "0.5"}


def start(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launchers" / "tune_cifar.py"), "--out", str(PLACE), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


STUDY = (
    "--dataset", "digits", "--pair", "resnet20-resnet8", "--method", "none", "--train-subset",
    "120", "--epochs", "1", "--trials", str(TRIALS), "--seeds", "1", "--top-k", "1",
    "--max-concurrent", "1", "--set", "baselines=[]",
)  # fmt: skip


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process or any that it began listens."""
    found = set()
    for each in (process, *process.children(recursive=True)):
        try:
            found |= {c.laddr.ip for c in each.net_connections(kind="inet") if c.status == "LISTEN"}
        except psutil.Error:
            continue
    return found


def test_a_study_at_a_uri_survives_its_driver_and_its_disk(
    s3, tmp_path, monkeypatch, launch
) -> None:
    objects, before, addresses = open_objects(PLACE), {}, set()
    first = start(*STUDY, "--quiet")
    deadline = time.monotonic() + 240
    while not before and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
        names = [name for name in objects.entries() if name.endswith(RESULT)]
        if names:
            addresses = listening(psutil.Process(first.pid))
            first.send_signal(signal.SIGKILL)
            before = {name: objects.read(name) for name in names}
    assert before, first.communicate()
    first.communicate()
    # Whatever its Ray listened on; its own processes end by themselves.
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, addresses

    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "another machine"))
    here = working_copy(PLACE)
    again = start("--resume", "--json")
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    report = json.loads(out)
    assert (report["uri"], report["bundle"]) == (str(PLACE), str(here / "best"))
    # What was finished is what it was; all of it is at the URI.
    there = objects.entries()
    assert {name: objects.read(name) for name in before} == before
    assert sum(name.startswith("trials/") and name.endswith(RESULT) for name in there) == TRIALS
    assert not any("checkpoint" in name or name.startswith(".ray/") for name in there)

    study = Study.load(str(PLACE))
    assert study.path != here and len(study.records()) == TRIALS
    best = tmp_path / "best"
    code, *exported = launch("export_best", PLACE, "--out", best, "--verify", "--quiet")
    assert code == 0, exported
    stored = Bundle.load(study.path / "best")
    assert stored.verify().ok
    assert stored.metrics == Bundle.load(best).metrics

    # Keys are in the environment of every process, and in no file or word of the study.
    secrets = [text.encode() for text in (SECRET, TOKEN, os.environ["AWS_ACCESS_KEY_ID"])]
    said = "".join((out, err, *exported)).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in secrets:
        assert secret not in said
        assert not [path for path in files if secret in path.read_bytes()]
        assert not [name for name in there if secret in (objects.read(name) or b"")]
