"""Against a real S3 server: objects, what is refused before compute, an endpoint that goes."""

from __future__ import annotations

import socket

import pytest
from conftest import SECRET, TOKEN, serve
from launchers_run import DIGITS

from ekd_ray.errors import UserError
from ekd_ray.remote import object_store
from ekd_ray.remote.location import parse_location, working_copy
from ekd_ray.remote.object_store import StorageError, open_store
from ekd_ray.remote.session import StaleCopy, mirrored, reading_copy
from ekd_ray.results import Study

LOCATION = parse_location("s3://studies/runs/one")
SMALL = (*DIGITS, "--method", "none", "--quiet")


def test_objects_are_put_listed_read_and_removed(s3, tmp_path):
    store = open_store(LOCATION)
    assert store.list_objects() == {} and store.read("a/b") is None and store.stat("a/b") is None
    store.delete("a/b")
    contents = {"big": bytes(range(256)) * 80_000, "c/empty": b"", "a/b": b"new"}
    store.write("a/b", b"old")
    for name, content in contents.items():
        store.write(name, content)
    found = store.list_objects()
    assert {name: stamp.size for name, stamp in found.items()} == {
        name: len(content) for name, content in contents.items()
    }
    assert found["big"] == store.stat("big") and found["big"].changed > 1.7e18
    for name, content in contents.items():
        store.download(name, tmp_path / "back" / name)
        assert (tmp_path / "back" / name).read_bytes() == content == store.read(name)
    store.delete("a/b")
    assert set(store.list_objects()) == {"big", "c/empty"}


def test_a_planted_name_does_not_leave_the_folder(s3, tmp_path):
    from moto.s3.models import s3_backends  # clients normalise such a key

    (backend,) = (b["aws"] for b in s3_backends.values() if "studies" in b["aws"].buckets)
    backend.put_object("studies", "runs/one/x/../../../out", b"x")
    with pytest.raises(UserError, match="would lie outside of the study"):
        reading_copy(LOCATION)


def one_sentence(result, words):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err
    assert SECRET not in err and TOKEN not in err


@pytest.fixture
def no_compute(monkeypatch):
    from ekd_ray.studies import pipeline, training

    def too_late(*args, **kwargs):
        raise AssertionError("computing has begun")

    monkeypatch.setattr(training, "distill", too_late)
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
    result = launch("distill", *SMALL, "--out", LOCATION, *resume)
    one_sentence(result, "s3://studies/runs/one cannot be reached (NETWORK_CONNECTION")


def test_a_silent_endpoint_is_given_up(s3, monkeypatch):
    monkeypatch.setattr(object_store, "REQUEST_SECONDS", 1)
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be reached \(NETWORK_CONNECTION.*Timeout"):
            open_store(LOCATION)


def test_an_endpoint_with_a_password_is_refused(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:canary@127.0.0.1:1")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL holds credentials") as refused:
        open_store(LOCATION)
    assert "canary" not in str(refused.value)


def test_a_bucket_that_cannot_be_written_is_refused(s3, tmp_path, monkeypatch):
    def denied(self, name, content):
        raise StorageError(LOCATION, "ACCESS_DENIED during PutObject operation")

    monkeypatch.setattr(object_store.Store, "write", denied)
    with (
        pytest.raises(UserError, match=r"cannot be reached \(ACCESS_DENIED"),
        mirrored(LOCATION, tmp_path / "a", resume=False),
    ):
        raise AssertionError("computing has begun")


def test_reasons_hide_secrets(s3):
    reason = object_store.redact(
        OSError(f"AWS Error X: key {SECRET}\n with {TOKEN} (Request ID: 1)")
    )
    assert reason == "X: key $AWS_SECRET_ACCESS_KEY with $AWS_SESSION_TOKEN"


def test_a_server_that_dies_and_comes_back(s3, tmp_path, monkeypatch):
    """The study goes on; its end says that the copy is stale; --resume brings it there."""
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    monkeypatch.setenv("EKD_MIRROR_SECONDS", "1e6")
    server, host, port = serve()  # of the same process, and so of the same buckets
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    folder = tmp_path / "a"

    def interrupted_service():
        with mirrored(LOCATION, folder, resume=False):
            (folder / "study.yaml").write_text("x: 1")
            server.stop()

    with pytest.raises(StaleCopy, match=r"is stale .*--resume on this machine to bring it there"):
        interrupted_service()
    server, *_ = serve(port)
    try:
        open_store(LOCATION).write("study.yaml", b"x: 0")
        with mirrored(LOCATION, folder, resume=True):
            (folder / "more.yaml").write_text("y: 1")
        assert open_store(LOCATION).read("study.yaml") == b"x: 1"
        assert open_store(LOCATION).read("more.yaml") == b"y: 1"
    finally:
        server.stop()


def test_one_run_goes_there_and_is_continued_elsewhere(s3, launch, tmp_path, monkeypatch):
    small = (*SMALL, "--train-subset", "120", "--epochs", "1", "--out", LOCATION)
    code, _, err = launch("distill", *small)
    assert code == 0, err
    assert {"config.yaml", "history.jsonl", "model.safetensors", "result.json"} <= set(
        open_store(LOCATION).list_objects()
    )
    code, _, err = launch("distill", *small)
    assert code == 2 and "holds a study already: add --resume" in err
    monkeypatch.setenv("EKD_STUDIES_DIR", str(tmp_path / "elsewhere"))
    code, out, err = launch("distill", "--resume", "--out", LOCATION)
    assert code == 0 and str(tmp_path / "elsewhere") in out, err
    assert (working_copy(LOCATION) / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"s3://studies/runs/one holds no study \(no study.yaml\)"):
        Study.load(str(LOCATION))
