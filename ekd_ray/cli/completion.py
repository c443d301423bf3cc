"""Completion of a command's flags in a shell, through argcomplete; see README."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import argcomplete

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.distill_config import DATASETS
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe, known_pairs


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and leave; else return."""
    offers: dict[str, Callable[..., list[str]]] = {
        "dataset": lambda **_: dataset_names(),
        "ood_dataset": lambda **_: dataset_names(),
        "method": lambda **_: method_names(),
        "pair": lambda parsed_args, **_: _pairs(parsed_args),
        "teacher": lambda parsed_args, **_: _sides(parsed_args, 0),
        "student": lambda parsed_args, **_: _sides(parsed_args, 1),
        "set": lambda **_: [f"{n}=" for n in (*DistillConfig.names(), *StudyConfig.names())],
    }
    for action in actions(parser):
        if action.dest in offers:
            action.completer = offers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def dataset_names() -> list[str]:
    """The data sets by name, and the prefixes of a folder."""
    return [*DATASETS, "folder:", "hf:"]


def method_names() -> list[str]:
    """The methods that the default recipe knows: it loads no torch, as their registry does."""
    written = Recipe.load(SEARCH_SPACES / "default.yaml").written
    return [written["distill"]["method"], *written["methods"]]


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All arguments of a parser, those of its commands included."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += actions(command)
    return found


def _pairs(args: argparse.Namespace) -> list[str]:
    home = getattr(args, "home", None) or getattr(args, "dataset", None)
    return known_pairs(SEARCH_SPACES, str(home or DistillConfig().dataset))


def _sides(args: argparse.Namespace, side: int) -> list[str]:
    names = [pair.split("-") for pair in _pairs(args)]
    return sorted({name[side] for name in names if len(name) == 2})
