"""`Study`: a study on disk, with everything that can be made of it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekd_ray.config.arguments import checks_arguments, made_by_load
from ekd_ray.config.phrases import several, short_name
from ekd_ray.errors import EXIT_INTERRUPTED, UserError, spell_controls
from ekd_ray.files import read_bytes
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.bundle_export import export_bundle
from ekd_ray.results.html import facts_html, table_html
from ekd_ray.results.progress import Progress, progress
from ekd_ray.results.report.plots import StudyPlots
from ekd_ray.results.row_names import label
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import figure_text, list_figures, metric_name, spread, value_text

SHOWN = 5  # trials that a notebook shows while none is confirmed
# Of a study in a process of its own.
DRIVER_LOG = "driver.log"
DRIVER_ERROR = "error: "
GRACE_SECONDS = 60.0  # to stop of itself: trials end, Ray is shut down


@made_by_load
@dataclass(frozen=True, kw_only=True)
class Study(StudyReader):
    """A running or finished study in a folder: `Study.load(path)`.

    Its files are read when they are first asked for, and once: load the study again to see what
    has come since.

    Example:
        >>> study = Study.load("runs/quickstart")      # doctest: +SKIP
        >>> study.trials().to_pandas()                 # doctest: +SKIP
        >>> study.plot.importance()                    # doctest: +SKIP
        >>> study.best().config                        # doctest: +SKIP
    """

    process: subprocess.Popen[bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def plot(self) -> StudyPlots:
        """Its figures, of plotly: `study.plot.history()`."""
        return StudyPlots(self)

    def status(self) -> Progress:
        """How far it has come by now: stage, trials by status, seconds since its last epoch."""
        return progress(type(self).load(self.path))

    @checks_arguments
    def wait(self, timeout: float | None = None) -> Study:
        """Wait until a study that `tune(wait=False)` began has ended; returns it as it is then.

        Args:
            timeout: wait so many seconds at most.

        Raises:
            UserError: it has failed. TimeoutError: it is still at work.
        """
        if self.process is not None:
            try:
                code = self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{self.path} is still at work after {timeout:g} s.") from None
            if code not in (0, EXIT_INTERRUPTED):
                raise driver_failure(self.path, code)
        return Study.load(self.path)

    def stop(self) -> Study:
        """Stop a study that `tune(wait=False)` began; `tune(out=..., resume=True)` continues it.

        Raises:
            UserError: another process began it.
        """
        if self.process is None:
            raise UserError(
                f"{self.path} was not begun here by tune(wait=False): stop the process that runs "
                "it, by Ctrl-C or SIGTERM."
            )
        self.process.terminate()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return Study.load(self.path)

    @checks_arguments
    def export(
        self,
        out: str | Path,
        *,
        formats: Sequence[str] | None = None,
        normalized_input: bool = False,
        force: bool = False,
    ) -> Bundle:
        """Write the confirmed winner to the folder `out`, all of it or nothing.

        Args:
            formats: also as programs: "pt2" (torch.export), "onnx"; None: those of the bundle of
                this study that is replaced, if any.
            normalized_input: these take normalised images instead of images in [0, 1].
            force: also replace the bundle of another study, and one that holds further files.

        Raises:
            UserError: the study has no confirmed winner yet, `out` holds something else, or a
                format is unknown, lacks its packages or fails.
        """
        return export_bundle(
            self, Path(out), formats=formats, normalized_input=normalized_input, force=force
        )

    def __repr__(self) -> str:
        shared, metric = self.config.distill, self.config.metric
        text = f"Study {self.path}: {shared.teacher or 'no teacher'} into {shared.student} on "
        text += short_name(shared.dataset)
        with contextlib.suppress(UserError, OSError):  # its folder may be gone
            found = type(self).load(self.path)  # what this one has not read stays unread
            now, best = progress(found), found.ranked()[:1]
            ended = sum(now.trials.values()) - now.trials.get("running", 0)
            text += f", {now.stage}, {ended} of {several(now.asked, 'trial')} ended"
            text += "".join(f", best{list_figures(trial.last, (metric,))[1:]}" for trial in best)
            for row in found.leaderboard():
                if row.winner and row.test:
                    text += f"\nwinner {row.name}: test_top1 {spread(row.test, 'test_top1')}"
        return spell_controls(text)

    def _repr_html_(self) -> str:
        shared, now, metric = self.config.distill, progress(self), self.config.metric
        counts = ", ".join(f"{count} {status}" for status, count in now.trials.items())
        facts = {
            "distilled": f"{shared.teacher or 'no teacher'} into {shared.student}",
            "data set": short_name(shared.dataset),
            "stage": now.stage,
            f"of {several(now.asked, 'trial')}": counts or "none has begun",
        }
        columns: list[str] = ["", metric_name(metric), "test accuracy"]
        rows = [
            [label(row.name), spread(row.val, metric), spread(row.test, "test_top1")]
            for row in self.leaderboard()
        ]
        if not rows:
            columns = ["best trials", metric_name(metric), "settings"]
            rows = [
                [trial.name, figure_text(metric, trial.value(metric)), _assignments(trial.params)]
                for trial in self.ranked()[:SHOWN]
            ]
        return facts_html(f"Study {self.path}", facts) + table_html(columns, rows)


def driver_failure(folder: Path, code: int) -> UserError:
    """The sentence with which the process of a study ended, or where its last words are."""
    log = folder / DRIVER_LOG
    said = read_bytes(log).decode(errors="replace").splitlines() if log.exists() else []
    if said and said[-1].startswith(DRIVER_ERROR):
        return UserError(said[-1].removeprefix(DRIVER_ERROR))
    return UserError(f"the study in {folder} ended with exit code {code}: see {log}.")


def _assignments(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value_text(value)}" for name, value in params.items())
