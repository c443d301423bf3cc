"""What `launchers/space.py` does: a search space, before anything is run."""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from ekd_ray.cli.output import print_json
from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import resolve_method
from ekd_ray.scale.space import check_space, first_points


def show_space(config: StudyConfig, args: argparse.Namespace) -> int:
    """A search space in words, points drawn from it at random, and what all trials share.

    Nothing is looked up but names and bounds: data and teacher need not be there.
    """
    if args.points < 1:
        raise UserError(f"--points must be >= 1, got {args.points}.")
    with args.origins[""].lines():
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
