"""Whether ten configurations that are good for some pairs are good for another: leave one out.

    python -m benchmarks.pair_portfolio [--json FILE] [--write search_spaces/cifar10-portfolio.yaml]

For each recorded pair a portfolio is made of the others (`benchmarks.tables`, without a leak), and
the best of its first configurations compared with the best of as many random ones. `--write`
makes one of all pairs, as a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.curves import EPOCHS, EVIDENCE, IMAGES, VALIDATION, recorded_study
from benchmarks.tables import TABLES, Source, open_target, show_source
from ekd_ray.config.yaml_files import dump_yaml
from ekd_ray.files import write_json, write_text
from ekd_ray.results.study_model import encode_points, mean_basis
from ekd_ray.scale.model_sampler import distinct_maxima
from ekd_ray.scale.space import Space
from ekd_ray.studies.portfolio import OBSERVED, SIZE, choose_greedily

COUNTS = (1, 3, 5, 10)  # of configurations that are tried
POINTS = 100  # of val_top1
DIGITS = 4  # of a written value
DRAWS = 4000


def choose(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The portfolio of recorded pairs, as `ekd-ray portfolio` makes it of studies."""
    space = recorded_study().space or {}
    bases = [mean_basis([source.outcomes()], space) for source in sources]
    candidates: list[dict[str, Any]] = []
    for source, basis in zip(sources, bases, strict=True):
        candidates += [dict(row.point) for row in source.ranked()[:OBSERVED]]
        candidates += [dict(point) for point in distinct_maxima(basis, Space(space), SIZE)]
    places = encode_points(candidates, space)
    expected = np.array([basis(places) for basis in bases]).T
    return [candidates[index] for index in choose_greedily(expected, places, SIZE)]


def leave_out(table: str) -> dict[str, Any]:
    """Regrets, in points, on a table of the best of so many configurations: of the portfolio of
    the others, and of random draws in the mean."""
    target, space = open_target(table), Space(recorded_study().space)

    def regrets(points: Sequence[Any]) -> np.ndarray:
        worth = [target.landscape.curve(point)[1] for point in points]
        return POINTS * (target.landscape.best - np.array(worth))

    own = regrets(choose(target.sources))
    drawn = regrets(space.sample(2000, seed=1))
    rng = np.random.default_rng(0)
    random = {k: drawn[rng.integers(0, len(drawn), (DRAWS, k))].min(axis=1) for k in COUNTS}
    return {
        "portfolio": {str(k): float(own[:k].min()) for k in COUNTS},
        "random": {str(k): float(values.mean()) for k, values in random.items()},
    }


def recipe() -> str:
    """The portfolio of all pairs, as a recipe."""
    study = recorded_study()
    space = Space(study.space)
    pairs = {name: table for name, table in TABLES.items() if table.is_source}
    sources = [show_source(n, table.read(), space, frozenset()) for n, table in pairs.items()]
    points = [
        {name: float(f"{value:.{DIGITS}g}") for name, value in point.items()}
        for point in choose(sources)
    ]
    for point in points:  # the recorded runs had one temperature in both orders
        point["ekd_temperature"] = point["temperature"]
    trained = round(IMAGES * (1 - VALIDATION))
    lines = [
        "# Written by python -m benchmarks.pair_portfolio --write. Ten configurations that",
        f"# together are good for the recorded pairs, {EPOCHS} epochs, {trained:,} pictures:",
        *(f"#   {name}: {len(source.rows)} configurations" for name, source in zip(
            pairs, sources, strict=True)),
        "# For short trainings of a pair that nobody has tried; longer ones were not measured.",
    ]  # fmt: skip
    values = {
        "extends": "default",
        "description": "EKD's first form, ten configurations that were good for other pairs",
        "distill": {"dataset": "cifar10", "evidence": EVIDENCE},
        "space": {
            "evidence": None,
            **(study.space or {}),
            "ekd_temperature": {**(study.space or {})["temperature"]},
        },
        "first_points": points,
    }
    return "\n".join(lines) + "\n" + dump_yaml(values)


def main() -> None:
    """Leave each table out once; print the figures, and write what is asked for."""
    parser = argparse.ArgumentParser(description="Leave-one-out check of portfolios.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="YAML", help="the portfolio of all pairs")
    args = parser.parse_args()
    found = {table: leave_out(table) for table in TABLES}
    for table, figures in found.items():
        for name, regrets in figures.items():
            shown = "  ".join(f"best of {k}: {value:.2f}" for k, value in regrets.items())
            print(f"{table:24s} {name:10s} {shown}")
    if args.json:
        write_json(args.json, found)
    if args.write:
        write_text(args.write, recipe())


if __name__ == "__main__":
    main()
