"""Names and values in words, for the report, the terminal and the live view."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import command_text, joined, several
from ekd_ray.config.targets import (
    COSTS,
    LEAST_HELD_OUT,
    OF_CLASSES,
    PictureCounts,
    largest_is_best,
)
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.errors import hide_secrets
from ekd_ray.results.leaderboard import STUDENT_ALONE, Gain, Leaderboard, mean_sd
from ekd_ray.results.paired import LEAST_SEEDS, Paired
from ekd_ray.results.row_names import PLURALS, label, name_missed, noun_of

DASH = "\N{EN DASH}"  # where there is no value
MOST_NAMED = 10  # of what is damaged
UNEVEN = 0.02  # between accuracy and balanced accuracy: by more, both are shown
METRIC_NAMES = {
    "top1": "accuracy",
    "balanced_top1": "balanced accuracy",
    "worst_recall": "recall of the worst class",
    "nll": "negative log-likelihood",
    "ece": "calibration error (ECE)",
    "aurc": "risk over coverage (AURC)",
    "ood_auroc": "out-of-distribution AUROC",
    "mi_auroc": "out-of-distribution AUROC of the mutual information",
    "vacuity_corr": "rank correlation of vacuity with the teacher's",
    "parameters": "parameters",
    "flops": "FLOPs of one image",
    "latency_ms": "latency of one image (ms)",
    "seconds": "seconds of training",
}


def describe_choice(tested_at: Sequence[int]) -> str:
    """The split that a winner was chosen on, and whether test figures had been seen before.

    Args:
        tested_at: numbers of trials at which the study was extended after they had been shown.
    """
    chosen = "The winner was chosen on the validation split; the test split was read"
    if not tested_at:
        return f"{chosen} once, after."
    trials = joined([*map(str, tested_at)])
    return (
        f"{chosen} after, and before that for the winner of {trials} trials: whoever "
        "went on because of these figures has chosen by them too."
    )


def metric_name(name: str) -> str:
    """`val_top1` -> `validation accuracy`."""
    prefix, _, rest = name.partition("_")
    if name in COSTS or prefix not in ("val", "test"):
        return METRIC_NAMES.get(name, name)
    return f"{'validation' if prefix == 'val' else 'test'} {METRIC_NAMES.get(rest, rest)}"


def is_share(name: str) -> bool:
    """Whether a metric is an accuracy or a recall, shown in percent."""
    return name.endswith(("top1", "top5", "recall"))


def resume_command(config: StudyConfig, out: object, *more: object) -> str:
    """The command that continues a study in a folder or at a URI, with what the user must allow
    each time, and further flags."""
    words = ["tune", "--resume", "--out", out, *more]
    if config.optuna_storage:
        words += ["--optuna-storage", hide_secrets(config.optuna_storage)]
    if config.track:
        words += ["--track", hide_secrets(config.track)]
    return command_text(*words, *(["--trust-plugins"] if config.distill.plugins else []))


def describe_damage(damaged: Sequence[str]) -> list[str]:
    """How many files of a study are left out, and each of the first ones in a sentence."""
    more = len(damaged) - MOST_NAMED
    head = f"left out because of damage: {several(len(damaged), 'file')} of the study:"
    if len(damaged) < 2:
        return [f"{head} {text}" for text in damaged]
    return [head, *damaged[:MOST_NAMED], *([f"... and {more} more"] if more > 0 else [])]


def describe_few_pictures(counts: PictureCounts, metrics: Iterable[str]) -> list[str]:
    """A warning for each split of which so few pictures tell little; empty where they are enough.

    Args:
        metrics: what the study compares by. One that is made of the classes' recalls is as sure as
            that of the smallest class.
    """
    held, smallest = counts.validation_images or 0, counts.smallest_class_images or 0
    tested, lines = counts.test_images or 0, []
    if 0 < held < LEAST_HELD_OUT:
        lines.append(
            f"validates on {several(held, 'picture')}: {_width_text(held, 'an accuracy')}; smaller "
            "differences between configurations may be chance"
        )
    of_classes = [metric_name(name) for name in metrics if name in OF_CLASSES]
    if of_classes and 0 < smallest < LEAST_HELD_OUT:
        lines.append(
            f"{joined(of_classes)} is as sure as the smallest class, which validates on "
            f"{several(smallest, 'picture')}: {_width_text(smallest, 'a recall')}"
        )
    if 0 < tested < LEAST_HELD_OUT:
        lines.append(
            f"tests on {several(tested, 'picture')}: {_width_text(tested, 'an accuracy')}, and "
            "more seeds do not narrow that"
        )
    return lines


def _width_text(count: int, figure: str) -> str:
    """The normal approximation's interval of a share of 50 %, the widest there is."""
    width = max(1, round(100 * 1.96 * math.sqrt(0.25 / count)))
    return f"±{width} points (95 % interval of {figure} of 50 %)"


def figure_text(name: str, value: float | None) -> str:
    """A metric's value as text."""
    if value is None:
        return DASH
    if is_share(name):
        return f"{100 * value:.2f} %"
    if name in ("parameters", "flops", "seconds"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def spread(values: Sequence[float], name: str) -> str:
    """Mean and standard deviation of a metric: `39.66 ± 0.81 % (n = 3)`; a cost has neither."""
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


def list_figures(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    """Those of the metrics that there are, each after a comma: `, val_top1 39.66 %`."""
    return "".join(f", {n} {figure_text(n, metrics[n])}" for n in names if n in metrics)


def exact_figure(name: str, value: float) -> str:
    """A metric's value with the digits of a log: `50.00%`, `1.2345`."""
    if name in ("parameters", "flops"):
        return f"{value:,.0f}"
    return f"{value:.2%}" if is_share(name) else f"{value:.4f}"


def short_spread(values: Sequence[float], name: str) -> str:
    """As `spread`, for a column that says the unit and n: `39.66 ± 0.81`, `39.66`."""
    if not values:
        return ""
    if name in COSTS:
        return exact_figure(name, values[0])
    mean, deviation, n = mean_sd(values)
    scale, digits = (100, 2) if is_share(name) else (1, 3)
    text = f"{scale * mean:.{digits}f}"
    return f"{text} ± {scale * deviation:.{digits}f}" if n > 1 else text


def points(value: float) -> str:
    """A difference of accuracies in points, with its sign."""
    return f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def signed_text(name: str, value: float) -> str:
    """A difference of a metric without its unit: `+1.21`, of points, or `-0.0412`."""
    scale, digits, _ = _scale_of(name)
    return f"{scale * value:+.{digits}f}"


def width_text(name: str, value: float) -> str:
    """A difference of a metric without its sign: `1.21 points`, `0.0412`."""
    scale, digits, _ = _scale_of(name)
    return f"{scale * value:.{digits}f}{' points' * is_share(name)}"


def describe_win(name: str) -> str:
    """A champion or trial that has won, as a clause: `The authors' values win`."""
    noun = noun_of(name)
    return f"{noun[0].upper()}{noun[1:]} {'win' if name in PLURALS else 'wins'}"


def difference_text(name: str, found: Paired, metric: str) -> str:
    """`winner - KD: +1.40 points of test_top1, 95 % interval -1.38 to +4.17 (paired, 5 seeds)`."""
    unit = _scale_of(metric)[2]
    text = f"winner - {label(name)}: {signed_text(metric, found.mean)} {unit}{metric}"
    if interval := _interval_text(found, metric):
        text += f", {100 * found.level:g} % interval {interval}"
    return f"{text} (paired, {several(found.n, 'seed')})"


def describe_lead(board: Leaderboard) -> str:
    """Whether the seeds tell the winner from the next best on validation; empty without a rival."""
    if sum(bool(row.val) for row in board) < 2:
        return ""
    if (lead := board.lead) is None:
        fewest = min(len(row.val) for row in board if row.val)
        text = f"each of the others was clearly worse after {several(fewest, 'seed')} or more"
        broken = ", or breaks a constraint" if board.config.constraints else ""
        return f"Settled on the validation pictures: {text}{broken}."
    found, metric = lead.difference, board.config.metric
    verdict = "Settled" if lead.settled else "Not settled"
    verb = {True: ("tells", "tell"), False: ("does not tell", "do not tell")}[lead.settled]
    text = f"{verdict} on the validation pictures: {several(found.n, 'seed')} "
    text += f"{verb[found.n > 1]} the winner from the next best"
    if interval := _interval_text(found, metric):
        subject = f"{_scale_of(metric)[2]}{metric_name(metric)}"
        interval = f" ({100 * found.level:g} % interval {interval} {subject})"
    return f"{text}, {label(lead.over)}{interval}."


def describe_better_on_test(board: Leaderboard, *, size: bool = True) -> str:
    """The row that is better than the winner on the test split; empty if none.

    Args:
        size: also by how much, where no difference to it stands beside this.
    """
    if not (board and board[0].winner and board[0].test):
        return ""
    metric = board.test_metric
    sign = 1 if largest_is_best(metric) else -1
    tested = [row for row in board if row.tested(metric)]
    best = max(tested, key=lambda row: sign * mean_sd(row.tested(metric))[0])
    if best.winner:
        return ""
    gap = abs(mean_sd(best.tested(metric))[0] - mean_sd(board[0].tested(metric))[0])
    verb, side = "are" if best.name in PLURALS else "is", "above" if sign > 0 else "below"
    text = f"The winner by validation is not the best by test: {noun_of(best.name)} {verb}"
    return f"{text} {width_text(metric, gap)} {side}." if size else f"{text} {side} it."


def describe_missed_gain(board: Leaderboard, *, size: bool = True) -> str:
    """Where the winner does not beat the student alone, KD or the authors' values, and what to
    try; empty where it beats all.

    Args:
        size: also by how much and how sure that is, where the differences do not stand beside this.
    """
    gain, head = board.gain, name_missed(board.missed())
    if not head:
        return ""
    parts, tips = [], suggest_gain(board)
    if gain and gain.missed():
        verb = "are" if board[0].name in PLURALS else "is"
        if size:
            clauses = joined([_compare_with(name, gain) for name in gain.missed()])
        else:
            clauses = _group_missed(gain)
        parts.append(f"{noun_of(board[0].name)} {verb} {clauses}")
    unknown = [noun_of(name) for name in board.missed() if not gain or name not in gain.over]
    if unknown:
        parts.append(f"{joined(unknown)} failed, and so nothing is known of a gain")
    return f"{head}: {'; '.join(parts)}. {tips}".rstrip()


def _group_missed(gain: Gain) -> str:
    """`behind KD and not told apart from the student alone and the authors' values`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(gain.missed(), key=lambda name: gain.over[name].sign != -1):
        how = "behind" if gain.over[name].sign == -1 else "not told apart from"
        groups.setdefault(how, []).append(noun_of(name))
    return " and ".join(f"{how} {joined(names)}" for how, names in groups.items())


def _compare_with(name: str, gain: Gain) -> str:
    """How the winner stands to a row that it has no gain over, as a clause."""
    found, (scale, digits, unit) = gain.over[name], _scale_of(gain.metric)
    unit += metric_name(gain.metric)
    interval = _interval_text(found, gain.metric)
    sure = f"95 % interval {interval}, " if interval else ""
    sure = f"{sure}{several(found.n, 'seed')}"
    if found.sign == -1:
        shown = f"{abs(scale * found.mean):.{digits}f}"
        return f"behind {noun_of(name)} by {shown} {unit} ({sure})"
    shown = f"{scale * found.mean:+.{digits}f}"
    return f"not told apart from {noun_of(name)} ({shown} {unit}, {sure})"


def suggest_gain(board: Leaderboard) -> str:
    """Remedies to try where the winner does not beat a row; empty where it beats all."""
    gain = board.gain
    if gain is None:
        return ""
    missed = [gain.over[name] for name in gain.missed()]
    tips = []
    if any(found.n < LEAST_SEEDS for found in missed):
        tips.append(f"at least {LEAST_SEEDS} seeds (--seeds)")
    elif any(found.sign != -1 for found in missed):
        tips.append("more seeds (--seeds) or more images, which tell smaller differences")
    if STUDENT_ALONE in gain.missed():
        given = board.config.distill.teacher_weights is not None
        tips.append("a better teacher" + " (check --teacher-normalization)" * given)
    if missed:
        tips.append("more epochs and lower weights of the teacher's terms")
    return f"Try {'; '.join(tips)}." if tips else ""


def refuse_without_gain(board: Leaderboard) -> str:
    """Why `--require-gain` says no; empty where the gain over the student alone is settled."""
    gain = board.gain
    if gain is None or STUDENT_ALONE not in gain.over:
        row = next((row for row in board if row.name == STUDENT_ALONE), None)
        why = f": {row.failed}" if row and row.failed else "."
        return f"no gain shown: the student alone has no figures under the winner's seeds{why}"
    if gain.settled:
        return ""
    return f"no gain shown: the winner is {_compare_with(STUDENT_ALONE, gain)}."


def _scale_of(metric: str) -> tuple[int, int, str]:
    """The factor, the digits and the unit with which a difference of a metric is shown."""
    return (100, 2, "points of ") if is_share(metric) else (1, 4, "")


def _interval_text(found: Paired, metric: str) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{signed_text(metric, found.low)} to {signed_text(metric, found.high)}"


def percent(value: float | None) -> str:
    """A share: `78 %`."""
    return DASH if value is None else f"{100 * value:.0f} %"


def duration(hours: float) -> str:
    """Hours in words: `2.3 h`, `14 min`, `40 s`, `< 1 s`."""
    if hours >= 2:
        return f"{hours:.1f} h"
    if 0 < hours * 3600 < 1:
        return "< 1 s"
    return f"{hours * 60:.0f} min" if hours * 60 >= 2 else f"{hours * 3600:.0f} s"


def countdown(seconds: float) -> str:
    """Seconds in words: `2 h 5 min`, `3 min 10 s`, `12 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def value_text(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return DASH if value is None else str(value)


def describe_teacher(found: TeacherFigures) -> str:
    """The teacher's own figures in one sentence, without its warnings."""
    origin = "trained by the study"
    if not found.candidates:
        origin = "given; it may have been trained on these images"
    elif found.candidates > 1:
        origin = f"the best of {found.candidates} that the study trained"
    top1, balanced = (found.metrics.get(f"val_{name}", 0.0) for name in ("top1", "balanced_top1"))
    shown = ("top1", *(["balanced_top1"] if abs(top1 - balanced) > UNEVEN else []), "nll", "ece")
    figures = [
        f"{metric_name(name)} {figure_text(name, found.metrics.get(f'val_{name}'))}"
        for name in shown
    ]
    prior = "none" if found.log_prior is None else f"{found.log_prior:.4g}"
    return (
        f"Teacher {found.model} ({origin}) on {several(found.images, 'validation image')} without "
        f"augmentation: {', '.join(figures)}, learned log prior {prior}."
    )


def warn_of_teacher(found: TeacherFigures | None) -> list[str]:
    """A sentence for each reason why a teacher may not be what its user thinks, with the remedy."""
    return [f"The teacher: {warning}." for warning in (found.warnings if found else ())]
