"""A whole study at an S3 server: run, resumed elsewhere, exported; no secret in any file, and
no port open to the network."""

from __future__ import annotations

import contextlib
import json
import os

import psutil
import pytest
from conftest import SECRET, TOKEN
from launchers_run import DIGITS

from ekd_ray.remote.location import parse_location, working_copy
from ekd_ray.remote.mirror import Mirror
from ekd_ray.remote.object_store import open_store
from ekd_ray.results import Bundle, Study
from ekd_ray.results.records import RESULT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
LOCATION = parse_location("s3://studies/runs/whole")
STUDY = (
    *DIGITS, "--method", "none", "--train-subset", "120", "--epochs", "1", "--trials", "1",
    "--seeds", "1", "--top-k", "1", "--max-concurrent", "1", "--set", "baselines=[]",
    "--set", "champions=[]",
)  # fmt: skip


def find_listening() -> dict[str, set[str]]:
    """Addresses on which this process and those that it began listen, by their names."""
    found = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            sockets = process.net_connections(kind="inet")
            addresses = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
            found.setdefault(process.name(), set()).update(addresses)
    return found


@pytest.mark.slow  # test_s3.py has the store, test_mirror.py what is copied when
def test_a_study_at_a_uri_is_resumed_elsewhere(s3, tmp_path, monkeypatch, launch) -> None:
    listening, upload = {}, Mirror.upload

    def watched(self, **options):
        upload(self, **options)
        if not listening.get("raylet"):  # it is there before its sockets are
            listening.update(find_listening())

    monkeypatch.setattr(Mirror, "upload", watched)
    monkeypatch.setenv("EKD_MIRROR_SECONDS", "2")
    code, *first = launch("tune_cifar", *STUDY, "--out", LOCATION)
    assert code == 0, first
    assert listening["raylet"]
    assert set.union(*listening.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
    store = open_store(LOCATION)
    before = {n: store.read(n) for n in store.list_objects() if n.endswith(RESULT)}

    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "another machine"))
    here = working_copy(LOCATION)
    code, out, err = launch("tune_cifar", "--resume", "--json", "--out", LOCATION)
    assert code == 0, err
    report = json.loads(out)
    assert (report["uri"], report["bundle"]) == (str(LOCATION), str(here / "best"))
    # What was finished is what it was.
    there = store.list_objects()
    assert "trials/0000/result.json" in before
    assert {name: store.read(name) for name in before} == before
    assert not any("checkpoint" in name or name.startswith(".ray/") for name in there)

    study = Study.load(str(LOCATION))
    assert study.path != here and len(study.records()) == 1
    best = tmp_path / "best"
    code, *exported = launch("export_best", LOCATION, "--out", best, "--verify", "--quiet")
    assert code == 0, exported
    assert Bundle.load(study.path / "best").metrics == Bundle.load(best).metrics

    # Keys are in the environment of every process, and in no file or word of the study.
    secrets = [text.encode() for text in (SECRET, TOKEN, os.environ["AWS_ACCESS_KEY_ID"])]
    printed = "".join((*first, out, err, *exported)).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in secrets:
        assert secret not in printed
        assert not [path for path in files if secret in path.read_bytes()]
        assert not [name for name in there if secret in (store.read(name) or b"")]
