"""What a shell offers for a launcher's flags, through argcomplete; see README."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ekd_ray.cli.request import SEARCH_SPACES
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.studies.recipes import known_pairs

# Written out: looking them up would load torch at every press of the key.
DATASETS = ("cifar10", "cifar100", "digits", "folder:", "imagenet", "synthetic", "tiny_imagenet")
METHODS = ("none", "evidential", "kd", "dkd", "mlkd", "ctkd", "ekd", "any")
VARIANTS = (
    *("kd-standardized", "dkd-standardized", "mlkd-standardized", "ctkd-standardized"),
    *("dkd+ekd", "mlkd+ekd", "ctkd+ekd"),
)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and leave; else return.

    Raises:
        ImportError: argcomplete is not installed.
    """
    import argcomplete

    offers: dict[str, Callable[..., list[str]]] = {
        "dataset": lambda **_: list(DATASETS),
        "ood_dataset": lambda **_: list(DATASETS),
        "method": lambda **_: [*METHODS, *VARIANTS],
        "pair": lambda parsed_args, **_: _pairs(parsed_args),
        "teacher": lambda parsed_args, **_: _sides(parsed_args, 0),
        "student": lambda parsed_args, **_: _sides(parsed_args, 1),
        "set": lambda **_: [f"{n}=" for n in (*DistillConfig.names(), *StudyConfig.names())],
    }
    for action in _actions(parser):
        if action.dest in offers:
            action.completer = offers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _actions(command)
    return found


def _pairs(args: argparse.Namespace) -> list[str]:
    home = getattr(args, "home", None) or getattr(args, "dataset", None)
    return known_pairs(SEARCH_SPACES, str(home or DistillConfig().dataset))


def _sides(args: argparse.Namespace, side: int) -> list[str]:
    names = [pair.split("-") for pair in _pairs(args)]
    return sorted({name[side] for name in names if len(name) == 2})
