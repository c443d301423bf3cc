"""A study's report: one HTML file that needs no network.

Made at the end of a study, and at any time by `ekd-ray report RUN`.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ekd_ray import __version__
from ekd_ray.config.phrases import command_text, hide_folders, several, short_name
from ekd_ray.files import check_own_folder, write_text
from ekd_ray.results.importance import write_importance
from ekd_ray.results.records import BEST, JOURNAL_LOCKS, PLACE, REPORT, milestone_epochs
from ekd_ray.results.report.content import (
    describe_model,
    gather_all,
    list_calibrations,
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
    duration,
    metric_name,
    resume_command,
    spread,
    value_text,
)

FILTERS = (describe_teacher, duration, hide_folders, metric_name, row_label,
           several, short_name, spread, value_text)  # fmt: skip


def write_report(study: StudyReader, out: Path | None = None, *, pictures: bool = True) -> Path:
    """Write a study's report, running or finished, atomically.

    No data set is read: what it shows of test images was stored by the final evaluation.

    Args:
        out: the file (`<study>/report/index.html`).
        pictures: show the test images that the final evaluation has kept.

    Returns:
        The file.

    Raises:
        UserError: it would be written through a link in the study's folder.
    """
    # Slow to import, and `show` needs neither.
    from ekd_ray.results.report.figures import draw_figures
    from ekd_ray.results.report.shown_images import list_images
    from ekd_ray.results.templating import keep_flags, render

    content = gather_all(study)
    charts = draw_figures(content)
    sentence, lead = write_headline(content)
    page = render(
        "report.html.jinja",
        autoescape=True,
        filters={function.__name__: function for function in (*FILTERS, keep_flags)},
        content=content,
        title=f"{study.path.absolute().name} · ekd_ray study",
        headline=sentence,
        lead=lead,
        model=describe_model(content),
        tiles=list_tiles(content),
        sections={section.name: section for section in list_sections(content, charts)},
        charts=charts,
        rungs=milestone_epochs(content.config)[:-1],
        failures=list_failed_runs(content),
        damage=describe_damage(content.damaged),
        commands=list_commands(study),
        footer=f"ekd_ray {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        images=list_images(content) if pictures else {},
        calibrations=list_calibrations(content),
        plotly=packed_plotly(),
        payload=script_json({c.name: c.payload() for found in charts.values() for c in found}),
    )
    if out is None:
        check_own_folder(study.path, but=(JOURNAL_LOCKS,))
        write_importance(content.findings, study.records(), study.config, study.path)
    path = out or study.path / REPORT
    write_text(path, page)
    return path


@functools.cache
def packed_plotly() -> str:
    """Plotly's JavaScript, gzip in base64: two fifths of its size, and browsers unpack it."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: it cannot end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def list_commands(study: StudyReader) -> list[tuple[str, str]]:
    """The next steps with the study, in words, and the command as it can be pasted.

    In the study's folder, because a page that may be shown to others names none above it; of a
    study at a URI anywhere.
    """
    uri = study.header.get(PLACE)
    run, name = uri or ".", study.path.absolute().name
    beside = "" if uri else "../"
    best = f"{beside}{name}-best"
    found = [
        ("show the figures of this page in the terminal", command_text("show", run)),
        ("continue the study", resume_command(study.config, run)),
        (
            "add trials, once it has ended",
            resume_command(study.config, run, "--extend", study.config.half_more),
        ),
    ]
    board = study.leaderboard()
    if board and board[0].winner:
        found += [
            ("write the winner's weights, configuration and evidence, also as a program",
             command_text("export", run, "--out", best, "--format", "pt2")),
            ("train the winner again, and compare",
             command_text("reproduce", best if uri else BEST, "--out", f"{beside}{name}-again")),
        ]  # fmt: skip
    return found
