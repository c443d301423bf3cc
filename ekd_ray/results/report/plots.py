"""The report's figures one by one, as plotly figures for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.errors import UserError, unknown_name
from ekd_ray.results.study_reader import StudyReader

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ekd_ray.results.report.chart import Chart


class StudyPlots:
    """The figures of a study, of what it holds by now; each is a `plotly.graph_objects.Figure`.

    Each raises `UserError` where the study has nothing to show in it yet.
    """

    def __init__(self, study: StudyReader) -> None:
        self._study = study

    def history(self) -> go.Figure:
        """The metric of every trial by number, and the best of full length so far."""
        return self._draw("history")

    def learning_curves(self) -> go.Figure:
        """The metric by epoch, one line a trial."""
        return self._draw("learning_curves")

    def importance(self) -> go.Figure:
        """The importance of each parameter, alone and together with others."""
        return self._draw("importance")

    def parallel(self) -> go.Figure:
        """A line through all parameters for each trial of full length."""
        return self._draw("parallel")

    def contour(self) -> go.Figure:
        """The metric that the model expects over the two most important numbers."""
        return self._draw("contour")

    def slices(self, parameter: str | None = None) -> go.Figure:
        """The metric over a parameter, by default the most important one, and what the model
        expects of it."""
        charts = {chart.title: chart for chart in self._charts("slices")}
        name = next(iter(charts)) if parameter is None else parameter
        if name not in charts:
            raise unknown_name("parameter", name, charts)
        return _figure(charts[name])

    def trade_off(self) -> go.Figure:
        """The Pareto front of the objectives; with one objective, the metric against its cost."""
        return self._draw("trade_off")

    def leaderboard(self) -> go.Figure:
        """Test accuracy of each final configuration: every seed, the mean and its interval."""
        return self._draw("leaderboard")

    def differences(self) -> go.Figure:
        """Test accuracy of the winner minus that of champions and baselines, with intervals."""
        return self._draw("differences")

    def reliability(self) -> go.Figure:
        """Accuracy over confidence on the test split."""
        return self._draw("reliability")

    def risk_coverage(self) -> go.Figure:
        """Error among the most certain test images, over their share."""
        return self._draw("risk_coverage")

    def time(self) -> go.Figure:
        """Hours by stage, and what was saved."""
        return self._draw("time")

    def _draw(self, name: str) -> go.Figure:
        return _figure(self._charts(name)[-1])

    def _charts(self, name: str) -> list[Chart]:
        # Slow to import, and a study is mostly loaded without it.
        from ekd_ray.results.report import search_figures, winner_figures
        from ekd_ray.results.report.content import describe_parameters, gather_all

        content = gather_all(self._study)
        drawers = vars(winner_figures) | vars(search_figures)
        charts = list(drawers[f"draw_{name}"](content))
        if not charts:
            why = "let the study go on."
            if name in ("importance", "parallel", "contour") and content.findings is None:
                why = describe_parameters(content)
            raise UserError(f"{self._study.path} has nothing for the figure {name} yet: {why}")
        return charts


def _figure(chart: Chart) -> go.Figure:
    return chart.figure.update_layout(title=chart.title, height=chart.height)
