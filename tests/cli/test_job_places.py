"""Inside of `ray job submit`, results that would go with the job's own folder are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import ekd_ray as ekd
from ekd_ray.errors import UserError
from ekd_ray.studies.places import check_outlives_job, default_place, locate

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # tests/cluster/test_cluster_page.py: Ray does set it
RUN = ("--dataset", "digits", "--pair", "resnet20-resnet8", "--method", "none")


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, '{"runtime_env": {}}')


@pytest.mark.parametrize(
    "argv",
    [
        ("tune", *RUN),
        ("tune", *RUN, "--out", "runs/one"),
        ("tune", *RUN[:2], "--pairs", "all"),
        ("distill", *RUN),
        ("train-teacher", "--dataset", "digits", "--model", "resnet8"),
        ("quickstart",),
    ],
    ids=" ".join,
)
def test_a_place_below_the_jobs_folder_is_refused(launch, in_job, tmp_path, argv) -> None:
    code, out, err = launch(*argv, "--dry-run")
    assert (code, out) == (2, ""), err
    assert "--out" in err and "s3://" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "and before anything is written"


def test_python_is_refused_the_same(in_job) -> None:
    with pytest.raises(UserError, match="absolute"):
        ekd.tune(
            "resnet20-resnet8", dataset="digits", method="none", progress=False, trials=1, epochs=1
        )


def test_a_place_that_stays_is_taken(in_job, tmp_path) -> None:
    assert locate(str(tmp_path / "run")) == (tmp_path / "run", None)
    assert str(locate("s3://bucket/run")[1]) == "s3://bucket/run"


def test_elsewhere_a_default_is_a_default(monkeypatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    assert default_place("one") == Path("runs/one")
    assert check_outlives_job(Path("there")) == Path("there")
