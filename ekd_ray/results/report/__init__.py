"""A study's report: one HTML file that needs no network.

Made at the end of a study, and at any time by `ekd-ray report RUN`.
"""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ekd_ray import __version__
from ekd_ray.config.phrases import hide_folders, several, short_name
from ekd_ray.files import check_own_folder, write_text
from ekd_ray.results.importance import MOST_TRIALS, write_importance
from ekd_ray.results.records import JOURNAL_LOCKS, milestone_epochs
from ekd_ray.results.report.content import (
    gather,
    list_failed_runs,
    list_sections,
    list_tiles,
    row_label,
    write_headline,
)
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import (
    describe_damage,
    describe_teacher,
    describe_validation,
    duration,
    metric_name,
    spread,
    value_text,
)

REPORT = Path("report") / "index.html"
FILTERS = (describe_teacher, describe_validation, duration, hide_folders, metric_name, row_label,
           several, short_name, spread, value_text)  # fmt: skip


def write_report(study: StudyReader, out: Path | None = None) -> Path:
    """Write a study's report, running or finished, atomically.

    No data set is read: what it shows of test images was stored by the final evaluation.

    Args:
        out: the file (`<study>/report/index.html`).

    Returns:
        The file.

    Raises:
        UserError: it would be written through a link in the study's folder.
    """
    # Slow to import, and `show` needs neither.
    from plotly.offline import get_plotlyjs

    from ekd_ray.results.report.figures import draw_figures
    from ekd_ray.results.templating import render

    importance = study.importance()
    content = gather(study, importance)
    charts = draw_figures(content)
    sentence, lead = write_headline(content)
    page = render(
        "report.html.jinja",
        autoescape=True,
        filters={function.__name__: function for function in FILTERS},
        content=content,
        title=f"{study.path.absolute().name} · ekd_ray study",
        headline=sentence,
        lead=lead,
        tiles=list_tiles(content),
        sections={section.name: section for section in list_sections(content, charts)},
        charts=charts,
        rungs=milestone_epochs(content.config)[:-1],
        failures=list_failed_runs(content),
        damage=describe_damage(content.damaged),
        most_judged=MOST_TRIALS,
        run=_run_name(study.path),
        footer=f"ekd_ray {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        plotly=get_plotlyjs(),
        payload=script_json({c.name: c.payload() for found in charts.values() for c in found}),
    )
    if out is None:
        check_own_folder(study.path, but=(JOURNAL_LOCKS,))
        write_importance(importance, study.records(), study.config, study.path)
    path = out or study.path / REPORT
    write_text(path, page)
    return path


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: it cannot end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_name(path: Path) -> str:
    """The study's folder as it is typed where the report is made; a page that may be shown to
    others names no folder above that."""
    path = path.absolute()
    inside = path.is_relative_to(Path.cwd()) and path != Path.cwd()
    return shlex.quote(str(path.relative_to(Path.cwd())) if inside else path.name)
