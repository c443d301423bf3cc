"""Files of a newer ekd_ray are refused in one sentence, older ones are read.

Of weights, bundles and checkpoints test_bad_weights.py, test_bundle_tampering.py and
test_resume.py say so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from report_studies import final, select

from ekd_ray.config.candidates import Candidates
from ekd_ray.engine import checkpoint
from ekd_ray.errors import UserError
from ekd_ray.files import check_format
from ekd_ray.models import weights
from ekd_ray.results import Study
from ekd_ray.results.records import CANDIDATES, FORMAT_VERSION, RESULT, read_record
from ekd_ray.results.study_reader import PARQUET_KEY
from ekd_ray.scale import teacher_candidates

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "files.md"
CHOICE = Candidates(seeds=(0, 1))
Reads = tuple[Path, Callable[[], object]]


def study_file(maker) -> Reads:
    return maker.study().path / "study.yaml", lambda: Study.load(maker.path).config


def record(maker) -> Reads:
    folder = maker.trial(0, [0.5]).folder
    return folder / RESULT, lambda: read_record(folder)


def confirmed(maker) -> Reads:
    maker.study()
    maker.confirm([select("trial 3", 1, 0.5), final("trial 3", 1, 0.4)])
    return maker.path / "confirm.parquet", lambda: Study.load(maker.path).leaderboard()


def candidates(maker) -> Reads:
    path = maker.path / CANDIDATES
    maker.path.mkdir()
    path.write_text(json.dumps(teacher_candidates._summary(CHOICE, [], None)))
    return path, lambda: teacher_candidates.check_candidate_folder(maker.path, CHOICE)


def set_version(path: Path, version: int | None) -> int:
    """Write another format version into a file, None: none, as in the first; returns the old."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        old = int(table.schema.metadata[PARQUET_KEY.encode()])
        known = {PARQUET_KEY: str(version)} if version else None
        pq.write_table(table.replace_schema_metadata(known), path)
        return old
    values = yaml.safe_load(path.read_text())  # as which JSON can be read
    old = values.pop("format_version")
    path.write_text(json.dumps(values | ({"format_version": version} if version else {})))
    return old


@pytest.mark.parametrize("make", [study_file, record, confirmed, candidates])
def test_a_newer_file_is_refused_and_an_older_one_read(make, maker):
    path, read = make(maker)
    now = read()
    assert set_version(path, FORMAT_VERSION + 1) == FORMAT_VERSION
    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value) == (
        f"{path} has format version {FORMAT_VERSION + 1}, and this ekd_ray reads up to "
        f"{FORMAT_VERSION}: upgrade ekd_ray."
    )
    set_version(path, None)
    assert read() == now


@pytest.mark.parametrize("version", [0, -1, True, "2", 2.0, None])
def test_a_version_that_is_no_number_is_damage(version):
    with pytest.raises(UserError, match=r"x is damaged: its format_version is .* from 1"):
        check_format("x", version, 2)


def test_the_page_of_files_names_the_formats_of_now():
    rows = re.findall(r"^\| (.*?) \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {re.findall("`(.*?)`", files)[0]: int(version) for files, version in rows}
    assert found == {
        "study.yaml": FORMAT_VERSION,
        "model.safetensors": weights.FORMAT_VERSION,
        "checkpoint.pt": checkpoint.FORMAT_VERSION,
    }
