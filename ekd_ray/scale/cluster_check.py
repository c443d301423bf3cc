"""The lacks of a cluster before a study is sent there: asked of every node, in bounded time."""

from __future__ import annotations

import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekd_ray.config.phrases import several, size_text
from ekd_ray.errors import UserError
from ekd_ray.scale import node_probe
from ekd_ray.scale.cluster import begin_on_node, connected

LEAST_CACHE = 2 * 2**30  # bytes: a teacher's logits of CIFAR-100 are up to 1.6 GB
LEAST_SHM = 256 * 2**20  # bytes in all: Docker gives 64 MiB by itself
FULL = 0.05  # of Ray's disk: with less free it stores no objects
DASHBOARD_SECONDS = 5.0
QUESTIONS = 4  # to every node, and the removal of what the third has left
OURS = ("ray", "python", "torch", "ekd_ray", "optuna")


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """A node of a cluster; `found` is what `look_around` says there, None without an answer."""

    node: str
    address: str
    cpus: float
    gpus: float
    found: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class ClusterReport:
    """The findings.

    Attributes:
        versions: of the driver.
        token: whether the cluster asks for one; None where that cannot be known.
        faults: a sentence each.
    """

    versions: dict[str, str | None]
    nodes: list[NodeReport]
    token: bool | None
    faults: list[str]


def check_cluster(out: Path | None, *, seconds: float) -> ClusterReport:
    """Ask every node of the cluster of RAY_ADDRESS; nothing is left there.

    Args:
        out: of the study to come, None for no look at it.
        seconds: for all nodes to answer each of three questions.

    Raises:
        UserError: there is no way into the cluster.
    """
    import ray

    folder = None if out is None else _existing(out)
    ray.cloudpickle.register_pickle_by_value(node_probe)
    try:
        with connected():
            context = ray.get_runtime_context()
            there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            own = node_probe.look_around(None, False)["versions"]
            answers = _ask(
                there, node_probe.look_around, seconds,
                lambda node: (folder and str(folder), there[node]["Resources"].get("GPU", 0) > 0),
            )  # fmt: skip
            nodes = [
                NodeReport(
                    node=node, address=entry["NodeManagerAddress"], found=answers.get(node),
                    cpus=entry["Resources"].get("CPU", 0.0),
                    gpus=entry["Resources"].get("GPU", 0.0),
                )
                for node, entry in there.items()
            ]  # fmt: skip
            nodes.sort(key=lambda node: (node.node != context.get_node_id(), node.address))
            faults = [fault for node in nodes for fault in find_faults(node, own, seconds)]
            if folder is not None:
                faults += _check_shared(folder, [*nodes], seconds)
            url = ray.init(ignore_reinit_error=True, logging_level="ERROR").dashboard_url
            return ClusterReport(versions=own, nodes=nodes, token=asks_token(url), faults=faults)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_probe)


def _ask(
    nodes: Mapping[str, Any],
    question: Callable[..., Any],
    seconds: float,
    arguments: Callable[[str], tuple[Any, ...]],
) -> dict[str, Any]:
    """The answers of the nodes that gave one in time."""
    import ray

    asked = {begin_on_node(node, question, *arguments(node)): node for node in nodes}
    ready, late = ray.wait([*asked], num_returns=len(asked), timeout=seconds) if asked else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    answers = {}
    for reference in ready:
        try:
            answers[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError:
            continue  # it died meanwhile
    return answers


def _existing(out: Path) -> Path:
    """The folder itself, or the nearest above it; raises `UserError` if that is the root."""
    found = next(place for place in (out, *out.parents) if place.exists())
    if found == found.parent:
        raise UserError(
            f"nothing of --out {out} exists on this node: make its first folder, on a file system "
            "that all nodes share."
        )
    return found if found.is_dir() else found.parent


def find_faults(node: NodeReport, own: Mapping[str, str | None], seconds: float) -> Iterator[str]:
    """The sentences on a node by itself, which has the versions `own` of the driver to keep to."""
    if node.found is None:
        yield f"{node.address} did not answer within {seconds:g} s: look at it, or remove it."
        return
    found = node.found
    for name in OURS:
        there, here = found["versions"][name], own[name]
        if there is None:
            cure = (
                "install it there, or submit with --working-dir"
                if name == "ekd_ray"
                else "install it there"
            )
            yield f"{node.address} has no {name}, the driver has {here}: {cure}."
        elif there != here:
            yield f"{node.address} has {name} {there}, the driver {here}: install the same."
    if found["gpus"] is not None and found["gpus"] < node.gpus:
        yield (
            f"{node.address} has {several(node.gpus, 'GPU')} for Ray and torch sees "
            f"{found['gpus']}: install torch for CUDA and the driver there, or start it with "
            f"--num-gpus={found['gpus']}."
        )
    free, total = found["temporary"]
    if free < FULL * total:
        yield (
            f"{node.address} has {size_text(free)} free for temporary files, {free / total:.0%} of "
            f"that disk, and Ray needs {FULL:.0%}: free some, or start it with --temp-dir."
        )
    if found["cache"][0] < LEAST_CACHE:
        yield (
            f"{node.address} has {size_text(found['cache'][0])} free for the cache, which wants "
            f"{size_text(LEAST_CACHE)}: free some, or set EKD_CACHE_DIR for its ray start."
        )
    if found["shm"] is not None and found["shm"][1] < LEAST_SHM:
        yield (
            f"{node.address} has a /dev/shm of {size_text(found['shm'][1])}, Ray wants "
            f"{size_text(LEAST_SHM)}: start its container with --shm-size=8g."
        )


def _check_shared(folder: Path, nodes: list[NodeReport], seconds: float) -> Iterator[str]:
    """The sentences on the folder of the results: one node writes there, the others look."""
    wrong = {"missing": "is not there", "read-only": "cannot be written to"}
    for node in nodes:
        if node.found and node.found["folder"] in wrong:
            yield f"{folder} {wrong[node.found['folder']]} on {node.address}: mount it there."
    able = {node.node: node.address for node in nodes if (node.found or {}).get("folder") == "fine"}
    if not able:
        return
    writer = [*able][-1]  # not the driver's own, where there is another
    path = str(folder / f".probe-{uuid.uuid4().hex}.tmp")
    try:
        if not _ask({writer: 0}, node_probe.leave_word, seconds, lambda _: (path,)).get(writer):
            yield f"{able[writer]} could not write to {folder}: look at its disk and permissions."
            return
        others = {node: address for node, address in able.items() if node != writer}
        sees = _ask(others, node_probe.sees_word, seconds, lambda _: (path,))
        for other, address in others.items():
            if not sees.get(other):
                yield (
                    f"{address} does not see what {able[writer]} wrote to {folder}: choose an "
                    "--out on a file system that all nodes share."
                )
    finally:
        _ask({writer: 0}, node_probe.remove_word, seconds, lambda _: (path,))
        node_probe.remove_word(path)


def asks_token(url: str | None) -> bool | None:
    """Whether a dashboard refuses who has no token; None without an answer."""
    if not url:
        return None
    try:
        place = url if "://" in url else f"http://{url}"
        with urllib.request.urlopen(f"{place}/api/jobs/", timeout=DASHBOARD_SECONDS):
            return False
    except urllib.error.HTTPError as error:
        return True if error.code in (401, 403) else None
    except (OSError, ValueError):
        return None
