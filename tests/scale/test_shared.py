"""A cluster whose nodes do not all see the study's folder is refused."""

from pathlib import Path

import pytest

from ekd_ray.errors import UserError
from ekd_ray.scale.shared import _exists, refuse_unseen

NODES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


def test_nodes_that_see_the_folder_are_let_through(tmp_path):
    asked = []

    def ask(node, path):
        asked.append(node)
        return _exists(path)

    refuse_unseen(tmp_path, NODES, ask)
    assert asked == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == [], "the probe is left"


def test_nodes_that_do_not_are_named_in_one_sentence(tmp_path):
    def ask(node, path):
        assert Path(path).exists()
        return node == "b"

    with pytest.raises(UserError, match=r"on 2 node\(s\) of the cluster \(10.0.0.1, 10.0.0.3\)"):
        refuse_unseen(tmp_path, NODES, ask)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_machine_is_not_there(tmp_path):
    assert not _exists(str(tmp_path / "other" / ".probe.tmp"))
