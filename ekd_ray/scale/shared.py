"""Whether every node of a cluster sees the study's folder."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from ekd_ray.errors import UserError

SECONDS = 60.0  # for the nodes to answer
Ask = Callable[[str, str], bool]


def check_visible(folder: Path) -> None:
    """Raises `UserError` if a node on which trials may run does not see the study's folder.

    Trials write their files where they run, and the driver reads them. One node, or the
    driver's alone, needs no asking.
    """
    import ray

    if not ray.is_initialized():
        return
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }
    nodes.pop(ray.get_runtime_context().get_node_id(), None)
    if nodes:
        refuse_unseen(folder, nodes, _sees)


def refuse_unseen(folder: Path, nodes: Mapping[str, str], ask: Ask) -> None:
    """Leave a file in the folder and ask each node whether it is there.

    Args:
        nodes: id -> address; ask: (node, path) -> whether that node sees the file.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        blind = [address for node, address in nodes.items() if not ask(node, str(probe))]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{folder} is not visible on {len(blind)} node(s) of the cluster ({', '.join(blind)}), "
            "where trials would write their files: choose an --out on a file system that all "
            "nodes share, or for a URI set EKD_STUDIES_DIR to a folder on one."
        )


def _sees(node: str, path: str) -> bool:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=1)(_exists).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    try:
        return bool(ray.get(task.remote(path), timeout=SECONDS))
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:  # a node that dies meanwhile runs no trial
        return True


def _exists(path: str) -> bool:
    folder = Path(path).parent
    if folder.is_dir():
        list(folder.iterdir())  # a network file system may have an old listing
    return Path(path).exists()
