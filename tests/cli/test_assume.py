"""`--dry-run --assume gpus=4x8`: a plan for nodes that nobody has."""

from __future__ import annotations

import re

import pytest

from ekd_ray.errors import UserError
from ekd_ray.scale.assumed_nodes import CPUS_PER_GPU, assumed_nodes, assuming, parse_nodes

STUDY = (
    "tune", "--dataset", "digits", "--pair", "resnet20-resnet8", "--trials", "400", "--dry-run",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("gpus=4x8", 4 * [(8.0 * CPUS_PER_GPU, 8.0)]),
        ("cpus=2x32", 2 * [(32.0, 0.0)]),
        ("gpus=3x8, cpus=3x16", 3 * [(16.0, 8.0)]),
    ],
)
def test_nodes_are_read(text: str, nodes: list[tuple[float, float]]) -> None:
    assert parse_nodes(text) == nodes


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("gpus=4", "gpus=4x8"),
        ("", "cpus="),
        ("gpus=4x8,gpus=4x8", "both"),
        ("gpus=-1x8", "NODES"),
        ("gpus=0x8", "got 0 with 8"),
        ("cpus=4x99999", "99,999"),
        ("gpus=4x8,cpus=3x32", "4 nodes with GPUs and 3"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, word: str) -> None:
    with pytest.raises(UserError, match=re.escape(word)) as found:
        parse_nodes(text)
    assert "\n" not in str(found.value)


def test_nothing_is_assumed_afterwards() -> None:
    with assuming("gpus=1x1"):
        assert assumed_nodes() == [(CPUS_PER_GPU, 1.0)]
    assert assumed_nodes() is None


@pytest.mark.parametrize(
    ("nodes", "share", "at_once", "device"),
    [
        ("gpus=4x8", "0.25", 4 * 8 * 4, "32 GPUs"),
        ("gpus=4x8,cpus=4x16", "0.25", 4 * 16, "16 GPUs"),  # CPUs are what is short
        ("cpus=4x32", "auto", 4 * 32, "128 CPU"),
    ],
)
def test_the_plan_is_that_of_the_assumed_nodes(launch, nodes, share, at_once, device) -> None:
    code, out, err = launch(*STUDY, "--assume", nodes, "--gpus-per-trial", share)
    assert code == 0, err
    assert f"{at_once} trials at once on 4 assumed nodes" in out
    (estimate,) = [line for line in out.splitlines() if line.startswith("estimate")]
    assert device in estimate
    assert ("where the GPU has it" in out) == nodes.startswith("gpus")


def test_further_slots_than_runs_are_no_quicker(launch) -> None:
    few = (*STUDY[:-2], "3", "--dry-run", "--top-k", "1", "--seeds", "1")
    lines = []
    for nodes in ("cpus=1x8", "cpus=100x100"):
        code, out, err = launch(*few, "--assume", nodes)
        assert code == 0, err
        lines.append(next(line for line in out.splitlines() if line.startswith("estimate")))
    assert lines[0] == lines[1]


def test_what_would_not_fit_there_is_refused(launch) -> None:
    code, _, err = launch(*STUDY, "--assume", "gpus=4x8", "--gpus-per-trial", "9")
    assert code == 2 and "8 on the largest" in err


def test_it_is_for_plans_of_several(launch) -> None:
    code, _, err = launch(*STUDY[:-1], "--assume", "gpus=4x8")
    assert code == 2 and "--dry-run" in err
    one = ("distill", *STUDY[1:5], "--method", "none", "--dry-run", "--assume", "gpus=1x8")
    code, _, err = launch(*one)
    assert code == 2 and "--workers" in err
    code, out, err = launch(*one, "--workers", "8")
    assert code == 0 and "8 workers, each with" in out and "1 GPU" in out, err
