"""A study's report: one HTML file that needs no network.

Made at the end of a study, and at any time by `launchers/report.py RUN`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ekd_ray import __version__
from ekd_ray.files import write_text
from ekd_ray.results.report.content import gather
from ekd_ray.results.report.headline import headline, tiles
from ekd_ray.results.report.page import render
from ekd_ray.results.report.sections import sections
from ekd_ray.results.study import Study

REPORT = Path("report") / "index.html"


def write_report(study: Study, out: Path | None = None) -> Path:
    """Write a study's report, running or finished, atomically.

    No data set is read: what it shows of test images was stored by the final evaluation.

    Args:
        out: the file (`<study>/report/index.html`).

    Returns:
        The file.
    """
    content = gather(study)
    sentence, lead = headline(content)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = render(
        title=f"{study.path.absolute().name} · ekd_ray study",
        headline=sentence,
        lead=lead,
        tiles=tiles(content),
        sections=sections(content),
        footer=f"ekd_ray {__version__}, {made}. This file needs no network.",
    )
    path = out or study.path / REPORT
    write_text(path, page)
    return path
