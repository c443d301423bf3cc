"""Several teachers at once, and pictures that are spoiled on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cases import Answer, Case, Hands

from ekd_ray.models import build_model, save_weights

TOGETHER = "teachers together"


def write_teacher(path: Path, seed: int = 0, classes: int = 10) -> Path:
    torch.manual_seed(seed)
    save_weights(
        build_model("resnet8", classes), path, model_name="resnet8", num_classes=classes,
        mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    return path


def copy_of_first(folder: Path) -> Path:
    path = folder / "renamed.pth"
    path.write_bytes((folder / "first.safetensors").read_bytes())
    return path


def joined(make: Callable[[Path], Path]) -> Callable[[Hands], Answer]:
    """`join-teachers` is handed a good teacher and another; nothing is left of what is refused."""

    def hand_in(hands: Hands) -> Answer:
        first = write_teacher(hands.folder / "first.safetensors")
        out = hands.folder / "joined.safetensors"
        answer = hands.launch("join-teachers", first, make(hands.folder), "--out", out)
        assert out.exists() == (answer.code == 0)
        return answer

    return hand_in


def given_by_the_name_of_a_member(hands: Hands) -> Answer:
    """The file of an ensemble, and `--teacher` of the pair that was used before."""
    joined(lambda folder: write_teacher(folder / "second.safetensors", 1))(hands)
    return hands.launch(
        "distill", "--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8",
        "--teacher-weights", hands.folder / "joined.safetensors", "--epochs", "1", "--dry-run",
    )  # fmt: skip


def under_a_recipes_normalization(hands: Hands) -> Answer:
    """The recipe of a pair normalises for its own teacher."""
    joined(lambda folder: write_teacher(folder / "second.safetensors", 1))(hands)
    return hands.launch(
        "distill", "--dataset", "digits", "--teacher", "ensemble:resnet8,resnet8", "--student",
        "resnet8", "--teacher-weights", hands.folder / "joined.safetensors",
        "--teacher-normalization", "imagenet", "--epochs", "1", "--dry-run",
    )  # fmt: skip


def pickled(folder: Path) -> Path:
    path = folder / "labels.npy"
    np.save(path, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    return path


CASES = [
    Case(TOGETHER, "two", joined(lambda f: write_teacher(f / "b.safetensors", 1)), 0,
         ("ensemble:resnet8,resnet8",)),
    Case(TOGETHER, "the same under two names", joined(copy_of_first), 2,
         ("renamed.pth", "the same teacher")),
    Case(TOGETHER, "other numbers of classes",
         joined(lambda f: write_teacher(f / "b.safetensors", 1, classes=7)), 2, ("10", "7")),
    Case(TOGETHER, "no weights", joined(pickled), 2, ("labels.npy",)),
    Case(TOGETHER, "by the name of one", given_by_the_name_of_a_member, 2,
         ("give --teacher ensemble:resnet8,resnet8",)),
    Case(TOGETHER, "under another normalisation", under_a_recipes_normalization, 2,
         ("teacher_normalization", "0,0,0/1,1,1")),
]  # fmt: skip
