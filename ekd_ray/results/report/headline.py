"""The head of the page: the winner in one sentence, how sure that is, and the main figures."""

from __future__ import annotations

from ekd_ray.config.targets import COSTS
from ekd_ray.data import short_name
from ekd_ray.results.leaderboard import mean_sd
from ekd_ray.results.paired import Paired
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import (
    DASH,
    duration,
    figure_text,
    is_share,
    joined,
    label,
    metric_name,
    several,
)


def spread(values: tuple[float, ...], name: str) -> str:
    """`39.66 ± 0.81 % (n = 3)`."""
    if not values:
        return DASH
    mean, deviation, n = mean_sd(values)
    if name in COSTS:
        return figure_text(name, mean)
    if is_share(name):
        text = f"{100 * mean:.2f} ± {100 * deviation:.2f} %" if n > 1 else f"{100 * mean:.2f} %"
    else:
        shown = figure_text(name, mean)
        text = f"{shown} ± {deviation:.3f}" if n > 1 and deviation else shown
    return f"{text} (n = {n})"


def verdict(content: Content) -> str:
    """How the winner compares with its baselines, as a clause; empty without any."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "few": []}
    for name, found in content.differences.items():
        groups[_judged(found)].append(label(name))
    words = []
    if groups["better"]:
        words.append(f"better than {joined(groups['better'])}")
    if groups["worse"]:
        words.append(f"worse than {joined(groups['worse'])}")
    if groups["open"]:
        words.append(f"not told apart from {joined(groups['open'])} by these seeds")
    text = joined(words)
    if groups["few"]:
        few = f"too few seeds to tell it from {joined(groups['few'])}"
        text = f"{text}, and there are {few}" if text else f"with {few}"
    return text


def _judged(found: Paired) -> str:
    if found.low is None or found.high is None:
        return "few"
    if found.low > 0:
        return "better"
    return "worse" if found.high < 0 else "open"


def headline(content: Content) -> tuple[str, str]:
    """The winner in one sentence, and how sure that is."""
    winner, shared = content.winner, content.config.distill
    if winner is None or not winner.test:
        return _open_headline(content)
    mean, deviation, n = mean_sd(winner.test)
    text = f"{winner.name.capitalize()} wins with {100 * mean:.1f}\N{NO-BREAK SPACE}% test accuracy"
    clause = verdict(content)
    lead = (
        f"{winner.config.student} distilled from {shared.teacher or 'no teacher'} on "
        f"{short_name(shared.dataset)}. Mean of {several(n, 'seed')}"
        + (f", standard deviation {100 * deviation:.2f} points. " if n > 1 else ". ")
        + "The winner was chosen on the validation split; the test split was read once, after."
    )
    if _gap(content):
        lead += f" {_gap(content)}"
    return f"{text}, {clause}." if clause else f"{text}.", lead


def _gap(content: Content) -> str:
    """The winner's curse: its score in the search against that under fresh seeds."""
    metric, winner = content.config.metric, content.winner
    record = next((r for r in content.ended if r.number == content.winner_number), None)
    if record is None or winner is None or not winner.val or record.value(metric) is None:
        return ""
    fresh, _, n = mean_sd(winner.val)
    return (
        f"Its {metric_name(metric)} was {figure_text(metric, record.value(metric))} in the search "
        f"and {figure_text(metric, fresh)} over {several(n, 'fresh seed')}."
    )


def _open_headline(content: Content) -> tuple[str, str]:
    counts, shared, metric = content.progress.trials, content.config.distill, content.config.metric
    done = sum(v for k, v in counts.items() if k != "running")
    lead = (
        f"{shared.student} distilled from {shared.teacher or 'no teacher'} on "
        f"{short_name(shared.dataset)}. "
        f"{done} of {content.progress.asked} trials have ended. Test figures come with the final "
        "runs; make the report again then."
    )
    if not content.ranked:
        return f"The study is in its {content.progress.stage} stage; no trial is complete.", lead
    top = content.ranked[0]
    return (
        f"The study is in its {content.progress.stage} stage: trial {top.number} leads with "
        f"{figure_text(metric, top.value(metric))} {metric_name(metric)}.",
        lead,
    )


def tiles(content: Content) -> list[tuple[str, str]]:
    """The figures under the headline."""
    found = []
    if content.winner and content.winner.test:
        found.append(("test accuracy", spread(content.winner.test, "test_top1").split(" (")[0]))
    counts = content.progress.trials
    stopped = counts.get("pruned", 0)
    ended = sum(v for k, v in counts.items() if k != "running")
    found.append(("trials", str(ended)))
    if stopped:
        found.append(("stopped early", str(stopped)))
    hours = sum(row["hours"] for row in content.time.to_pylist())
    found.append(("training time", duration(hours)))
    saved = content.saved.stopped_hours + (content.saved.cache_hours or 0.0)
    if saved > 0:
        found.append(("time saved", duration(saved)))
    if counts.get("failed"):
        found.append(("failed trials", str(counts["failed"])))
    return found
