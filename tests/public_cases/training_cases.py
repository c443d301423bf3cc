"""Settings of the training that cannot be, or do not go with the method."""

from __future__ import annotations

from collections.abc import Callable

from cases import Answer, Case, Hands

KIND = "training settings"
RUN = ("--dataset", "digits", "--student", "resnet8", "--train-subset", "560", "--out", "run")


def run_with(*settings: str, method: str = "none") -> Callable[[Hands], Answer]:
    """A training with settings, which leaves nothing behind."""

    def hand_in(hands: Hands) -> Answer:
        flags = [flag for value in settings for flag in ("--set", value)]
        answer = hands.launch("distill", *RUN, "--method", method, *flags)
        assert not (hands.folder / "run").exists()
        return answer

    return hand_in


def refused(name: str, *settings: str, words: tuple[str, ...], method: str = "none") -> Case:
    return Case(KIND, name, run_with(*settings, method=method), code=2, words=words)


CASES = [
    refused("mixup above 1", "mixup_alpha=1.5", words=("mixup_alpha must be <= 1, got 1.5",)),
    refused("smoothing below 0", "label_smoothing=-0.1", words=("label_smoothing must be >= 0",)),
    refused("averages that never move", "ema_decay=1", words=("ema_decay must be <=", "got 1")),
    refused("a norm of 0", "max_grad_norm=0", words=("max_grad_norm must be > 0, got 0",)),
    refused(
        "an unknown policy", "auto_augment=autoaugment",
        words=("auto_augment must be one of", "randaugment", "got 'autoaugment'"),
    ),
    refused(
        "mixes under two views", "cutmix_alpha=1", method="mlkd",
        words=("cutmix_alpha must be off under method 'mlkd'", "got 1", "choose another method"),
    ),
]  # fmt: skip
