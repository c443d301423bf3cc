"""Ray nodes as processes of their own, each with a cache folder, on this machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    """A raylet, its workers, and on the head everything else, in a process group of its own."""

    process: subprocess.Popen[bytes]
    cache: Path

    def kill(self) -> None:
        """Lose a machine as the others see it: nothing of it says good-bye."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.kill()


@dataclass
class Cluster:
    """A head on 127.0.0.1 that asks for a token, and nodes that are added to it.

    Nothing of it is found by a `ray.init()` of another test, or stopped by `ray stop` of one.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    nodes: list[Node] = field(default_factory=list)

    def host(self, number: int) -> str:
        """The address of a node for the others."""
        return "127.0.0.1"

    def inside(self, number: int) -> list[str]:
        """The beginning of a command that is to run on a node."""
        return []

    @property
    def address(self) -> str:
        return f"{self.host(0)}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of somebody who has the token; `python` is this one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "EKD_"))}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        quiet = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**kept, **token, **quiet, **more}

    def add(
        self, *, cpus: int, gpus: int = 0, asked: Sequence[str] = (), **environment: str
    ) -> Node:
        """Start the head, or a node that joins it, and wait until it is there.

        Ray believes a node its GPUs: there need not be any. Of flags that are `asked` for, those
        are replaced by which nodes of one machine would meet.
        """
        number = len(self.nodes)
        cache = self.folder / f"cache{number}"
        command = [
            *self.inside(number), str(Path(sys.executable).parent / "ray"), "start", *asked,
            "--block", f"--node-ip-address={self.host(number)}",
            f"--num-cpus={cpus}", f"--num-gpus={gpus}",
            "--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",
            # Of its own, too: nodes unpack a job's code there.
            f"--temp-dir={self.folder / str(number)}",
        ]  # fmt: skip
        if number == 0:
            command += [
                "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}",
                f"--ray-client-server-port={free_port()}",
            ]  # fmt: skip
        else:
            command.append(f"--address={self.address}")
        log = open(self.folder / f"node{number}.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True,
            env=self.environment(EKD_CACHE_DIR=str(cache), **environment),
        )  # fmt: skip
        self.nodes.append(Node(process, cache))
        self._wait(number + 1, process)
        return self.nodes[-1]

    def _wait(self, count: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if len(self.alive()) >= count:
                    return
            time.sleep(0.5)
        logs = "\n".join(path.read_text() for path in self.folder.glob("node*.log"))
        raise AssertionError(f"node {count - 1} did not come up: {logs}")

    def get(self, path: str, *, token: str | None = None) -> Any:
        """The answer of the head's dashboard."""
        request = urllib.request.Request(self.url + path)
        request.add_header("Authorization", f"Bearer {token or self.token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def _listed(self, kind: str) -> list[dict[str, Any]]:
        return self.get(f"/api/v0/{kind}?detail=1&limit=1000")["data"]["result"]["result"]

    def alive(self) -> list[dict[str, Any]]:
        return [node for node in self._listed("nodes") if node["state"] == "ALIVE"]

    def node_of_pid(self) -> dict[int, str]:
        """Process id -> node id of every actor that there has been."""
        return {actor["pid"]: actor["node_id"] for actor in self._listed("actors")}

    def submit(self, *entrypoint: str, working_dir: Path = ROOT) -> subprocess.Popen[str]:
        """`ray job submit`, which follows the job to its end."""
        command = [
            *self.inside(0), str(Path(sys.executable).parent / "ray"), "job", "submit",
            "--address", self.url, "--working-dir", str(working_dir), "--", *entrypoint,
        ]  # fmt: skip
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self.environment(), cwd=working_dir,
        )  # fmt: skip


@contextlib.contextmanager
def cluster(kind: type[Cluster] = Cluster) -> Iterator[Cluster]:
    """A cluster without nodes yet; what was started is stopped, by its process ids."""
    # Not pytest's folder: the path of a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ekd"))
    made = kind(folder)
    try:
        yield made
    finally:
        for node in reversed(made.nodes):
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)
