"""Everything that a report says, as data: the study read once, and a sentence on each part of it.

How it looks is up to the templates, and what is drawn to `figures`.
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import hide_folders, joined, several, short_name
from ekd_ray.config.ranges import reach_tried
from ekd_ray.config.study_config import TESTED_AT
from ekd_ray.config.targets import largest_is_best
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.results.importance import (
    LEAST_TRIALS,
    Findings,
    describe_error,
    describe_expectation,
    judged_trials,
)
from ekd_ray.results.leaderboard import Leaderboard, Row, mean_sd
from ekd_ray.results.paired import Paired
from ekd_ray.results.progress import Progress, Savings, progress, savings, time_rows
from ekd_ray.results.records import RunRecord, trial_name
from ekd_ray.results.row_names import PLURALS, label, name_missed, noun_of
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import (
    describe_better_on_test,
    describe_choice,
    describe_lead,
    describe_win,
    duration,
    figure_text,
    is_share,
    metric_name,
    percent,
    points,
    signed_text,
    spread,
    suggest_gain,
    value_text,
    width_text,
)

if TYPE_CHECKING:
    import numpy as np

    from ekd_ray.engine.measure.gallery import Gallery
    from ekd_ray.engine.measure.inheritance import Inheritance
    from ekd_ray.engine.measure.predictions import Predictions
    from ekd_ray.engine.measure.shift import Shift
    from ekd_ray.results.model_figures import StudyModel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Content:
    """A study as its report sees it."""

    study: StudyReader
    config: StudyConfig
    ended: list[RunRecord]
    running: list[RunRecord]
    ranked: list[RunRecord]
    front: list[RunRecord]
    board: Leaderboard
    differences: dict[str, Paired]
    validation_differences: dict[str, Paired]
    progress: Progress
    time: list[dict[str, Any]]
    saved: Savings
    teacher: TeacherFigures | None
    damaged: list[str]
    findings: Findings | None = None
    model: StudyModel | None = None

    @cached_property
    def shift(self) -> Shift | None:
        """Figures of the exported weights under corruptions, where they were measured."""
        return _read_shift(self.study, self.winner.name) if self.winner else None

    @cached_property
    def predictions(self) -> dict[str, list[Predictions]]:
        """By leaderboard row, one per final run."""
        return _read_predictions(self.study)

    @cached_property
    def exported(self) -> tuple[Predictions, Gallery | None] | None:
        """The predictions on test images of the exported weights, the winner's first final run."""
        return _read_exported(self.study, self.winner.name) if self.winner else None

    @cached_property
    def inherited(self) -> Inheritance | None:
        """The uncertainty of the exported weights beside their teacher's, where it was kept."""
        return _read_inherited(self.study, self.winner.name) if self.winner else None

    @property
    def winner(self) -> Row | None:
        """The confirmed winner, or None before it is chosen."""
        return self.board[0] if self.board and self.board[0].winner else None

    @property
    def winner_number(self) -> int | None:
        """The number of the winner's trial; before confirm, of the best trial so far."""
        if self.winner:
            return self.winner.number
        return self.ranked[0].number if self.ranked else None

    @property
    def best_trial(self) -> RunRecord | None:
        """The trial that has the winner's configuration, else the best trial."""
        own = (r for r in self.ended if r.number == self.winner_number)
        return next(own, self.ranked[0] if self.ranked else None)


def gather(study: StudyReader, findings: Findings | None = None) -> Content:
    """Read a study, running or finished, with what its model says if that is known."""
    ended = study.records()
    space = reach_tried(study.config.space, [record.params for record in ended])
    return Content(
        study=study,
        config=study.config.replace(space=space),
        ended=ended,
        running=study.running(),
        ranked=study.ranked(),
        front=study.pareto(),
        board=study.leaderboard(),
        differences=study.differences(),
        validation_differences=study.validation_differences(),
        progress=progress(study),
        time=time_rows(study),
        saved=savings(study),
        teacher=study.teacher(),
        damaged=[line.replace(f"{study.path}/", "") for line in study.damaged()],
        findings=findings,
    )


def gather_all(study: StudyReader) -> Content:
    """As `gather`, with the model and all that it says, which takes seconds."""
    from ekd_ray.results.model_figures import fit_study_model  # loads SciPy

    content = gather(study)
    model = fit_study_model(content.ended, content.config)
    findings = model.find(content.best_trial) if model else None
    return replace(content, model=model, findings=findings)


def _read_predictions(study: StudyReader) -> dict[str, list[Predictions]]:
    # Loads torch, and only a page shows them.
    from ekd_ray.engine.measure.predictions import FILE, Predictions

    found: dict[str, list[Predictions]] = {}
    for run in study.confirm_runs:
        path = run.folder / FILE
        if run.stage is RunStage.FINAL and not run.reason and path.is_file():
            try:
                predictions = Predictions.load(path)
            except UserError as error:  # its figures are left out, not the study
                warnings.warn(str(error), stacklevel=2)
            else:
                found.setdefault(run.name, []).append(predictions)
    return found


def _exported_run(study: StudyReader, name: str) -> RunRecord | None:
    """A row's first final run, unless it failed."""
    finals = (r for r in study.confirm_runs if r.stage is RunStage.FINAL and r.name == name)
    run = next(finals, None)
    return None if run is None or run.reason else run


def _read_exported(study: StudyReader, name: str) -> tuple[Predictions, Gallery | None] | None:
    # As above.
    from ekd_ray.engine.measure.gallery import FILE as GALLERY
    from ekd_ray.engine.measure.gallery import Gallery
    from ekd_ray.engine.measure.predictions import FILE, Predictions

    run = _exported_run(study, name)
    if run is None or not (run.folder / FILE).is_file():
        return None
    try:
        found = Predictions.load(run.folder / FILE)
    except UserError:  # said where all are read
        return None
    if not (run.folder / GALLERY).is_file():
        return found, None
    try:
        size = {"count": len(found.labels), "classes": len(found.class_names)}
        return found, Gallery.load(run.folder / GALLERY, **size)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return found, None


def _read_shift(study: StudyReader, name: str) -> Shift | None:
    """Those of the exported weights: a study that was extended may have others since."""
    from ekd_ray.engine.final import WEIGHTS  # loads torch
    from ekd_ray.engine.measure.shift import FILE, Shift

    run, found = _exported_run(study, name), _read_if_there(study.path / FILE, Shift.load)
    if run is None or found is None or not (run.folder / WEIGHTS).is_file():
        return None
    return found if found.weights == sha256_file(run.folder / WEIGHTS) else None


def _read_inherited(study: StudyReader, name: str) -> Inheritance | None:
    from ekd_ray.engine.measure.inheritance import FILE, Inheritance  # as above

    run = _exported_run(study, name)
    return None if run is None else _read_if_there(run.folder / FILE, Inheritance.load)


def _read_if_there(path: Path, load: Callable[[Path], T]) -> T | None:
    """The content of a file that a study may have; damage is said, and left out."""
    if not path.is_file():
        return None
    try:
        return load(path)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def measure_correlation_gaps(content: Content) -> dict[str, tuple[Row, np.ndarray]]:
    """By row, the gap of its first seed to the teacher [C, C], on the images whose logits were
    kept; see `correlation_gap`."""
    from ekd_ray.results.report.measures import correlation_gap  # as above

    firsts = [(row, content.predictions[row.name][0]) for row in content.board
              if row.name in content.predictions]  # fmt: skip
    taught = next((p for _, p in firsts if p.teacher_logits is not None), None)
    if taught is None or taught.teacher_logits is None or len(taught.teacher_logits) < 3:
        return {}
    return {
        row.name: (row, correlation_gap(p.logits, taught.teacher_logits))
        for row, p in firsts
        if p.kept.equal(taught.kept)
    }


# The head of the page: the winner in one sentence, how sure that is, and the main figures.


def write_headline(content: Content) -> tuple[str, str]:
    """The winner in one sentence, and how sure that is."""
    shared = content.config.distill
    subject = f"{shared.teacher or 'no teacher'} on {short_name(shared.dataset)}."
    winner = content.winner
    if winner is None or not winner.test:
        searched = sum(run.full_run_of is None for run in content.ended)
        ended = f"{searched} of {content.progress.asked} trials have ended. " * bool(searched)
        return _write_unfinished_headline(content), (
            f"{shared.student} distilled from {subject} {ended}Test figures come with the final "
            "runs."
        )
    metric = content.board.test_metric
    mean, deviation, n = mean_sd(winner.tested(metric))
    value = f"{100 * mean:.1f}\N{NO-BREAK SPACE}%" if is_share(metric) else f"{mean:.3f}"
    parts = [f"{describe_win(winner.name)} with {value} {metric_name(metric)}"]
    if missed := name_missed(content.board.missed()):
        where = "on test" if metric == "test_top1" else metric_name(metric)
        parts = [f"{missed}: {noun_of(winner.name)}, best on validation, at {value} {where}"]
    parts += filter(None, [_describe_verdict(content)])
    spread_text = f", standard deviation {width_text(metric, deviation)}." if n > 1 else "."
    choice = describe_choice(content.study.header.get(TESTED_AT, ()))
    lead = (
        f"{winner.config.student} distilled from {subject} Mean of {several(n, 'seed')}"
        f"{spread_text} {choice} {_describe_winners_curse(content)}"
    ).rstrip()
    tips = suggest_gain(content.board)
    return f"{', '.join(parts)}.", f"{lead} {tips}".rstrip()


def _write_unfinished_headline(content: Content) -> str:
    stage, metric = content.progress.stage, content.config.metric
    if not content.ranked:
        missing = "is complete" if content.ended else "has ended"
        return f"The study is in its {stage} stage; no trial {missing}."
    top = content.ranked[0]
    return (
        f"The study is in its {stage} stage: {top.name} leads with "
        f"{figure_text(metric, top.value(metric))} {metric_name(metric)}."
    )


def _describe_verdict(content: Content) -> str:
    """How the winner compares with champions and baselines, as a clause; empty without any."""
    groups: dict[str, list[str]] = {}
    for name, found in content.differences.items():
        groups.setdefault(_judge(found, content.board.test_metric), []).append(noun_of(name))
    headed = {noun_of(name) for name in content.board.missed()}
    if len(headed) > 1 and set(groups.get("open", ())) == headed:
        groups["open"] = ["them"]  # the headline has begun with those
    patterns = {"better": "better than {}", "worse": "worse than {}",
                "open": "not told apart from {} by these seeds"}  # fmt: skip
    clauses = [text.format(joined(groups[k])) for k, text in patterns.items() if k in groups]
    text = joined(clauses)
    if "few" in groups:
        few = "too few seeds to tell"
        if text or not content.board.missed():  # the headline has begun with those
            few += f" it from {joined(groups['few'])}"
        text = f"{text}, and there are {few}" if text else f"with {few}"
    return text


def _judge(found: Paired, metric: str) -> str:
    if found.sign is None:
        return "few"
    better = 1 if largest_is_best(metric) else -1
    return {1: "better", -1: "worse", 0: "open"}[found.sign * better]


def _describe_winners_curse(content: Content) -> str:
    """The winner's score in the search, the best of many, against that under fresh seeds."""
    metric, winner = content.config.metric, content.winner
    record = next((r for r in content.ranked if r.number == content.winner_number), None)
    if record is None or winner is None or not winner.val or record.value(metric) is None:
        return ""
    fresh, _, n = mean_sd(winner.val)
    return (
        f"Its {metric_name(metric)} was {figure_text(metric, record.value(metric))} in the search "
        f"and {figure_text(metric, fresh)} over {several(n, 'fresh seed')}."
    )


def list_tiles(content: Content) -> list[tuple[str, str]]:
    """The figures under the headline."""
    counts, saved = content.progress.trials, content.saved
    metrics = dict.fromkeys([content.board.test_metric, "test_top1"])
    tested = {name: content.winner.tested(name) if content.winner else () for name in metrics}
    shown: list[tuple[str, str, Any]] = [
        *((metric_name(name), _without_n(values, name), values) for name, values in tested.items()),
        ("trials", str(len(content.ended)), True),
        ("stopped early", str(counts.get("pruned")), counts.get("pruned")),
        ("training time", duration(sum(row["hours"] for row in content.time)), True),
        ("saved by early stops", duration(saved.stopped_hours), saved.stopped_hours > 0),
        ("failed trials", str(counts.get("failed")), counts.get("failed")),
    ]
    return [(name, text) for name, text, known in shown if known]


def _without_n(values: Sequence[float], name: str) -> str:
    """Mean and standard deviation, which a line break does not part from their unit."""
    return spread(values, name).partition(" (")[0].replace(" %", "\N{NO-BREAK SPACE}%")


# The sections: a sentence on each.


@dataclass(frozen=True)
class Section:
    """A part of the page and its one sentence."""

    name: str
    title: str
    takeaway: str


def list_sections(content: Content, drawn: Container[str]) -> list[Section]:
    """The sections that there is anything to say in.

    Args:
        drawn: the names of those that have figures.
    """
    front = "Pareto front" if content.config.objectives else "Score and cost"
    parts: list[tuple[str, str, Callable[[Content], str]]] = [
        ("certainty", "How sure", _describe_certainty),
        ("leaderboard", "Leaderboard", _describe_leaderboard),
        ("curves-section", "Learning curves", _describe_curves),
        ("parameters", "Parameters", describe_parameters),
        ("trade-off", front, _describe_trade_off),
        ("errors", "Errors", _describe_errors),
        ("calibration", "Calibration", _describe_calibration),
        ("teacher", "Teacher", _describe_teacher),
        ("time-section", "Time", _describe_time),
        ("failures", "Failures", _describe_failures),
        ("reproduce", "Reproduce", _describe_reproduce),
    ]
    without_figures = {"failures", "reproduce"}
    without_figures |= {"leaderboard"} if content.board else set()
    without_figures |= {"parameters"} if content.ended else set()
    return [
        Section(name, title, describe(content))
        for name, title, describe in parts
        if name in drawn or name in without_figures
    ]


def _describe_certainty(content: Content) -> str:
    found, metric = content.differences, content.board.test_metric

    def text(value: float) -> str:
        return f"{points(value)} points" if is_share(metric) else signed_text(metric, value)

    parts = [f"{text(difference.mean)} against {noun_of(n)}" for n, difference in found.items()]
    judged = [_judge(difference, metric) for difference in found.values()]
    crossing = judged.count("open")
    end = f"{crossing or 'none'} of the intervals {'crosses' if crossing == 1 else 'cross'} zero"
    if "few" in judged:
        end = "an interval needs three seeds"
    elif crossing == len(found):
        end = f"{'every' if crossing > 1 else 'its'} interval crosses zero"
    named = f" in {metric_name(metric)}" * (metric != "test_top1")
    against = f"On the test split the winner has{named} {joined(parts)}; {end}." if found else ""
    return f"{describe_lead(content.board)} {against}".strip()


def _describe_leaderboard(content: Content) -> str:
    tested = [row for row in content.board if row.test]
    if not tested or not content.winner:
        return "Champions and finalists by validation; the final runs have not ended yet."
    better = describe_better_on_test(content.board)
    return better or "On the test split no row has a better mean than the winner."


def list_other_names(row: Row) -> list[str]:
    """Other champions, and the trial, that have the row's configuration."""
    own = row.name.partition(" (")[0]  # of `trial 2 (full run of trial 0)`
    names = [name for name in row.equals if name != row.name]
    if row.number is not None and trial_name(row.number) != own:
        # Beside a trial of the study that a warm start learned from.
        brought = any(name.startswith("from ") for name in (row.name, *names))
        names.append(trial_name(row.number) + " of this study" * brought)
    return names


def row_label(row: Row) -> str:
    """A leaderboard row in words: the winner marked, and what else has its configuration."""
    same = list_other_names(row)
    marks = [*["winner"] * row.winner, *([f"also {joined(same)}"] if same else [])]
    return f"{label(row.name)} ({', '.join(marks)})" if marks else label(row.name)


def _describe_curves(content: Content) -> str:
    stopped = Counter(len(r.history) for r in content.ended if r.status == "pruned")
    total = len(content.ended)
    if not stopped:
        return f"None of {several(total, 'ended trial')} was stopped early."
    where = joined([f"{n} at epoch {epoch}" for epoch, n in sorted(stopped.items())])
    return f"Early stopping ended {stopped.total()} of {total} trials: {where}."


def describe_parameters(content: Content) -> str:
    """The parameter that mattered most, or why none is named."""
    found = content.findings
    if found is None:
        count = len(judged_trials(content.ended, content.config.metric))
        if count >= LEAST_TRIALS:
            return "All trials of full length scored the same: none of the parameters mattered."
        return (
            f"{several(count, 'trial')} of full length: too few to say which parameter mattered "
            f"(at least {LEAST_TRIALS} are needed)."
        )
    if not found.informed:
        return "The study's model knows too little to say which parameter mattered."
    top = found.effects[0]
    return (
        f"{top.parameter} mattered most: {percent(top.main)} of what the study's model expects to "
        f"vary comes of it alone, {percent(top.total)} with what depends on others too."
    )


def describe_model(content: Content) -> str:
    """Sentences on what the model expects of the best trial, and how far to believe it; empty
    without one."""
    found, best = content.findings, content.best_trial
    if found is None:
        return ""
    known = found.informed and best is not None and best.number == found.best
    expected = describe_expectation(found) if known else ""
    return f"{expected} {describe_error(found)}".lstrip()


def select_compared_trials(content: Content) -> tuple[str, list[RunRecord]]:
    """(the cost, the trials that have it and the metric), for the trade-off.

    The cost is the first further objective, of complete trials; without one the seconds of
    training.
    """
    metric, further = content.config.metric, content.config.objectives[:1]
    known = [r for r in content.ended if r.value(metric) is not None]
    if not further:
        return "seconds", known
    return further[0], [r for r in known if r.status == "complete" and further[0] in r.last]


def _describe_trade_off(content: Content) -> str:
    if content.config.objectives:
        count = len(select_compared_trials(content)[1])
        return f"{len(content.front)} of {count} trials are on the Pareto front."
    if not content.ranked:
        return "No trial is complete."
    best = content.ranked[0]
    quicker = sum(0 < r.seconds < best.seconds for r in content.ranked)
    return (
        f"The best trial of the search took {duration(best.seconds / 3600)}; "
        f"{several(quicker, 'complete one') if quicker else 'no complete one'} took less."
    )


def count_confusions(found: Predictions) -> list[tuple[int, int, int]]:
    """(images, label, prediction) of every pair of classes that was confused, most first."""
    from ekd_ray.engine.pictures import confusion  # loads TensorBoard

    counts = confusion(found)
    counts[range(len(counts)), range(len(counts))] = 0
    pairs = [(int(counts[i, j]), int(i), int(j)) for i, j in zip(*counts.nonzero(), strict=True)]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))


def _describe_errors(content: Content) -> str:
    if content.exported is None:
        return "What the final models get wrong."
    found = content.exported[0]
    wrong = count_confusions(found)
    total = len(found.labels)
    if not wrong:
        return f"The exported weights are right on all {total:,} test images."
    count, label_, taken = wrong[0]
    names = found.class_names
    return (
        f"The exported weights are wrong on {sum(n for n, _, _ in wrong):,} of {total:,} test "
        f"images, most often with “{names[label_]}” taken for “{names[taken]}” "
        f"({several(count, 'image')})."
    )


def list_calibrations(content: Content) -> list[list[str | None]]:
    """The mean over its seeds of what the section's figures draw of each final configuration."""
    shown = ("test_ece", "test_nll", "test_aurc", "test_error_auroc")
    return [
        [
            row_label(row),
            *(
                figure_text(name, statistics.fmean(values)) if values else None
                for name in shown
                for values in [[found[name] for found in row.test_metrics if name in found]]
            ),
        ]
        for row in content.board
        if any(name in found for found in row.test_metrics for name in shown)
    ]


def _describe_calibration(content: Content) -> str:
    errors = {
        row.name: statistics.fmean(found["test_ece"] for found in row.test_metrics)
        for row in content.board
        if row.test_metrics and all("test_ece" in found for found in row.test_metrics)
    }
    winner = content.winner
    if not winner or winner.name not in errors:
        return "What the final models claim to know, against what they know."
    best = min(errors, key=lambda name: errors[name])
    verb = "have" if best in PLURALS else "has"
    rest = f"; {noun_of(best)} {verb} the least with {errors[best]:.3f}."
    return (
        f"The winner's calibration error on the test split is {errors[winner.name]:.3f}"
        f"{', the least of all.' if best == winner.name else rest}"
    )


def _describe_teacher(content: Content) -> str:
    found = measure_correlation_gaps(content)
    if not found:
        return "How the final models see the classes."
    gaps = {name: float(gap.mean()) for name, (_, gap) in found.items()}
    nouns = {
        name: "the winner" if row.winner else noun_of(name) for name, (row, _) in found.items()
    }
    nearest = min(gaps, key=lambda name: gaps[name])
    plural = nearest in PLURALS and nouns[nearest] != "the winner"
    verb, its = ("relate", "their") if plural else ("relates", "its")
    others = [f"{value:.3f} for {nouns[name]}" for name, value in gaps.items() if name != nearest]
    return (
        f"{nouns[nearest][:1].upper()}{nouns[nearest][1:]} {verb} the classes most as the teacher "
        f"does: {its} logits' correlations differ by {gaps[nearest]:.3f} in the mean"
        + (f", against {joined(others)}." if others else ".")
    )


def _describe_time(content: Content) -> str:
    rows, saved = content.time, content.saved
    total, largest = sum(r["hours"] for r in rows), max(rows, key=lambda row: row["hours"])
    stops = f"; early stops saved {duration(saved.stopped_hours)}" if saved.stopped_epochs else ""
    return (
        f"{duration(total)} in all, most of it ({percent(largest['hours'] / total)}) in "
        f"“{largest['stage']}”{stops}."
    )


def list_failed_runs(content: Content) -> list[tuple[str, str, str]]:
    """(run, reason, settings) of each trial and confirm run that failed."""
    return [
        (f"trial {r.number}", hide_folders(r.reason or "unknown"),
         ", ".join(f"{k}={value_text(v)}" for k, v in r.params.items()))
        for r in content.ended if r.status == "failed"
    ] + [
        (f"{label(run.name)}, seed {run.seed} ({run.stage})", hide_folders(run.reason), "")
        for run in content.study.confirm_runs if run.reason
    ]  # fmt: skip


def _describe_failures(content: Content) -> str:
    runs = list_failed_runs(content)
    if not runs:
        return "Nothing failed."
    ((reason, _),) = Counter(reason for _, reason, _ in runs).most_common(1)
    return f"{several(len(runs), 'run')} failed; the most frequent reason: {reason}"


def _describe_reproduce(content: Content) -> str:
    return (
        "The same seed on the same machine and number of threads gives the same bits; on a GPU "
        "only in runs that are deterministic, as final ones are by default and trials are not."
    )
