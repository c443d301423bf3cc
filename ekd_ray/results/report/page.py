"""One HTML file that needs no network: the page around the sections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from ekd_ray.results.report.parts import Chart, Section, esc, table


def render(
    *, title: str, headline: str, lead: str, tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section], footer: str,
) -> str:  # fmt: skip
    """The whole page. All arguments but `Section.body` and `.after` are plain text."""
    from plotly.offline import get_plotlyjs

    charts = [chart for s in sections for chart in (*s.charts, *s.small)]
    stats = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(v)}</dd></div>" for name, v in tiles)
    links = "".join(f'<a href="#{s.name}">{esc(s.title)}</a>' for s in sections)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # Nothing is loaded from anywhere, whatever a label may contain.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
            'font-src data:">',
            '<link rel="icon" href="data:,">',
            f"<title>{esc(title)}</title>",
            f"<style>{_asset('style.css')}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">Skip to the results</a>',
            f"<header><p class='kicker'>{esc(title)}</p><h1>{esc(headline)}</h1>"
            f"<p class='lead'>{esc(lead)}</p><dl class='tiles'>{stats}</dl></header>",
            f"<nav aria-label='Sections'>{links}</nav>",
            '<main id="main">',
            *(_section(section) for section in sections),
            "</main>",
            f"<footer><p>{esc(footer)}</p></footer>",
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="charts">{script_json(_payload(charts))}</script>',
            f"<script>{_asset('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: it cannot end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _payload(charts: Sequence[Chart]) -> dict[str, Any]:
    return {c.name: {"data": c.data, "layout": {**c.layout, "height": c.height}} for c in charts}


def _asset(name: str) -> str:
    return (resources.files("ekd_ray.results.report") / name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    small = "".join(_figure(chart) for chart in section.small)
    return (
        f'<section id="{section.name}"><h2>{esc(section.title)}</h2>'
        f'<p class="takeaway">{esc(section.takeaway)}</p>{section.body}'
        + "".join(_figure(chart) for chart in section.charts)
        + (f'<div class="grid">{small}</div>' if small else "")
        + f"{section.after}</section>"
    )


def _figure(chart: Chart) -> str:
    rows = ""
    if chart.rows:
        rows = (
            f"<details><summary>These figures as a table</summary>"
            f"{table(chart.columns, chart.rows)}</details>"
        )
    return (
        f'<figure><figcaption id="{chart.name}-title">{esc(chart.title)}</figcaption>'
        f'<div class="chart" id="{chart.name}" role="img" style="min-height:{chart.height}px" '
        f'aria-label="{esc(chart.title)}. {esc(chart.summary)}">'
        f"<noscript>{esc(chart.summary)}</noscript></div>{rows}</figure>"
    )
