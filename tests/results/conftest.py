"""A small real study folder, made without Ray: one winner with real weights, figures by hand."""

from __future__ import annotations

import shutil

import pytest
from report_studies import Maker, exported, finished, real_study, winner_config

from ekd_ray.results import Bundle, Study
from ekd_ray.results.report import measures, write_report

__all__ = ["exported", "real_study", "winner_config"]  # fixtures
measures.TSNE_STEPS = 250  # a quick one is as good for tests


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """(Study, its report's HTML) of a finished study; read only."""
    study = finished(Maker(tmp_path_factory.mktemp("reported") / "run"))
    return study, write_report(study).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def make_study():
    """`Maker`, for studies that several tests share."""
    return Maker


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "run")


@pytest.fixture
def copied_study(real_study, tmp_path):
    """The real study in a folder that a test may damage."""
    shutil.copytree(real_study[0].path, tmp_path / "study")
    return Study.load(tmp_path / "study")


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(exported.path, tmp_path / "best")
    return Bundle.load(tmp_path / "best")
