"""An argument of another kind than its annotation is one sentence, of every kind of annotation."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.arguments import checks_arguments
from ekd_ray.errors import UserError
from ekd_ray.results import Bundle


@checks_arguments
def asked(
    pair: str | None = None,
    *,
    epochs: int | None = None,
    share: float = 0.5,
    resume: bool = False,
    out: str | os.PathLike[str] | None = None,
    folder: str | Path = "",
    seeds: Sequence[int] = (),
    parts: Sequence[object] = (),
    space: Mapping[str, Any] | None = None,
    config: DistillConfig | str | None = None,
    build: Callable[[int], object] = print,
    **settings: Any,
) -> dict[str, Any]:
    """Returns what it was given."""
    return {name: value for name, value in locals().items() if name != "settings"} | settings


LEGAL = [
    {"pair": "a", "epochs": 3, "share": 1, "resume": True},
    {"pair": None, "out": Path("x"), "folder": Path("x")},
    {"out": "x", "folder": "x", "config": DistillConfig(), "build": DistillConfig},
    {"seeds": range(3), "parts": [3, "x"], "space": {"lr": None}},
    {"config": "x", "seeds": (1, 2), "anything": object},
]


@pytest.mark.parametrize("given", LEGAL)
def test_what_is_legal_is_passed_on(given):
    assert asked(**given).items() >= given.items()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"pair": 3}, "a text"), ({"epochs": "3"}, "a whole number"), ({"epochs": 1.5}, "a whole"),
        ({"epochs": True}, "a whole number"), ({"share": "1"}, "a number"),
        ({"share": False}, "a number"), ({"resume": 1}, "true or false"),
        ({"resume": None}, "true or false"), ({"out": 3}, "a path"), ({"folder": None}, "a path"),
        ({"seeds": 3}, "a list, each a whole number"), ({"seeds": "12"}, "a list"),
        ({"seeds": [1, "2"]}, "a list, each a whole number"), ({"seeds": None}, "a list"),
        ({"parts": print}, "a list"), ({"space": [1]}, "a mapping"), ({"space": "x"}, "a mapping"),
        ({"config": {"lr": 1}}, "a DistillConfig or a text"), ({"build": 3}, "a function"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_refused(given, kind):
    name = next(iter(given))
    with pytest.raises(UserError, match=f"^{name} must be {kind}.*, got .+[.]$"):
        asked(**given)


def test_what_is_given_without_a_name_is_checked_too():
    with pytest.raises(UserError, match="pair must be a text, got 5"):
        asked(5)


def test_a_long_value_does_not_make_a_long_sentence():
    for value in ([*range(10**4)], "x\n" * 10**4, np.zeros((30, 30))):
        with pytest.raises(UserError) as found:
            asked(epochs=value)
        assert len(str(found.value)) < 200 and "\n" not in str(found.value)


def test_scalars_of_numpy_are_numbers():
    found = asked(epochs=np.int64(3), share=np.float32(0.25), resume=np.True_, lr=np.float64(0.5))
    kinds = {"epochs": int, "share": float, "resume": bool, "lr": float}
    assert {name: type(found[name]) for name in kinds} == kinds
    with pytest.raises(UserError, match=r"epochs must be a whole number, got 3\.0"):
        asked(epochs=np.float32(3))


def test_a_checked_function_is_what_it_was():
    assert pickle.loads(pickle.dumps(asked)) is asked
    with pytest.raises(TypeError, match="positional argument"):  # as Python says it
        asked("a", "b")


def test_a_name_that_there_is_not_is_one_sentence_with_the_nearest() -> None:
    @checks_arguments
    def told(path: str, *, force: bool = False) -> None: ...

    with pytest.raises(UserError, match=r"unknown argument of told: 'froce'.+'force'"):
        told("x", froce=True)
    with pytest.raises(UserError, match=r"unknown setting of DistillConfig: 'epoch'.*'epochs'"):
        DistillConfig(epoch=3)
    with pytest.raises(UserError, match=r"unknown setting of StudyConfig: 'trails'.*'trials'"):
        StudyConfig(trails=3)
    with pytest.raises(UserError, match="unknown argument of load: 'trust_plugin'"):
        Bundle.load("x", trust_plugin=True)
    with pytest.raises(UserError, match="there is no folder nowhere"):
        Bundle.load("nowhere")
    with pytest.raises(TypeError, match="missing"):
        told()
    config = pickle.loads(pickle.dumps(StudyConfig(trials=3)))
    assert config == StudyConfig(trials=3), "which makes it without settings first"
