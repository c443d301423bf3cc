"""The nodes of a cluster that only a plan knows: `gpus=4x8`, four nodes with eight GPUs each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ekd_ray.errors import UserError, shorten

CPUS_PER_GPU = 12  # where none are named; clouds give 12 to 24
MOST_NODES, MOST_OF_A_NODE = 10_000, 1024
_PART = re.compile(r"(gpus|cpus)=([0-9]{1,9})x([0-9]{1,9})")

_assumed: list[tuple[float, float]] | None = None  # inside of `assuming`


def assumed_nodes() -> list[tuple[float, float]] | None:
    """CPUs and GPUs of each node inside of `assuming`, else None."""
    return _assumed


@contextlib.contextmanager
def assuming(text: str | None) -> Iterator[None]:
    """Plan for the nodes of `parse_nodes` inside; as it is where the text is None."""
    global _assumed
    before, _assumed = _assumed, None if text is None else parse_nodes(text)
    try:
        yield
    finally:
        _assumed = before


def parse_nodes(text: str) -> list[tuple[float, float]]:
    """CPUs and GPUs of each node, from `gpus=NxM`, `cpus=NxM` or both with a comma between.

    Raises:
        UserError: it is none of these, or names no node, or more than can be.
    """
    parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    kinds = [part[1] for part in parts if part]
    if None in parts or len(set(kinds)) < len(parts):
        raise UserError(
            "--assume takes gpus=NODESxGPUS, cpus=NODESxCPUS or both with a comma between, such as "
            f"gpus=4x8,cpus=4x96, got {shorten(text)}."
        )
    found = {part[1]: (int(part[2]), int(part[3])) for part in parts if part}
    for kind, (nodes, each) in found.items():
        if not (1 <= nodes <= MOST_NODES and 1 <= each <= MOST_OF_A_NODE):
            raise UserError(
                f"--assume takes 1 to {MOST_NODES:,} nodes with 1 to {MOST_OF_A_NODE:,} {kind} "
                f"each, got {nodes:,} with {each:,}."
            )
    if len({nodes for nodes, _ in found.values()}) > 1:
        raise UserError(
            f"--assume names {found['gpus'][0]} nodes with GPUs and {found['cpus'][0]} with CPUs: "
            "give one number of nodes, all of which are alike."
        )
    gpus = found.get("gpus", (0, 0))[1]
    nodes, cpus = found.get("cpus", (found.get("gpus", (0, 0))[0], CPUS_PER_GPU * gpus))
    return [(float(cpus), float(gpus))] * nodes
