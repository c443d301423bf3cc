"""From a worker's files on its node to `failure.log` in the folder of the run that failed there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.engine import ranks
from ekd_ray.errors import Damaged
from ekd_ray.files import read_json, read_tail, write_json
from ekd_ray.results.failure_log import (
    FAILURE_LOG,
    MOST_OF_PART,
    MOST_PARTS,
    hide_in_log,
    write_failure_log,
)
from ekd_ray.results.records import FAILURE
from ekd_ray.scale.cluster import ask_node, live_nodes

ANSWER_SECONDS = 10.0  # for a node to read the end of two files
_NOTE = ".output-{}.tmp"  # by rank; swept away with what else a kill leaves


@contextlib.contextmanager
def output_noted(folder: Path) -> Iterator[None]:
    """Leave in a run's folder where this process of Ray writes, unless the run inside ends well."""
    import ray

    # The process in which a run has failed may be replaced by one that only says so.
    if not ray.is_initialized() or (folder / FAILURE).exists():
        yield
        return
    context = ray.get_runtime_context()
    files = {path: os.path.getsize(path) for fd in (1, 2) if (path := _file_of(fd))}
    note = folder / _NOTE.format(ranks.rank())
    if ranks.is_first():
        (folder / FAILURE_LOG).unlink(missing_ok=True)  # of an earlier try
    write_json(note, {"node": context.get_node_id(), "pid": os.getpid(), "files": files})
    yield
    if not (folder / FAILURE).exists():
        note.unlink(missing_ok=True)


def _file_of(descriptor: int) -> str | None:
    """The plain file that a descriptor writes to; Ray sends what its workers print to such."""
    with contextlib.suppress(OSError):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return path if os.path.isfile(path) else None
    return None


def keep_failure_log(folder: Path, said: str) -> None:
    """Write `failure.log` of a run that failed, as far as its nodes still answer.

    Args:
        said: by Ray, of the failure; empty where the run ended of itself.
    """
    parts = [("Ray says", hide_in_log(said))] if said else []
    for path in sorted(folder.glob(_NOTE.format("*")))[: MOST_PARTS - len(parts)]:
        with contextlib.suppress(Damaged):
            note = read_json(path)
            title = f"the end of what process {note['pid']} wrote on node {str(note['node'])[:8]}"
            parts.append((title, _read_output(note)))
        path.unlink(missing_ok=True)
    if parts:
        with contextlib.suppress(OSError):  # a full disk is said elsewhere
            write_failure_log(folder, parts)


def _read_output(note: dict[str, Any]) -> str:
    import ray

    if note["node"] == ray.get_runtime_context().get_node_id():
        return read_output(note["files"])
    if note["node"] not in live_nodes():
        return "(gone with its node)"
    try:
        return str(ask_node(note["node"], read_output, note["files"], seconds=ANSWER_SECONDS))
    except ray.exceptions.RayError as error:
        return f"(its node did not tell: {type(error).__name__})"


def read_output(files: dict[str, int]) -> str:
    """The end of what a process has written to its files since they had so many bytes."""
    texts = []
    for path, begun in files.items():
        with contextlib.suppress(Damaged):  # gone
            since = os.path.getsize(path) - begun if os.path.exists(path) else 0
            texts.append(read_tail(path, most=min(MOST_OF_PART // 2, max(0, since))))
    return hide_in_log("\n".join(text for text in texts if text.strip()))
