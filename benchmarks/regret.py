"""A simulated race as a chart: `python -m benchmarks.regret RESULT.json OUT.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from ekd_ray.files import atomic_path

FIRST = 36  # the epoch at which the axis begins: four trials of full length


def chart(result: dict[str, Any], out: Path) -> None:
    """Mean regret (points of validation top-1) by epochs spent, with its 95 % interval."""
    # Text stays text, and one result always gives one file.
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ekd_ray", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    for name, found in result["regret"].items():
        # Before its first trial has ended a search holds little; the axis begins after that.
        epochs = range(FIRST, len(found["mean"]) + 1)
        mean, low, high = (found[key][FIRST - 1 :] for key in ("mean", "low", "high"))
        (line,) = axes.plot(epochs, mean, label=name, linewidth=2 if "default" in name else 1.2)
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("epochs trained, all trials together")
    axes.set_ylabel("regret, points of val_top1")
    axes.set_title(f"mean of {result['seeds']} simulated searches, 95 % interval", loc="left")
    axes.legend(frameon=False)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    chart(json.loads(source.read_text(encoding="utf-8")), target)
