"""Completion of commands, flags and names in a shell, through argcomplete."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import argcomplete
from argcomplete.completers import FilesCompleter

from ekd_ray.cli.help_text import all_actions
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.distill_config import DATASETS
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe, known_pairs, list_recipes


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and leave; else return."""
    offers: dict[str, Callable[..., list[str]]] = {
        "dataset": lambda **_: dataset_names(),
        "ood_dataset": lambda **_: dataset_names(),
        "method": lambda **_: method_names(),
        "pair": lambda parsed_args, **_: _pairs(parsed_args),
        "recipe": _recipes,
        "teacher": lambda parsed_args, **_: _sides(parsed_args, 0),
        "student": lambda parsed_args, **_: _sides(parsed_args, 1),
        "set": lambda **_: [f"{n}=" for n in (*DistillConfig.names(), *StudyConfig.names())],
    }
    for action in all_actions(parser):
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


def _recipes(prefix: str, **_: object) -> list[str]:
    """The recipes by name, and files."""
    return [*list_recipes(), *FilesCompleter(("yaml", "yml"))(prefix)]


def _pairs(args: argparse.Namespace) -> list[str]:
    """The pairs of a home or data set by name; all of them by home and name where none is given."""
    home = getattr(args, "home", None) or getattr(args, "dataset", None)
    if home:
        return known_pairs(SEARCH_SPACES, str(home))
    pairs = [name for name in list_recipes() if "/" in name and "/_" not in name]
    return [*known_pairs(SEARCH_SPACES, DistillConfig().dataset), *pairs]


def _sides(args: argparse.Namespace, side: int) -> list[str]:
    names = [pair.rpartition("/")[2].split("-") for pair in _pairs(args)]
    return sorted({name[side] for name in names if len(name) == 2})
