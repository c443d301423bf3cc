"""Whole studies, without Ray or training, whose files are damaged between two starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agreement import check_search

from ekd_ray.results import Study
from ekd_ray.results.records import JOURNAL, RESULT, STUDY_FILE
from ekd_ray.studies.repair import repair_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def cut_head(out: Path) -> None:
    text = (out / STUDY_FILE).read_bytes()
    (out / STUDY_FILE).write_bytes(text[: len(text) // 2])
    repair_study(out)


def lose_head(out: Path) -> None:
    (out / STUDY_FILE).unlink()
    repair_study(out)


def damage_journal(out: Path) -> None:
    lines = (out / JOURNAL).read_text().splitlines()
    (out / JOURNAL).write_text("\n".join([*lines[:5], "garbage", *lines[5:], ""]))


def lose_journal(out: Path) -> None:
    (out / JOURNAL).unlink()


def lose_tables(out: Path) -> None:
    (out / "trials.parquet").unlink()
    (out / "confirm.parquet").write_bytes(b"")


def empty_confirm_record(out: Path) -> None:
    next(iter(sorted(out.glob(f"confirm/*/{RESULT}")))).write_text("")


def figures(out: Path) -> tuple[Any, ...]:
    """What a study has found, without times."""
    study = Study.load(out)
    trials = [(t.number, t.status, t.params, t.value("val_top1")) for t in study.records()]
    board = [(row.name, row.val, row.test) for row in study.leaderboard()]
    return study.config.replace(trials=5), trials, board


def run_study(out: Path) -> None:
    """In a process of its own: a fork of this one would have the threads of earlier tests."""
    code = "import pathlib, sys, kill_at_changes; kill_at_changes.study(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chaos") / "run"
    run_study(out)
    return out


@pytest.mark.parametrize(
    "damage", [cut_head, lose_head, damage_journal, lose_journal, lose_tables, empty_confirm_record]
)
def test_a_damaged_study_is_continued_to_the_same_end(
    undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / undisturbed.name
    shutil.copytree(undisturbed, out)
    before = figures(out)
    damage(out)
    run_study(out)
    assert figures(out) == before
    study = Study.load(out)
    assert not study.damaged()
    check_search(study)  # records, journal and table agree
