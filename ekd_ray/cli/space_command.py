"""Find a recipe, look at its search space before it costs anything, copy it to change it."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text
from ekd_ray.config import DistillConfig, StudyConfig, YamlFile, json_schema
from ekd_ray.config.phrases import joined
from ekd_ray.errors import UserError
from ekd_ray.studies.recipes import Recipe, list_recipes, locate_recipe

EXAMPLES = (
    "ekd-ray space list",
    "ekd-ray space methods",
    "ekd-ray space show cifar100/resnet56-resnet20 --method dkd",
    "ekd-ray space copy cifar100/resnet56-resnet20 mine.yaml",
)
FIRST = ()
CLASSES = {cls.__name__: cls for cls in (StudyConfig, DistillConfig)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listed = commands.add_parser("list", help="the recipes that come with ekd_ray, by name")
    methods = commands.add_parser("methods", help="the methods of distillation, by name")
    for command in (listed, methods):
        flags.add_common(command, "--json")
    flags.add_plugins(methods)
    show = commands.add_parser("show", help="ranges, sampled points and shared settings of one")
    copy = commands.add_parser("copy", help="write one to a file of your own")
    for command in (show, copy):
        command.add_argument("recipe", metavar="RECIPE", help="name (ekd-ray space list), or file")
    copy.add_argument("file", nargs="?", metavar="FILE", help="where to (default: NAME.yaml, here)")
    flags.add_common(show, "--method")
    show.add_argument(
        "--points",
        type=flags.whole_number,
        default=5,
        metavar="N",
        help="points to sample (default: 5)",
    )
    show.add_argument(
        "--seed", type=flags.whole_number, default=0, help="seed of the points (default: 0)"
    )
    flags.add_common(show, "--json")
    flags.add_plugins(show)
    schema = commands.add_parser("schema", help="JSON Schema of recipes, for an editor")
    schema.add_argument(
        "kind", nargs="?", choices=CLASSES, default=StudyConfig.__name__,
        help="of a study or of one run (default: StudyConfig)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do what `args.command` says; returns the exit code."""
    commands = {
        "list": _list, "methods": _methods, "show": _show, "copy": _copy, "schema": _schema
    }  # fmt: skip
    return commands[args.command](args)


def _schema(args: argparse.Namespace) -> int:
    print_text(json.dumps(json_schema(CLASSES[args.kind]), indent=2))
    return 0


def _list(args: argparse.Namespace) -> int:
    """Names, with data set and epochs; with `--json` also teacher and student."""
    rows, fitted = {}, set()
    for name in list_recipes():
        recipe = Recipe.load(name)
        run = recipe.written.get("distill") or {}
        if any("epochs" in rules for rules in recipe.fits.values()):
            fitted.add(name)
        rows[name] = {key: run.get(key) for key in ("dataset", "teacher", "student", "epochs")}
    if args.json:
        print_json(rows)
        return 0
    said = {}
    for name, row in rows.items():
        data = row["dataset"] or "your pictures"
        epochs = "epochs by their number" if name in fitted else f"{row['epochs']} epochs"
        said[name] = f"{data}, {epochs}" if row["student"] else "a base of others"
    _print_names(said)
    return 0


def _methods(args: argparse.Namespace) -> int:
    """Names, with a line on each; with `--json` also the settings that each reads."""
    from ekd_ray.losses import METHODS  # not where a recipe is copied

    if args.json:
        print_json(
            {name: {"doc": m.doc, "settings": m.setting_names} for name, m in METHODS.items()}
        )
        return 0
    _print_names({name: method.doc for name, method in METHODS.items()})
    standardized = [name for name, m in METHODS.items() if "standardize" in m.setting_names]
    print_text(
        "\nAny of them: --method NAME. All of them in one search: --method any. With standardised "
        f"logits (Sun, CVPR 2024): {', '.join(f'{name}-standardized' for name in standardized)}."
    )
    return 0


def _print_names(said: Mapping[str, str]) -> None:
    """A line for each name, with what is said of it."""
    width = max(map(len, said))
    for name, text in said.items():
        print_text(f"{name:{width}s}  {text}".rstrip())


def _copy(args: argparse.Namespace) -> int:
    """Copy a recipe; what it extends, it goes on to extend by name."""
    source = locate_recipe(args.recipe)
    YamlFile.read(source)  # refuses what is not there
    target = Path(args.file or source.name)
    if target.exists():
        raise UserError(f"{target} is there already: name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print_text(f"recipe: {target} (ekd-ray tune --space {target})")
    return 0


def _show(args: argparse.Namespace) -> int:
    """A search space in words, points drawn from it at random, and what all trials share.

    Nothing is looked up but names and bounds: data and teacher need not be there.
    """
    recipe = Recipe.load(args.recipe, args.method)
    config = recipe.config
    # These load torch and optuna.
    from ekd_ray.cli.console import Console, print_points
    from ekd_ray.losses.methods import resolve_method
    from ekd_ray.scale.space import check_space, first_points

    if args.points < 1:
        raise UserError(f"--points must be >= 1, got {args.points}.")
    with recipe.locate_errors():
        space = check_space(config)
    base = resolve_method(config.distill)
    points = space.sample(args.points, seed=args.seed)
    if args.json:
        print_json({"points": points, "distill": base.to_dict(), "space": config.space})
        return 0
    named = [("first", point) for point in first_points(config)]
    named += [(str(index), point) for index, point in enumerate(points, start=1)]
    rows = [(name, *(point.get(p, "") for p in space.parameters)) for name, point in named]
    console = Console()
    for name, parameter in space.parameters.items():
        console.print(f"{name:16s} {parameter.describe()}")
    print_points(console, ("point", *space.parameters), rows)
    console.print("shared by all trials:")
    if recipe.fit:
        console.print(f"  (fitted to the pictures, as --dry-run shows: {joined([*recipe.fit])})")
    written = recipe.written.get("distill") or {}
    whose = {} if written.get("dataset") else {"dataset": "your pictures"}
    for name, value in {**base.to_dict(), **whose}.items():
        if value is not None and name not in space.parameters:
            console.print(f"  {name}: {value}")
    return 0
