"""docs/guide/cluster.md as it stands there: token, head, node, check, submit, watch, fetch."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import ROOT, Cluster, cluster

from ekd_ray.results import Bundle, Study

# Faster: what is checked, of made-up answers (test_cluster_check.py); places in a job
# (tests/cli/test_job_places.py); plans (tests/cli/test_assume.py).
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
PAGE = ROOT / "docs" / "guide" / "cluster.md"
SMALL = [
    "--train-subset", "160", "--epochs", "1", "--trials", "2", "--seeds", "1", "--top-k", "1",
    "--set", "baselines=[none]", "--set", "teacher=resnet8", "--set", "scheduler=none",
    "--set", "teacher_training={epochs: 1}",
]  # fmt: skip


def commands() -> list[str]:
    """The commands of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return re.sub(r"\s*\\\n\s*", " ", "".join(blocks)).strip().splitlines()


def run(line: str, home: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", line], cwd=home, env=environment, text=True, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


@pytest.fixture
def made() -> Iterator[Cluster]:
    with cluster() as found:
        yield found


def test_the_page_is_a_study_on_two_nodes(made: Cluster, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    command = tmp_path / "bin" / "ekd-ray"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec python -m ekd_ray "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{made.environment()['PATH']}"
    code = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": path}
    environment = made.environment(**code)
    del environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]
    said: dict[str, str] = {}
    for line in commands():
        line = line.replace("http://127.0.0.1:8265", made.url)
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            name, value = words[1].split("=")
            environment[name] = {"HEAD": made.host(0), "SHARED": str(shared)}.get(name, value)
        elif words[:2] == ["ray", "start"]:
            flags = [word.replace("$HEAD", made.host(0)) for word in words[2:]]
            made.add(cpus=1, asked=flags, **code)
        else:
            small = " ".join(map(shlex.quote, SMALL)) if words[:2] == ["ray", "job"] else ""
            line += f" {small}" if "submit" in words else ""
            said[" ".join(words[:3])] = run(line, tmp_path, environment)
        if (token := tmp_path / ".ray" / "auth_token").exists():
            made.token = token.read_text()
    assert len(made.nodes) == 2
    assert made.token in (tmp_path / "token").read_text(), "what is printed is what is kept"
    assert "on 4 assumed nodes" in said["ekd-ray tune --dataset"]
    assert "nothing is missing" in said["ekd-ray cluster check"]
    assert not list(shared.glob(".*")), "the check leaves nothing"
    assert [job["submission_id"] for job in made.get("/api/jobs/") if job["submission_id"]] == [
        "first"
    ], "nor a job"
    assert "succeeded" in said["ray job status"]
    assert len(Study.load(shared / "first").records()) == 2
    assert Bundle.load(tmp_path / "first-best").verify().ok
    refused = subprocess.run(
        ["bash", "-c", f"ray job submit --address {made.url} -- ekd-ray tune --dataset digits "
         "--pair resnet20-resnet8"],
        cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "--out must be an absolute folder" in refused.stdout + refused.stderr
