"""Whole studies, without Ray or training, whose files are damaged between two starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agreement import check_search
from kill_at_changes import in_child

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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chaos") / "run"
    in_child(out, None)
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
    in_child(out, None)
    assert figures(out) == before
    study = Study.load(out)
    assert not study.damaged()
    check_search(study)  # records, journal and table agree
