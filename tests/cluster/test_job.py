"""`ray job submit` to a head with two nodes, each with a disk of its own."""

from __future__ import annotations

import re
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from chaos_marks import IN_CHAOS
from clusters import Cluster, cluster

from ekd_ray.results import Bundle, Study

# Faster: what fits on which nodes and who fills which disk (test_placement.py), what a job ships
# (test_deploy.py), a study of several processes (test_study_run.py).
# tests/cluster/test_cluster_page.py submits a study to two nodes whenever the slow tests run.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    IN_CHAOS,
]
TRIALS = 2


def study(out: Path, *more: str, trials: int = TRIALS, epochs: int = 2) -> list[str]:
    return [
        "python", "launchers/tune_cifar.py", "--dataset", "digits", "--pair", "resnet20-resnet8",
        "--train-subset", "160", "--epochs", str(epochs), "--trials", str(trials),
        "--seeds", "1", "--top-k", "1", "--set", "baselines=[none]", "--set", "teacher=resnet8",
        "--set", "teacher_training={epochs: 1}", "--set", "scheduler=none",
        "--out", str(out), *more,
    ]  # fmt: skip


@dataclass
class Done:
    cluster: Cluster
    out: Path
    said: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A study that was submitted from here and has ended there."""
    out = tmp_path_factory.mktemp("shared") / "run"
    # The nodes have another ekd_ray, which does not work: the job's own must be the one used.
    decoy = tmp_path_factory.mktemp("decoy")
    (decoy / "ekd_ray").mkdir()
    (decoy / "ekd_ray" / "__init__.py").write_text("raise ImportError('not the code submitted')\n")
    with cluster() as made:
        made.add(cpus=0, PYTHONPATH=str(decoy))
        for _ in range(2):
            made.add(cpus=1, PYTHONPATH=str(decoy))
        # Long enough that the first trial is still at work when the second one's process is there.
        job = made.submit(*study(out, epochs=20))
        said, _ = job.communicate(timeout=400)
        assert job.returncode == 0, said
        yield Done(made, out, said)


def test_the_bundle_of_a_submitted_study_is_there(done: Done) -> None:
    found = Bundle.load(done.out / "best").verify()
    assert found.ok, found.problems
    records = Study.load(done.out).records()
    assert [record.status for record in records] == ["complete"] * TRIALS


def nodes_of_trials(cluster: Cluster, out: Path) -> set[str]:
    """Ids of the nodes on which trials have been at work."""
    nodes, node_of_pid = set(), cluster.node_of_pid()
    for events in out.glob("trials/*/events.out.tfevents.*"):
        pid = re.fullmatch(r"events\.out\.tfevents\.\d+\..+\.(\d+)\.\d+", events.name)
        assert pid, events.name
        nodes.add(node_of_pid[int(pid[1])])
    return nodes


def test_trials_spread_over_the_nodes(done: Done) -> None:
    assert len(nodes_of_trials(done.cluster, done.out)) == 2


def test_the_teacher_is_asked_once_on_every_node(done: Done) -> None:
    """Each node's own table is filled before the trials, with the same rows."""
    filled = []
    for node in done.cluster.nodes[1:]:
        (words,) = node.cache.glob("teachers/*/words.bin")
        filled.append(np.fromfile(words, dtype=np.uint32))
    assert np.array_equal(*filled)
    assert (filled[0] > 0).sum() > 160
    head = done.cluster.nodes[0].cache
    assert not list(head.glob("teachers/*")), "no trial runs on the head"


def test_nobody_without_the_token_is_let_in(done: Done) -> None:
    for token in ("wrong", ""):
        with pytest.raises(urllib.error.HTTPError) as refused:
            done.cluster.get("/api/jobs/", token=token or " ")
        assert refused.value.code in (401, 403)
