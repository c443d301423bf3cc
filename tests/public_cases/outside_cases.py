"""An out-of-distribution set that is none, and what is asked of something that is no bundle."""

from __future__ import annotations

from collections.abc import Callable

from cases import Answer, Case, Hands
from machine_cases import PLAN
from PIL import Image

KIND = "sets from outside"


def plan_with(*flags: str, classes: tuple[str, ...] = ()) -> Callable[[Hands], Answer]:
    """The plan of a study of digits, beside a folder `set` of these classes."""

    def hand_in(hands: Hands) -> Answer:
        for split in ("train", "test"):
            for label in classes:
                place = hands.folder / "set" / split / label
                place.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(place / "a.png")
        return hands.launch("tune", *PLAN, *flags)

    return hand_in


def no_bundle(command: str, *more: str) -> Callable[[Hands], Answer]:
    def hand_in(hands: Hands) -> Answer:
        (hands.folder / "best").mkdir()
        Image.new("RGB", (8, 8)).save(hands.folder / "a.png")
        return hands.launch(command, "best", *more)

    return hand_in


CASES = [
    Case(KIND, "the data set itself", plan_with("--ood-dataset", "digits"), 2,
         ("another data set", "'digits' twice")),
    Case(KIND, "a folder of the same classes",
         plan_with("--ood-dataset", "folder:set", classes=tuple("0123456789")), 2,
         ("shares classes", "0, 1, 2 and 7 more")),
    Case(KIND, "a folder of other classes",
         plan_with("--ood-dataset", "folder:set", classes=("banded", "dotted")), 0, ("folder:",)),
    Case(KIND, "measured in what is no bundle", no_bundle("evaluate"), 2, ("holds no bundle",)),
    Case(KIND, "sets of classes by what is no bundle",
         no_bundle("predict", "a.png", "--set-coverage", "0.9"), 2, ("holds no bundle",)),
]  # fmt: skip
