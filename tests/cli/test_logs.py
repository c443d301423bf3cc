"""`ekd-ray logs`: which runs failed, and the end of what one of them wrote.

That a real Ray's output comes there: tests/scale/test_deaths.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ekd_ray.files import write_json, write_text
from ekd_ray.results.failure_log import (
    FAILURE_LOG,
    MOST_OF_PART,
    MOST_PARTS,
    error_kept,
    hide_in_log,
    read_failure_log,
    write_failure_log,
)
from ekd_ray.results.records import CONFIG, FAILURE

FAILED = (
    "trials/0003", "trials/0012", "confirm/final-kd-seed-1-0a1b2c3d", "teacher/seed-0", "teacher",
)  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with runs that failed, and one that did not."""
    for name in FAILED:
        write_json(tmp_path / "run" / name / FAILURE, {"reason": f"reason of {name}"})
        write_failure_log(tmp_path / "run" / name, [("its worker", f"words of {name}")])
    (tmp_path / "run" / "trials" / "0004").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "name"),
    [("3", FAILED[0]), ("12", FAILED[1]), ("final-kd", FAILED[2]), ("teacher/s", FAILED[3]),
     ("teacher", FAILED[4])],
)  # fmt: skip
def test_a_run_is_found_by_its_number_or_the_beginning_of_its_name(
    launch, study, given, name
) -> None:
    code, out, err = launch("logs", study, given)
    assert (code, err) == (0, "")
    assert f"failed: reason of {name}" in out and f"words of {name}\n" in out
    assert str(study / name) in out


def test_without_a_name_all_that_failed_are_listed(launch, study) -> None:
    code, out, _ = launch("logs", study)
    assert code == 0 and all(f"reason of {name}" in out for name in FAILED)
    assert "5 of 6 runs failed" in out
    code, out, _ = launch("logs", study, "--json")
    assert {row["reason"] for row in json.loads(out)} == {f"reason of {name}" for name in FAILED}


@pytest.mark.parametrize(
    ("given", "word"),
    [("4", "trial 4 has not failed"), ("1", "no run '1'"), ("final-xx", "final-kd-seed-1-0a1b2c3d"),
     ("t", "2 names")],
)  # fmt: skip
def test_another_name_is_told_which_runs_failed(launch, study, given, word) -> None:
    code, out, err = launch("logs", study, given)
    assert (code, out) == (2, "")
    assert word in err and "3, 12" in err and err.count("\n") == 1
    assert "Known" not in err, "only those that failed have a log"


def test_a_single_run_needs_no_name(launch, tmp_path) -> None:
    code, _, err = launch("logs", tmp_path)
    assert code == 2 and "neither a study nor a run" in err
    write_text(tmp_path / CONFIG, "student: resnet8\n")
    write_failure_log(tmp_path, [("its worker", "last words")])
    code, out, err = launch("logs", tmp_path)
    assert code == 0 and "last words" in out, err


def test_an_error_of_the_studys_own_process_is_its_last_line(launch, study) -> None:
    folder = study / "teacher-softmax"
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), error_kept(folder):
        1 / 0  # noqa: B018
    code, out, _ = launch("logs", study, "teacher-softmax")
    assert code == 0 and "failed: ZeroDivisionError" in out and "Traceback" in out
    with error_kept(folder):
        pass
    assert "5 of 7 runs failed" in launch("logs", study)[1]


def test_what_a_log_holds_is_shown_and_not_obeyed(launch, study, monkeypatch) -> None:
    """A log of any size, whoever wrote it, and whatever was secret there."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary0123456789")
    monkeypatch.setenv("GITHUB_PAT", "ghp_0123456789")
    path = study / FAILED[0] / FAILURE_LOG
    path.write_bytes(
        b"x" * 10_000_000 + b"\x1b[2J\xff ghp_0123456789 canary0123456789 http://me:word@host/ \r!"
    )
    code, out, _ = launch("logs", study, 3)
    assert code == 0 and len(out) < 2 * MOST_OF_PART * MOST_PARTS
    assert "\x1b" not in out and "\\x1b[2J\ufffd" in out and "\\r!" in out
    assert "ghp_" not in out and "$GITHUB_PAT" in out
    assert "canary" not in out and "me:word" not in out and "$AWS_SECRET_ACCESS_KEY" in out


def test_a_log_keeps_the_end_of_each_of_a_bounded_number_of_texts(tmp_path) -> None:
    text = "begin" + "y" * (2 * MOST_OF_PART) + "\x1b[31mend\x1b[39m"
    write_failure_log(tmp_path, [(f"worker {rank}", text) for rank in range(100)])
    kept = read_failure_log(tmp_path)
    assert kept and kept.count("yend\n") == MOST_PARTS and "begin" not in kept
    assert (tmp_path / FAILURE_LOG).stat().st_size < (MOST_OF_PART + 100) * MOST_PARTS


def test_names_of_places_are_no_secrets(monkeypatch) -> None:
    monkeypatch.setenv("PWD", "/a/folder/of/mine")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert hide_in_log("/a/folder/of/mine is disabled") == "/a/folder/of/mine is disabled"
