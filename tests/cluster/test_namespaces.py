"""Nodes in network namespaces: each has addresses and ports of its own, and a cable that can be
pulled. EKD_CHAOS_NODES=1, `make chaos`; needs root and Linux."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos_marks import IN_CHAOS
from clusters import Cluster, cluster
from holding import Holds
from test_job import nodes_of_trials, study
from test_lost_nodes import check, hold_two

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    IN_CHAOS,
]
NODES = 3
FETCH = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]})
print(urllib.request.urlopen(request, timeout=10).read().decode())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def space(number: int) -> str:
    return f"ekd{os.getpid()}n{number}"


@dataclass
class Namespaced(Cluster):
    """The head has a switch in its namespace, to which each other one has a cable."""

    def host(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", space(number)]

    def get(self, path: str, *, token: str | None = None) -> Any:
        """The dashboard listens on the loopback address of the head's namespace."""
        command = [sys.executable, "-c", FETCH, self.url + path, token or self.token]
        done = subprocess.run([*self.inside(0), *command], capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr)
        return json.loads(done.stdout)

    def pull_cable(self, number: int) -> None:
        """The node and all of its processes live, and nobody hears of them."""
        ip("-n", space(0), "link", "set", f"cable{number}", "down")


@pytest.fixture
def namespaces() -> Iterator[None]:
    made = []
    try:
        for number in range(NODES):
            name = space(number)
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
            address = f"10.77.0.{number + 1}/24"
            if number == 0:
                ip("-n", name, "link", "add", "switch", "type", "bridge")
                ip("-n", name, "addr", "add", address, "dev", "switch")
                ip("-n", name, "link", "set", "switch", "up")
                continue
            cable = f"cable{number}"
            ip("link", "add", cable, "netns", space(0), "type", "veth",
               "peer", "name", "eth0", "netns", name)  # fmt: skip
            ip("-n", space(0), "link", "set", cable, "master", "switch", "up")
            ip("-n", name, "addr", "add", address, "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
        pytest.skip(f"no network namespaces here ({error})")
    yield
    for name in made:
        ip("netns", "del", name)


def test_nodes_of_their_own_networks_share_a_study_and_one_is_cut_off(
    namespaces: None, tmp_path: Path
) -> None:
    out, holds = tmp_path / "run", Holds(tmp_path / "holds")
    with cluster(Namespaced) as made:
        for cpus in (0, 1, 1):
            made.add(cpus=cpus, **(holds.variables if cpus else {}))
        addresses = {node["node_id"]: node["node_ip"] for node in made.alive()}
        assert set(addresses.values()) == {made.host(number) for number in range(NODES)}
        job = made.submit(*study(out, trials=6, epochs=8))
        try:
            hold_two(out, holds, made)
            used = {addresses[node] for node in nodes_of_trials(made, out)}
            before = {p: p.read_bytes() for p in out.glob("trials/*/result.json")}
            made.pull_cable(1)
            holds.clear()
            said, _ = job.communicate(timeout=900)
        finally:
            job.kill()
        assert job.returncode == 0, said
        assert used == {made.host(1), made.host(2)}, "trials run on both"
        assert {node["node_ip"] for node in made.alive()} == {made.host(0), made.host(2)}
        filled = []
        for node in made.nodes[1:]:
            (words,) = node.cache.glob("teachers/*/words.bin")
            filled.append(np.fromfile(words, dtype=np.uint32))
        # Both were filled before the search: the same rows, each by its own teacher. (The one
        # that is left asks its teacher more in the confirm stage.)
        rows = filled[0] > 0
        assert rows.sum() > 160 and np.array_equal(filled[0][rows], filled[1][rows])
    check(out)
    assert {path: path.read_bytes() for path in before} == before
