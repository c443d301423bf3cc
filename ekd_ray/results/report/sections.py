"""The sections of the page: each with one sentence that is computed from the study."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.records import milestone_epochs
from ekd_ray.results.report import figures_model, figures_parameters, figures_search
from ekd_ray.results.report.closing import failures, reproduce
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.figures_teacher import correlation_gaps, correlation_maps, embeddings
from ekd_ray.results.report.headline import spread
from ekd_ray.results.report.parts import (
    Chart,
    Section,
    duration,
    esc,
    joined,
    label,
    metric_name,
    points,
    several,
    table,
    value_text,
)


def sections(content: Content) -> list[Section]:
    """All sections that there is anything to say in."""
    made = (
        certainty(content), board(content), curves(content), parameters(content),
        front(content), calibration(content), teacher(content), time(content),
        failures(content), reproduce(content),
    )  # fmt: skip
    return [section for section in made if section]


def certainty(content: Content) -> Section | None:
    """The winner against each baseline."""
    chart = figures_model.differences(content)
    if chart is None:
        return None
    found = content.differences
    parts = [f"{points(d.mean)} points against {label(name)}" for name, d in found.items()]
    takeaway = f"The winner has {joined(parts)}"
    bounded = [d for d in found.values() if d.low is not None and d.high is not None]
    crossing = sum(d.low <= 0 <= d.high for d in bounded if d.low is not None and d.high)
    if len(bounded) < len(found):
        takeaway += "; an interval needs three seeds."
    elif crossing == len(found):
        takeaway += f"; {'every' if crossing > 1 else 'its'} interval crosses zero."
    else:
        takeaway += f"; {crossing or 'none'} of the intervals cross{'es' * (crossing == 1)} zero."
    return Section(
        name="certainty", title="How sure", takeaway=takeaway,
        charts=[chart],
        after='<p class="note">Differences are paired by seed. An interval that crosses zero '
        "means that these seeds do not tell the two apart.</p>",
    )  # fmt: skip


def board(content: Content) -> Section | None:
    """Winner, baselines and finalists with their figures."""
    if not content.board:
        return None
    config = content.config
    names = list(config.watched)
    columns = ["configuration", *(metric_name(n) for n in names), "test accuracy", "test NLL",
               "test ECE"]  # fmt: skip
    rows = []
    for row in content.board:
        figures = [spread(row.figures(n) or (row.val if n == config.metric else ()), n)
                   for n in names]  # fmt: skip
        tested = [_tested(row, n) for n in ("test_nll", "test_ece")]
        text = f"failed: {row.failed}" if row.failed else spread(row.test, "test_top1")
        rows.append([_label(row), *figures, text, *tested])
    best = max((r for r in content.board if r.test), key=lambda r: mean_sd(r.test)[0], default=None)
    takeaway = "Finalists by validation; the final runs have not ended yet."
    if best is not None and content.winner:
        mine = mean_sd(content.winner.test)[0] if content.winner.test else None
        takeaway = (
            "The winner has the best mean on the test split too."
            if best.winner or mine is None
            else f"The winner by validation is not the best by test: {label(best.name)} is "
            f"{100 * (mean_sd(best.test)[0] - mine):.2f} points above."
        )
    chart = figures_model.leaderboard(content)
    searched = [n for n in config.space or {} if getattr(content.board[0].config, n) is not None]
    settings = table(
        ["setting", "winner"],
        [[n, value_text(getattr(content.board[0].config, n))] for n in searched],
    )
    return Section(
        name="leaderboard", title="Leaderboard", takeaway=takeaway,
        charts=[chart] if chart else [],
        after=table(columns, rows, marked=0)
        + '<p class="note">Mean ± standard deviation over n seeds. All rows have the same budget; '
        "finalists that did not win are not trained on all images and have no test figures.</p>"
        + (f"<h3>The winner's settings</h3>{settings}" if searched else ""),
    )  # fmt: skip


def _label(row: Row) -> str:
    return f"{label(row.name)} (winner)" if row.winner else label(row.name)


def _tested(row: Row, name: str) -> str:
    values = tuple(found[name] for found in row.test_metrics if name in found)
    return spread(values, name).split(" (")[0]


def curves(content: Content) -> Section | None:
    """Learning curves and where trials were stopped."""
    chart = figures_search.learning_curves(content)
    if chart is None:
        return None
    stopped = Counter(len(r.history) for r in content.ended if r.status == "pruned")
    total = len(content.ended)
    if stopped:
        where = joined([f"{n} at epoch {epoch}" for epoch, n in sorted(stopped.items())])
        takeaway = f"Early stopping ended {sum(stopped.values())} of {total} trials: {where}."
    else:
        takeaway = f"None of {several(total, 'ended trial')} was stopped early."
    config = content.config
    rungs = milestone_epochs(config)[:-1]
    note = f"Scheduler {config.scheduler}, sampler {config.sampler}"
    note += f"; trials are compared at epochs {', '.join(map(str, rungs))}." if rungs else "."
    return Section(
        name="curves-section", title="Learning curves", takeaway=takeaway, charts=[chart],
        after=f'<p class="note">{esc(note)}</p>',
    )  # fmt: skip


def parameters(content: Content) -> Section | None:
    """What mattered: importance, all parameters together, one by one, the two main ones."""
    made = (
        figures_parameters.importance(content),
        figures_parameters.parallel(content),
        figures_parameters.contour(content),
    )
    charts: list[Chart] = [chart for chart in made if chart]
    small = figures_parameters.slices(content)
    if not charts and not small:
        return None
    rows = content.importance.to_pylist()
    takeaway = "Too few trials to say which parameter mattered."
    if rows:
        top = rows[0]
        share = f"{100 * (top['fanova'] or 0):.0f} %"
        ped = max(rows, key=lambda row: row["ped_anova"])
        same = ped["parameter"] == top["parameter"]
        other = "PED-ANOVA agrees" if same else f"by PED-ANOVA it is {ped['parameter']}"
        takeaway = (
            f"{top['parameter']} mattered most: {share} of what single parameters explain by "
            f"fANOVA; {other}."
        )
    judged = rows[0]["trials"] if rows else 0
    few = judged < 20
    note = (
        "fANOVA: share of the score's variance over the space. PED-ANOVA: what the best tenth of "
        "the trials have in common."
        + (f" From {judged} trials both are rough guides only." if few and rows else "")
    )
    explained = next((c.summary.split("; ")[-1] for c in charts if c.name == "contour"), "")
    if explained:
        note += f" Contour: a Gaussian process in these two numbers alone; {explained}"
    return Section(
        name="parameters", title="Parameters", takeaway=takeaway, charts=charts, small=small,
        after=f'<p class="note">{esc(note)}</p>',
    )  # fmt: skip


def front(content: Content) -> Section | None:
    """The trade-off between the objectives, or between score and time."""
    chart = figures_search.trade_off(content)
    if chart is None:
        return None
    several_objectives = bool(content.config.objectives)
    takeaway = chart.summary
    if not several_objectives and content.ranked:
        cheap = [r for r in content.ranked if r.seconds > 0]
        best = content.ranked[0]
        quicker = [r for r in cheap if r.seconds < best.seconds]
        takeaway = (
            f"The best trial of the search took {duration(best.seconds / 3600)}; "
            f"{several(len(quicker), 'complete one') if quicker else 'no complete one'} took less."
        )
    bounds = ", ".join(content.config.constraints)
    title = "Pareto front" if several_objectives else "Score and cost"
    return Section(
        name="trade-off", title=title, takeaway=takeaway, charts=[chart],
        after=f'<p class="note">Constraints: {esc(bounds)}.</p>' if bounds else "",
    )  # fmt: skip


def calibration(content: Content) -> Section | None:
    """Reliability and risk over coverage of the final models."""
    made = (figures_model.reliability(content), figures_model.risk_coverage(content))
    charts = [chart for chart in made if chart]
    if not charts:
        return None
    eces = {
        row.name: float(np.mean([found["test_ece"] for found in row.test_metrics]))
        for row in content.board
        if row.test_metrics and all("test_ece" in found for found in row.test_metrics)
    }
    takeaway = "What the final models claim to know, against what they know."
    winner = content.winner
    if winner and winner.name in eces:
        best = min(eces, key=lambda name: eces[name])
        takeaway = f"The winner's calibration error on the test split is {eces[winner.name]:.3f}"
        takeaway += (
            ", the least of all." if best == winner.name
            else f"; {label(best)} has the least with {eces[best]:.3f}."
        )  # fmt: skip
    return Section(
        name="calibration", title="Calibration", takeaway=takeaway,
        charts=charts,
        after='<p class="note">From the predictions that were stored when the test split was read '
        "for the final figures; all seeds of a configuration together. Confidence is the "
        "probability of the predicted class, which for an evidential student is the mean of its "
        "Dirichlet distribution.</p>",
    )  # fmt: skip


def teacher(content: Content) -> Section | None:
    """How close the students came to their teacher."""
    maps, embedded = correlation_maps(content), embeddings(content)
    if not maps and not embedded:
        return None
    gaps = {
        "the winner" if row.winner else label(row.name): float(gap.mean())
        for row, gap in correlation_gaps(content).values()
    }
    takeaway = "How the final models see the classes."
    if gaps:
        nearest = min(gaps, key=lambda name: gaps[name])
        others = [f"{value:.3f} for {name}" for name, value in gaps.items() if name != nearest]
        takeaway = (
            f"{nearest[:1].upper()}{nearest[1:]} relates the classes most as the teacher does: "
            f"its logits' correlations differ by {gaps[nearest]:.3f} in the mean"
        )
        takeaway += f", against {joined(others)}." if others else "."
    return Section(
        name="teacher", title="Teacher", takeaway=takeaway, small=[*maps, *embedded],
        after='<p class="note">Maps: absolute difference between the correlations of two classes\' '
        "logits in the student and in the teacher, over stored test images (first seed). t-SNE "
        "keeps neighbours together; distances between groups mean little.</p>",
    )  # fmt: skip


def time(content: Content) -> Section | None:
    """Where the hours went, and what was saved."""
    chart = figures_search.time_chart(content)
    if chart is None:
        return None
    rows, saved = content.time.to_pylist(), content.saved
    total = sum(row["hours"] for row in rows)
    largest = max(rows, key=lambda row: row["hours"])
    takeaway = (
        f"{duration(total)} in all, most of it ({100 * largest['hours'] / total:.0f} %) in "
        f"“{largest['stage']}”"
    )
    if saved.stopped_epochs:
        takeaway += f"; early stops saved {duration(saved.stopped_hours)}"
    takeaway += "."
    notes = ["Seconds of training and validation as each run recorded them; start-up and waiting "
             "are not in it."]  # fmt: skip
    if saved.stopped_epochs:
        notes.append(
            f"Early stops: {several(saved.stopped_epochs, 'epoch')} not trained, each at the pace "
            "of its own trial."
        )
    if saved.views:
        notes.append(
            f"The runs needed the teacher's answer {saved.views:,} times; the network was asked "
            f"{saved.asked or 0:,} times, the rest came from the cache"
            + (f" ({duration(saved.cache_hours)} at the pace of the filling)."
               if saved.cache_hours is not None else ".")
        )  # fmt: skip
    text = " ".join(notes)
    return Section(
        name="time-section", title="Time", takeaway=takeaway, charts=[chart],
        after=f'<p class="note">{esc(text)}</p>',
    )  # fmt: skip
