"""Mistakes and oddities that people have met in public, and that we have met: each is answered."""

from pathlib import Path

import ensemble_cases
import folder_cases
import machine_cases
import outside_cases
import picture_cases
import pytest
import ray_cases
import teacher_cases
import training_cases
from cases import Answer, Case, Hands, parameters
from launchers_run import forked


def launch(name: str, *argv: object) -> Answer:
    done = forked(name, *argv)
    return Answer(done.returncode, done.stdout + done.stderr)


CASES = parameters(
    picture_cases,
    teacher_cases,
    folder_cases,
    machine_cases,
    ray_cases,
    outside_cases,
    training_cases,
    ensemble_cases,
)


@pytest.mark.parametrize("case", CASES)
def test_each_is_answered(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = case.hand_in(Hands(tmp_path, launch, monkeypatch))
    assert (answer and answer.code) == case.code, answer
    text = answer.text if answer else ""
    assert "Traceback" not in text
    assert [word for word in case.words if word not in text] == [], text
