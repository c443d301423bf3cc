"""Bundles on the hub, against a stand-in on 127.0.0.1: pushed, loaded, refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READER, TOKEN, Hub, serve_hub
from huggingface_hub import constants

from ekd_ray.engine.final import WEIGHTS
from ekd_ray.errors import UserError
from ekd_ray.results import Bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.records import MANIFEST

WHOLE = {*FILES, MANIFEST, ".gitattributes"}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """huggingface_hub reads its variables when it is imported: its constants are set instead."""
    with serve_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            found.url + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_what_is_pushed_is_what_is_loaded(hub, bundle):
    url = bundle.push_to_hub("me/digits")
    repo = hub.repos["me/digits"]
    assert repo.private
    assert url == f"{hub.url}/me/digits/commit/{repo.branches['main'][-1]}"
    assert len(repo.branches["main"]) == 2, "made, then one commit"
    assert set(repo.files()) == WHOLE
    for name in (*FILES, MANIFEST):
        assert repo.files()[name] == (bundle.path / name).read_bytes()
    found = Bundle.load("hf:me/digits")
    assert found.path.is_relative_to(constants.HF_HUB_CACHE)
    assert found.verify().ok
    assert (found.metrics, found.config) == (bundle.metrics, bundle.config)
    for name, value in found.model().state_dict().items():
        assert value.equal(bundle.model().state_dict()[name])


def test_a_branch_is_made_and_loaded_by_name_and_commit(hub, bundle):
    bundle.push_to_hub("me/digits", private=False)
    (bundle.path / "environment.json").write_text('{"threads": 9, "packages": {}}')
    write_manifest(bundle.path, FILES)
    bundle.push_to_hub("me/digits", revision="v2", private=False)
    repo = hub.repos["me/digits"]
    assert not repo.private
    assert Bundle.load("hf:me/digits").environment()["threads"] == 1
    assert Bundle.load("hf:me/digits@v2").environment()["threads"] == 9
    assert Bundle.load(f"hf:me/digits@{repo.resolve('v2')}").environment()["threads"] == 9


def test_a_push_replaces_a_bundle_and_leaves_the_rest(hub, bundle):
    bundle.push_to_hub("me/digits")
    repo = hub.repos["me/digits"]
    repo.commit("main", {**repo.files(), "model.onnx": b"of an older bundle", "plot.png": b"mine"})
    bundle.push_to_hub("me/digits")
    assert set(repo.files()) == {*WHOLE, "plot.png"}
    assert Bundle.load("hf:me/digits").verify().ok


def test_a_card_may_be_edited_on_the_hub_and_nothing_else(hub, bundle):
    bundle.push_to_hub("me/digits")
    repo = hub.repos["me/digits"]
    repo.commit("main", {**repo.files(), "README.md": b"# My words"})
    assert Bundle.load("hf:me/digits").config == bundle.config
    repo.commit("main", {**repo.files(), WEIGHTS: repo.files()[WEIGHTS] + b"\0"})
    with pytest.raises(UserError, match=rf"hf:me/digits is damaged: {WEIGHTS} was changed: its"):
        Bundle.load("hf:me/digits")


def test_without_a_network_the_fetched_bundle_is_there(hub, bundle, monkeypatch):
    bundle.push_to_hub("me/digits")
    Bundle.load("hf:me/digits")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert Bundle.load("hf:me/digits").verify().ok


def test_a_damaged_bundle_is_not_pushed(hub, bundle):
    (bundle.path / "history.jsonl").write_text("")
    with pytest.raises(UserError, match=r"is not pushed: history\.jsonl was changed"):
        bundle.push_to_hub("me/digits")
    assert hub.asked == []


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".")
    assert not any(token in said for token in (TOKEN, READER, "hf_wrong"))
    for word in words:
        assert word in said


@pytest.mark.parametrize("name", ["digits", "a/b/c", "me/digits@", "me/../x", "https://x/y", "@v"])
def test_what_is_no_name_is_refused(hub, bundle, name):
    refused(lambda: bundle.push_to_hub(name), "owner/name[@revision]", repr(name))
    refused(lambda: Bundle.load(f"hf:{name}"), "owner/name[@revision]")
    assert hub.asked == []


def test_a_push_that_may_not_be_is_one_sentence(hub, bundle, monkeypatch):
    refused(lambda: bundle.push_to_hub("them/digits"), "403", "rights to create", "right to write")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(lambda: bundle.push_to_hub("me/digits"), "401", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: bundle.push_to_hub("me/digits"), "needs a token", "HF_TOKEN")
    assert hub.repos == {}


def test_an_upload_that_breaks_off_leaves_no_half_bundle(hub, bundle):
    hub.broken = "/commit/"
    refused(lambda: bundle.push_to_hub("me/digits"), "500: out of order", "try again later")
    assert set(hub.repos["me/digits"].files()) == {".gitattributes"}


def test_what_cannot_be_loaded_is_one_sentence(hub, bundle, monkeypatch):
    refused(lambda: Bundle.load("hf:me/none"), "hf:me/none is not on the hub")
    bundle.push_to_hub("me/digits")
    refused(lambda: Bundle.load("hf:me/digits@v9"), "hf:me/digits@v9 has no such revision")
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(lambda: Bundle.load("hf:me/digits"), "not to be read with this machine's token")
    hub.repos["me/other"] = repo = type(hub.repos["me/digits"])(private=False)
    repo.commit("main", {"model.safetensors": b"of another library"})
    refused(lambda: Bundle.load("hf:me/other"), "hf:me/other holds no bundle (no MANIFEST)")
    repo.commit("main", {"pytorch_model.bin": b""})
    refused(lambda: Bundle.load("hf:me/other"), "hf:me/other holds no bundle (no MANIFEST)")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused(lambda: Bundle.load("hf:me/new"), "could not be asked for hf:me/new", "check the net")
    refused(lambda: bundle.push_to_hub("me/digits"), "could not be asked", "check the network")


def test_without_the_package_one_sentence_says_what_to_install(hub, bundle, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(lambda: Bundle.load("hf:me/digits"), "pip install 'ekd_ray[hub]'")
    refused(lambda: bundle.push_to_hub("me/digits"), "pip install 'ekd_ray[hub]'")


def test_export_pushes_what_it_has_written(hub, real_study, launch, monkeypatch):
    argv = ("export_best", real_study[0].path, "--out", "b")
    code, out, _ = launch(*argv, "--hub", "me/digits@v2", "--license", "mit", "--public")
    repo = hub.repos["me/digits"]
    assert code == 0
    assert out.splitlines()[-1] == f"hub: {hub.url}/me/digits/commit/{repo.branches['v2'][-1]}"
    assert not repo.private and set(repo.files("v2")) == WHOLE
    assert b"\nlicense: mit\n" in repo.files("v2")["README.md"]
    assert Path("b/README.md").read_bytes() == repo.files("v2")["README.md"]
    hub.asked.clear()
    code, out, _ = launch(*argv, "--hub", "me/other", "--dry-run")
    assert (code, hub.asked) == (0, ["GET /api/whoami-v2"])
    assert out.endswith("to b, and push that to hf:me/other\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--hub", "digits"), "owner/name[@revision]"),
        (("--hub", "me/digits"), "refused by the hub (401"),
        (("--public",), "add --hub"),
        (("--license", "My Own"), "license must be a name"),
    ],
)
def test_export_refuses_before_it_writes(hub, real_study, launch, monkeypatch, flags, words):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = launch("export_best", real_study[0].path, "--out", "b", *flags)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1 and "hf_wrong" not in err
    assert not Path("b").exists()


PUSH_AND_LOAD = """
import sys
from ekd_ray.results import Bundle
print(Bundle.load(sys.argv[1]).push_to_hub("me/digits"))
print(Bundle.load("hf:me/digits").path)
"""


@pytest.mark.slow
def test_the_users_own_variables_say_where(bundle, tmp_path):
    """In a process of its own, since huggingface_hub reads them when it is imported."""
    with serve_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD, str(bundle.path)], env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    url, path = done.stdout.splitlines()
    assert url.startswith(f"{hub.url}/me/digits/commit/")
    assert Path(path).is_relative_to(tmp_path / "hf" / "hub")
    assert TOKEN not in done.stdout + done.stderr
