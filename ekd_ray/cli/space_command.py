"""Look at a search space before it costs anything; print the JSON Schema of recipes."""

from __future__ import annotations

import argparse
import json

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json
from ekd_ray.config import DistillConfig, StudyConfig, json_schema
from ekd_ray.errors import UserError
from ekd_ray.studies.recipes import Recipe

CLASSES = {cls.__name__: cls for cls in (StudyConfig, DistillConfig)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="ranges, sampled points and shared settings of a file")
    show.add_argument("recipe", metavar="FILE", help="recipe in YAML, see search_spaces/")
    flags.add_common(show, "--method")
    show.add_argument("--points", type=int, default=5, metavar="N", help="points to sample (5)")
    show.add_argument("--seed", type=int, default=0, help="seed of the points (0)")
    flags.add_common(show, "--json")
    flags.add_plugins(show)
    schema = commands.add_parser("schema", help="JSON Schema of recipes, for an editor")
    schema.add_argument(
        "kind", nargs="?", choices=CLASSES, default=StudyConfig.__name__,
        help="of a study (the default) or of one run",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do what `args.command` says; returns the exit code."""
    if args.command == "schema":
        print(json.dumps(json_schema(CLASSES[args.kind]), indent=2))
        return 0
    return _show(args)


def _show(args: argparse.Namespace) -> int:
    """A search space in words, points drawn from it at random, and what all trials share.

    Nothing is looked up but names and bounds: data and teacher need not be there.
    """
    recipe = Recipe.load(args.recipe, args.method)
    config = recipe.config
    # These load torch and optuna.
    from rich import box
    from rich.console import Console
    from rich.table import Table

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
    # Names and figures whole: a line that the terminal breaks is better than one cut short.
    width = max(Console().width, 10 + sum(max(9, len(name)) + 3 for name in space.parameters))
    console = Console(highlight=False, width=width)
    for name, parameter in space.parameters.items():
        console.print(f"{name:16s} {parameter.describe()}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("point", *space.parameters):
        table.add_column(column, justify="right", no_wrap=True)
    named = [("first", point) for point in first_points(config)]
    for name, point in [*named, *((str(i), point) for i, point in enumerate(points, start=1))]:
        cells = (point.get(column, "") for column in space.parameters)
        table.add_row(name, *(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)
    console.print("shared by all trials:")
    for name, value in base.to_dict().items():
        if value is not None and name not in space.parameters:
            console.print(f"  {name}: {value}", markup=False)
    return 0
