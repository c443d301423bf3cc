"""The figures of the report, by section."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ekd_ray.results.report.chart import Chart
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.search_figures import (
    draw_contour,
    draw_importance,
    draw_learning_curves,
    draw_parallel,
    draw_slices,
    draw_time,
    draw_trade_off,
)
from ekd_ray.results.report.winner_figures import (
    draw_class_accuracy,
    draw_confusion,
    draw_correlation_maps,
    draw_differences,
    draw_embeddings,
    draw_inherited,
    draw_leaderboard,
    draw_reliability,
    draw_risk_coverage,
    draw_shift,
)


def draw_figures(content: Content) -> dict[str, list[Chart]]:
    """The figures by the section that they stand in; sections without any are left out."""
    drawers: dict[str, list[Callable[[Content], Iterator[Chart]]]] = {
        "certainty": [draw_differences],
        "leaderboard": [draw_leaderboard],
        "curves-section": [draw_learning_curves],
        "parameters": [draw_importance, draw_parallel, draw_contour, draw_slices],
        "trade-off": [draw_trade_off],
        "errors": [draw_confusion, draw_class_accuracy],
        "calibration": [draw_reliability, draw_risk_coverage, draw_shift],
        "teacher": [draw_inherited, draw_correlation_maps, draw_embeddings],
        "time-section": [draw_time],
    }
    drawn = {
        section: [chart for draw in functions for chart in draw(content)]
        for section, functions in drawers.items()
    }
    return {section: charts for section, charts in drawn.items() if charts}
