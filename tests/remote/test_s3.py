"""Against a real S3 server: objects, what is refused before compute, an endpoint that goes."""

from __future__ import annotations

import socket

import pytest
from conftest import SECRET, TOKEN, serve
from launchers_run import DIGITS

from ekd_ray.errors import UserError
from ekd_ray.remote import objects as stored
from ekd_ray.remote.location import parse_location, working_copy
from ekd_ray.remote.objects import StorageError, check_reachable, open_objects
from ekd_ray.remote.session import StaleCopy, mirrored, reading_copy
from ekd_ray.results import Study

PLACE = parse_location("s3://studies/runs/one")
SMALL = (*DIGITS, "--method", "none", "--quiet")


def test_objects_are_put_listed_read_and_removed(s3, tmp_path):
    objects = open_objects(PLACE)
    assert objects.entries() == {}
    assert objects.read("a/b") is None
    objects.write("a/b", b"12")
    objects.delete("a/none")
    big = bytes(range(256)) * 80_000  # more than one part of a multipart upload
    (tmp_path / "big").write_bytes(big)
    objects.upload(tmp_path / "big", "big")
    (tmp_path / "empty").touch()
    objects.upload(tmp_path / "empty", "c/empty")
    found = objects.entries()
    assert {name: entry.size for name, entry in found.items()} == {
        "a/b": 2, "big": len(big), "c/empty": 0,
    }  # fmt: skip
    assert all(entry.changed > 1.7e18 for entry in found.values())
    for name in found:
        objects.download(name, tmp_path / "back" / name)
    assert (tmp_path / "back" / "big").read_bytes() == big
    assert (tmp_path / "back" / "c" / "empty").read_bytes() == b""
    objects.write("a/b", b"new")
    assert objects.read("a/b") == b"new"
    objects.delete("a/b")
    assert set(objects.entries()) == {"big", "c/empty"}


def test_a_planted_name_does_not_leave_the_folder(s3, tmp_path):
    from moto.s3.models import s3_backends  # clients normalise such a key

    (backend,) = (b["aws"] for b in s3_backends.values() if "studies" in b["aws"].buckets)
    backend.put_object("studies", "runs/one/x/../../../out", b"x")
    with pytest.raises(UserError, match="would lie outside of the study"):
        reading_copy(PLACE)


def test_scratch_that_was_planted_is_not_fetched(s3, tmp_path):
    planted = (".ray/tune/tuner.pkl", "trials/0000/train/x.pkl", ".mirror.json", "a/.b/c", "x.tmp")
    objects = open_objects(PLACE)
    for name in (*planted, "study.yaml"):
        objects.write(name, b"x")
    with mirrored(PLACE, tmp_path / "a", resume=True):
        names = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*")}
    assert names == {"study.yaml", ".mirror.json"}
    assert (tmp_path / "a" / ".mirror.json").read_bytes() != b"x"


def one_sentence(result, words):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err
    assert SECRET not in err and TOKEN not in err


@pytest.fixture
def no_compute(monkeypatch):
    from ekd_ray.cli import single_run
    from ekd_ray.studies import pipeline

    def too_late(*args, **kwargs):
        raise AssertionError("computing has begun")

    monkeypatch.setattr(single_run, "distill", too_late)
    for name in ("load_dataset", "train_teacher", "connected", "search"):
        monkeypatch.setattr(pipeline, name, too_late)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("s3://nobody/runs/one", "there is no bucket nobody: create it"),
        ("s3://canary:canary@studies/one", "may not hold credentials"),
        ("ftp://studies/one", "give a folder, or one of s3://"),
    ],
)
@pytest.mark.parametrize("name", ["tune_cifar", "distill"])
def test_what_cannot_be_used_is_refused_before_compute(name, out, words, s3, launch, no_compute):
    one_sentence(launch(name, *SMALL, "--out", out), words)


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_an_endpoint_that_is_not_there(resume, s3, launch, no_compute, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    result = launch("distill", *SMALL, "--out", PLACE, *resume)
    one_sentence(result, "s3://studies/runs/one cannot be reached (NETWORK_CONNECTION")


def test_a_silent_endpoint_is_given_up(s3, monkeypatch):
    monkeypatch.setattr(stored, "REQUEST_SECONDS", 1)
    monkeypatch.setattr(stored, "ATTEMPTS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be reached \(NETWORK_CONNECTION.*Timeout"):
            check_reachable(PLACE)


def test_an_endpoint_with_a_password_is_refused(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:canary@127.0.0.1:1")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL holds credentials") as refused:
        check_reachable(PLACE)
    assert "canary" not in str(refused.value)


def test_a_bucket_that_cannot_be_written_is_refused(s3, tmp_path, monkeypatch):
    def denied(self, name, content):
        raise StorageError("ACCESS_DENIED during PutObject operation")

    monkeypatch.setattr(stored.StoredObjects, "write", denied)
    with (
        pytest.raises(UserError, match=r"cannot be reached \(ACCESS_DENIED"),
        mirrored(PLACE, tmp_path / "a", resume=False),
    ):
        raise AssertionError("computing has begun")


def test_reasons_hide_secrets(s3):
    told = stored.reason(OSError(f"AWS Error X: key {SECRET}\n with {TOKEN} (Request ID: 1)"))
    assert told == "X: key $AWS_SECRET_ACCESS_KEY with $AWS_SESSION_TOKEN"


def test_a_server_that_dies_and_comes_back(s3, tmp_path, monkeypatch):
    """The study goes on; its end says that the copy is stale; --resume brings it there."""
    monkeypatch.setattr(stored, "ATTEMPTS", 1)
    server, host, port = serve()  # of the same process, and so of the same buckets
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    folder = tmp_path / "a"

    def interrupted_service():
        with mirrored(PLACE, folder, resume=False, seconds=1e6):
            (folder / "study.yaml").write_text("x: 1")
            server.stop()

    with pytest.raises(StaleCopy, match=r"is stale .*--resume on this machine to bring it there"):
        interrupted_service()
    server, *_ = serve(port)
    try:
        open_objects(PLACE).write("study.yaml", b"x: 0")
        with mirrored(PLACE, folder, resume=True, seconds=1e6):
            (folder / "more.yaml").write_text("y: 1")
        assert open_objects(PLACE).read("study.yaml") == b"x: 1"
        assert open_objects(PLACE).read("more.yaml") == b"y: 1"
    finally:
        server.stop()


def test_one_run_goes_there_and_is_continued_elsewhere(s3, launch, tmp_path, monkeypatch):
    small = (*SMALL, "--train-subset", "120", "--epochs", "1", "--out", PLACE)
    code, _, err = launch("distill", *small)
    assert code == 0, err
    assert {"config.yaml", "history.jsonl", "model.safetensors", "result.json"} <= set(
        open_objects(PLACE).entries()
    )
    code, _, err = launch("distill", *small)
    assert code == 2 and "holds a study already: add --resume" in err
    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "elsewhere"))
    code, out, err = launch("distill", "--resume", "--out", PLACE)
    assert code == 0 and str(tmp_path / "elsewhere") in out, err
    assert (working_copy(PLACE) / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"s3://studies/runs/one holds no study \(no study.yaml\)"):
        Study.load(str(PLACE))
