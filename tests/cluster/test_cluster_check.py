"""`ekd-ray cluster check`: each fault has its sentence, of nodes that say what a test makes up.

On real nodes: the last test here, and tests/cluster/test_cluster_page.py.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chaos_marks import IN_CHAOS
from clusters import ROOT, cluster
from ray.job_submission import JobStatus

from ekd_ray.errors import UserError
from ekd_ray.scale import cluster_check, node_probe, remote_check
from ekd_ray.scale.cluster_check import NodeReport, asks_token, find_faults

GIB = 2**30
OWN = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1", "ekd_ray": "0.1.0", "optuna": "5.0"}
FOUND: dict[str, Any] = {
    "versions": OWN, "gpus": 8, "cache": [50 * GIB, 100 * GIB], "temporary": [50 * GIB, 100 * GIB],
    "shm": [8 * GIB, 8 * GIB], "folder": "fine",
}  # fmt: skip
NODE = NodeReport(node="b", address="10.0.0.2", cpus=16, gpus=8, found=FOUND)


def test_a_node_like_the_driver_has_no_fault() -> None:
    assert not [*find_faults(NODE, OWN, 30)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"versions": {**OWN, "torch": "2.13.0"}}, ["torch 2.13.0", "2.14.1"]),
        ({"versions": {**OWN, "optuna": None}}, ["no optuna", "5.0"]),
        ({"versions": {**OWN, "ekd_ray": None}}, ["no ekd_ray", "--working-dir"]),
        ({"gpus": 0}, ["8 GPUs for Ray", "torch sees 0"]),
        ({"cache": [GIB, 100 * GIB]}, ["EKD_CACHE_DIR", "1.00 GiB"]),
        ({"temporary": [4 * GIB, 100 * GIB]}, ["--temp-dir", "4%"]),
        ({"shm": [GIB // 16, GIB // 16]}, ["--shm-size", "64.0 MiB"]),
    ],
)
def test_a_fault_is_one_sentence(changed: dict[str, Any], words: list[str]) -> None:
    (fault,) = find_faults(replace(NODE, found={**FOUND, **changed}), OWN, 30)
    assert fault.startswith("10.0.0.2 ") and all(word in fault for word in words)


def test_a_node_without_an_answer_is_a_fault() -> None:
    (fault,) = find_faults(replace(NODE, found=None), OWN, 7)
    assert "10.0.0.2 did not answer within 7 s" in fault


@pytest.mark.parametrize("shared", [True, False])
def test_one_node_writes_and_the_others_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: bool
) -> None:
    """Each node has a disk of its own here, or all have the same; nothing stays on any."""

    def ask(nodes: Any, question: Callable[..., Any], _: float, arguments: Any) -> dict[str, Any]:
        place = {node: tmp_path if shared else tmp_path / node for node in nodes}
        answers = {}
        for node in nodes:
            place[node].mkdir(exist_ok=True)
            (path,) = arguments(node)
            answers[node] = question(str(place[node] / Path(path).name))
        return answers

    monkeypatch.setattr(cluster_check, "_ask", ask)
    nodes = [replace(NODE, node=name, address=f"10.0.0.{name}") for name in "123"]
    faults = [*cluster_check._check_shared(tmp_path, nodes, 1)]
    assert len(faults) == (0 if shared else 2)
    assert all("does not see what 10.0.0.3 wrote" in fault for fault in faults)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_a_node_lacks_or_cannot_write_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cluster_check, "_ask", lambda nodes, *_: dict.fromkeys(nodes, True))
    nodes = [replace(NODE, found={**FOUND, "folder": state}) for state in ("missing", "read-only")]
    first, second = cluster_check._check_shared(tmp_path, nodes, 1)
    assert "is not there" in first and "cannot be written" in second


def test_a_probe_tells_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "to" / "come"))
    found = node_probe.look_around(str(tmp_path), False)
    assert found["versions"].keys() == OWN.keys() and all(found["versions"].values())
    assert found["folder"] == "fine" and found["gpus"] is None
    usage = os.statvfs(tmp_path)
    assert found["cache"][1] == usage.f_frsize * usage.f_blocks
    assert not (tmp_path / "to").exists()
    assert node_probe.look_around(str(tmp_path / "gone"), False)["folder"] == "missing"
    (tmp_path / "optuna-0.1.dist-info").mkdir()
    (tmp_path / "optuna-0.1.dist-info" / "METADATA").write_text("Name: optuna\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert node_probe.look_around(None, False)["versions"]["optuna"] == "0.1"


@pytest.mark.parametrize(("code", "asks"), [(200, False), (401, True), (403, True), (500, None)])
def test_a_dashboard_is_asked_without_a_token(code: int, asks: bool | None) -> None:
    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert asks_token(f"127.0.0.1:{server.server_port}") is asks
    assert asks_token(f"127.0.0.1:{server.server_port}") is None, "nobody answers"


def test_the_answer_of_a_job_is_found_among_what_ray_says() -> None:
    values = {"faults": ["a"], "nodes": [], "versions": {}, "token": True}
    said = f"INFO Running {{entrypoint}}\n{json.dumps(values, indent=2)}\n"
    assert remote_check._values_in(said) == values
    assert remote_check._values_in("Running\n{\n}\n") is None
    assert "no ekd_ray" in remote_check._describe_failure("http://h", "No module named ekd_ray")
    assert "error: why" in remote_check._describe_failure("http://h", "x\nerror: why\nbye")


def test_a_job_that_ray_writes_down_again_is_deleted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_check, "LOOK_SECONDS", 0.0)
    looks = iter([True, False, False, True, *[False] * 9])
    deleted: list[str] = []
    client = SimpleNamespace(
        get_job_status=lambda job: JobStatus.SUCCEEDED, delete_job=deleted.append,
        list_jobs=lambda: [SimpleNamespace(submission_id="a")] if next(looks) else [],
    )  # fmt: skip
    remote_check._delete(client, "a")
    assert deleted == ["a", "a"]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--address", "http://127.0.0.1:9"], "does not answer"),
        (["--address", "127.0.0.1:9"], "cannot join"),
        (["--address", "local"], "needs a cluster"),
        (["--timeout", "0"], "got 0"),
    ],
)
def test_no_way_in_is_one_sentence(launch, monkeypatch, argv: list[str], word: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # put back afterwards: the flag sets it
    code, out, err = launch("cluster", "check", *argv)
    assert (code, out) == (2, "") and word in err and err.count("\n") == 1


def test_a_folder_of_which_nothing_exists_is_refused() -> None:
    with pytest.raises(UserError, match="/no-such-root/runs"):
        cluster_check._existing(Path("/no-such-root/runs"))


@IN_CHAOS
@pytest.mark.ray
@pytest.mark.slow  # the sentences: test_a_fault_is_one_sentence; alike nodes: test_cluster_page.py
@pytest.mark.timeout(600)
def test_real_nodes_that_differ(tmp_path: Path) -> None:
    """One has another Optuna and GPUs that are not there; a second one hears nothing."""
    decoy = tmp_path / "decoy"
    (decoy / "optuna-0.1.dist-info").mkdir(parents=True)
    (decoy / "optuna-0.1.dist-info" / "METADATA").write_text("Name: optuna\nVersion: 0.1\n")
    (tmp_path / "shared").mkdir()
    with cluster() as made:
        made.add(cpus=0, PYTHONPATH=str(ROOT))
        made.add(cpus=1, gpus=2, PYTHONPATH=f"{decoy}:{ROOT}")
        done = subprocess.run(
            [sys.executable, "-m", "ekd_ray", "cluster", "check", "--json", "--timeout", "60",
             "--address", made.address, "--out", str(tmp_path / "shared" / "runs" / "one")],
            env=made.environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["token"] is True and len(found["nodes"]) == 2
    faults = " ".join(found["faults"])
    assert "optuna 0.1" in faults and "2 GPUs for Ray and torch sees 0" in faults
    assert len(found["faults"]) == 2 + (len([f for f in found["faults"] if "free" in f]))
    assert not list((tmp_path / "shared").iterdir()), "nothing is left, and nothing is made"
