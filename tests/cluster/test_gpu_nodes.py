"""Placement on a mixed cluster: nodes that claim GPUs, which there need not be for that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos_marks import IN_CHAOS
from clusters import ROOT, cluster

DRIVER = Path(__file__).with_name("gpu_places.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `gpu_places` printed, with `gpu` and `cpu`, the ids of the nodes."""
    out = tmp_path_factory.mktemp("places")
    with cluster() as made:
        ids: list[str] = []
        for cpus, gpus in ((0, 0), (2, 2), (2, 0)):
            made.add(cpus=cpus, gpus=gpus, PYTHONPATH=str(ROOT))
            ids += [node["node_id"] for node in made.alive() if node["node_id"] not in ids]
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(out)], capture_output=True, text=True, timeout=560,
            env=made.environment(RAY_ADDRESS=made.address, PYTHONPATH=str(ROOT)), cwd=out,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "gpu": ids[1], "cpu": ids[2]}


def seen(found: dict[str, Any], asked: str, kind: str) -> set[tuple[str, str]]:
    return {(place["node"], place["visible"]) for place in found[asked][kind]}


@IN_CHAOS
@pytest.mark.slow  # test_placement.py has the rules
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["trials", "fills"])
def test_trials_and_fills_run_where_the_gpus_are_each_with_its_own(
    found: dict[str, Any], kind: str
) -> None:
    gpu, cpu = found["gpu"], found["cpu"]
    assert seen(found, "auto", kind) == {(gpu, "0"), (gpu, "1")}
    assert seen(found, "0.0", kind) == {(gpu, ""), (cpu, "")}, "hidden from all"


@IN_CHAOS
@pytest.mark.slow  # test_placement.py has the rules
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_process_that_fills_on_a_gpu_ends_with_its_part(found: dict[str, Any]) -> None:
    """It would keep its memory there while the trials need it; on CPUs it is used again."""
    processes = {
        asked: [place["pid"] for place in found[asked]["fills"]] for asked in ("auto", "0.0")
    }
    assert len(set(processes["auto"])) == len(processes["auto"]) > 2
    assert len(set(processes["0.0"])) < len(processes["0.0"])


@IN_CHAOS
@pytest.mark.slow  # test_placement.py has the rules
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_what_precedes_the_trials_runs_on_a_gpu_and_not_in_the_driver(
    found: dict[str, Any],
) -> None:
    off = found["off"]
    assert off["place"]["node"] == found["gpu"] and off["place"]["visible"] in ("0", "1")
    assert off["place"]["pid"] != off["driver"] == off["without a GPU"]
    assert off["refused"] == "no"
