"""`ekd-ray doctor`: a table that tells what works and not whose machine it is."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest

from ekd_ray.cli import doctor_command
from ekd_ray.cli.doctor_command import CHECKS, STEP, hide_secrets


def without(monkeypatch: pytest.MonkeyPatch, *topics: str, **more) -> None:
    """The doctor's checks but for these."""
    kept = {name: check for name, check in CHECKS.items() if name not in topics}
    monkeypatch.setattr(doctor_command, "CHECKS", {**kept, **more})


def test_every_topic_has_a_row_and_a_sound_machine_is_0(launch, monkeypatch) -> None:
    without(monkeypatch, "Ray", "training")
    code, out, err = launch("doctor", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert {row["topic"] for row in rows} == doctor_command.CHECKS.keys()
    assert all(row["ok"] and row["found"] for row in rows)
    text = " ".join(row["found"] for row in rows)
    assert "torch 2." in text and "auto is " in text and "CPUs" in text and "/dev/shm" in text


def test_what_does_not_work_is_a_row_and_1(launch, monkeypatch) -> None:
    def broken():
        raise OSError("no such\ndevice")

    without(monkeypatch, *CHECKS, broken=broken, fine=lambda: ["well"])
    code, out, err = launch("doctor")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith("!! broken") and "OSError: no such device" in lines[0]
    assert lines[1].endswith("fine    well") and "broken" in lines[2] and len(lines) == 3


def test_a_cluster_that_is_not_there_is_said_without_its_address(launch, monkeypatch) -> None:
    without(monkeypatch, *CHECKS, Ray=CHECKS["Ray"])
    monkeypatch.setenv("RAY_ADDRESS", "local")  # put back afterwards: the flag sets it
    code, out, _ = launch("doctor", "--address", "127.0.0.1:9")
    assert code == 1 and "cannot join" in out
    assert "127.0.0.1:9" not in out and "$RAY_ADDRESS" in out


def test_a_step_is_a_step() -> None:
    assert STEP.train_subset - STEP.train_subset // 10 == STEP.batch_size and STEP.epochs == 1


def test_nothing_tells_whose_machine_it_is(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/data/homes/alice")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    user, host = getpass.getuser(), socket.gethostname()
    said = hide_secrets(
        f"/data/homes/alice/x /home/bob/y /Users/bob/z /scratch/{user}/w hf_0123456789 {host} "
        "10.1.2.3:6379 127.0.0.1 torch 2.14.1"
    )
    assert said == "~/x ~/y ~/z /scratch/USER/w $HF_TOKEN HOST IP:6379 127.0.0.1 torch 2.14.1"


@pytest.mark.ray
@pytest.mark.slow  # Ray starts; the rows by themselves are tested above
def test_the_whole_of_it(launch, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, _ = launch("doctor")
    assert code == 0, out
    assert "a step, a validation and a checkpoint" in out and "1 node, " in out
    assert str(Path.home()) not in out
