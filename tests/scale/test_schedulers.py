"""Early stopping: against plain versions of the published rules, resumed anywhere, and its cost."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_runs import EPOCHS, study_of

from ekd_ray.config import DistillConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.schedule import settled_since
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.schedulers import ARRIVALS, Chance, bracket_of, make_scheduler, rung_score

CHANCE = Chance(classes=10, images=100)  # 0.1, and 0.09 more
RUNGS = (2, 4, 8)  # with these, means and quantiles of halves and quarters are exact


def tune_trial(number: int) -> Any:
    return SimpleNamespace(config={"run": {"number": number}})


def answer(scheduler: Any, number: int, epoch: int, value: float, metric: str = "val_top1") -> bool:
    """Whether the scheduler stops a trial after an epoch."""
    row = {"epoch": epoch, metric: value} | ({"val_top1": 0.5} if metric != "val_top1" else {})
    return scheduler.on_trial_result(None, tune_trial(number), row) == "STOP"


def stopped(scheduler: Any, curves: dict[int, list[float]]) -> dict[int, int]:
    """After which epoch each trial is stopped; one trial after the other."""
    found = {}
    for number, values in curves.items():
        for epoch, value in enumerate(values, start=1):
            if answer(scheduler, number, epoch, value):
                found[number] = epoch
                break
    return found


# Plain versions, which look at all that has come so far at every epoch


def textbook_halving(
    arrivals: list[tuple[int, int]], curves: dict[int, list[float]], brackets: int, factor: int
) -> dict[int, int]:
    """Successive halving (stopping), by the mean of all epochs; guessing is not compared."""
    at_rung, ended = defaultdict(list), {}
    for number, epoch in arrivals:
        bracket = bracket_of(number, len(RUNGS), brackets, factor)
        if number in ended or epoch not in RUNGS[bracket:]:
            continue
        score = float(np.mean(curves[number][:epoch]))
        if epoch != RUNGS[-1] and abs(score - 0.1) <= 3 * math.sqrt(0.1 * 0.9 / 100):
            continue
        others = at_rung[bracket, epoch]
        if others and score < np.percentile(others, 100 * (1 - 1 / factor)):
            ended[number] = epoch
        others.append(score)
    return ended


def textbook_median(
    arrivals: list[tuple[int, int]], curves: dict[int, list[float]], grace: int
) -> dict[int, int]:
    """The best value so far against the median of the others' running means."""
    reached, ended = defaultdict(int), {}
    for number, epoch in arrivals:
        if number in ended:
            continue
        reached[number] = epoch
        others = [n for n in reached if n != number and reached[n] >= epoch >= grace]
        means = [statistics.fmean(curves[n][grace - 1 : epoch]) for n in others]
        best = max(curves[number][:epoch])
        if epoch < EPOCHS and len(means) >= 3 and best < statistics.median(means):
            ended[number] = epoch
    return ended


@st.composite
def searches(draw: Any) -> tuple[dict[int, list[float]], list[tuple[int, int]]]:
    """Curves of up to 12 trials, and the order in which their epochs arrive."""
    value = st.integers(0, 32).map(lambda k: k / 32)
    count = draw(st.integers(1, 12))
    curves = {n: draw(st.lists(value, min_size=9, max_size=9)) for n in range(count)}
    turns = draw(st.permutations([n for n in curves for _ in range(EPOCHS)]))
    seen: Counter[int] = Counter()
    arrivals = []
    for number in turns:
        seen[number] += 1
        arrivals.append((number, seen[number]))
    return curves, arrivals


def constant_rate(**values: Any) -> Any:
    """Nothing settles before the end: the mean is over all epochs."""
    config = study_of("tpe", **values)
    return config.replace(distill=config.distill.replace(lr_milestones=()))


CASES = [("asha", 1, 2), ("asha", 1, 4), ("hyperband", 3, 2), ("hyperband", 3, 4), ("median", 1, 2)]


@pytest.mark.parametrize(("name", "brackets", "factor"), CASES)
@given(search=searches(), sign=st.sampled_from([1, -1]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_as_the_textbook_and_as_if_never_interrupted(
    name: str, brackets: int, factor: int, search: Any, sign: int, data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Killed after any arrivals: what lies on disk is all that the next scheduler knows."""
    curves, arrivals = search
    metric = "val_top1" if sign > 0 else "val_nll"
    config = constant_rate(
        scheduler=name, rungs=RUNGS, reduction_factor=factor, metric=metric, grace_epochs=2
    )
    if name == "median":
        expected = textbook_median(arrivals, curves, 2)
    else:
        expected = textbook_halving(arrivals, curves, brackets, factor) if sign > 0 else None
    log = tmp_path_factory.mktemp("study") / ARRIVALS
    kills = data.draw(st.sets(st.integers(0, len(arrivals)), max_size=3))
    uninterrupted = make_scheduler(config, chance=CHANCE)
    scheduler = make_scheduler(config, chance=CHANCE, log=log)
    ended: list[dict[int, int]] = [{}, {}]
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for index, (number, epoch) in enumerate(arrivals):
        value = sign * curves[number][epoch - 1]
        row = {"epoch": epoch, metric: value}
        if index in kills:
            records = [record(n, ended[0], found) for n, found in sorted(rows.items())]
            scheduler = make_scheduler(config, chance=CHANCE, records=records, log=log)
        for which, one in enumerate((scheduler, uninterrupted)):
            if number not in ended[which] and answer(one, number, epoch, value, metric):
                ended[which][number] = epoch
        if ended[0].get(number, epoch) >= epoch:
            rows[number].append({"val_top1": 0.5} | row)
    assert ended[0] == ended[1]
    assert expected is None or ended[0] == expected


def record(number: int, ended: dict[int, int], history: list[dict[str, Any]]) -> RunRecord:
    status = "pruned" if number in ended else "running"
    if history and history[-1]["epoch"] == EPOCHS:
        status = "complete"
    return RunRecord(
        folder=Path(), stage=RunStage.SEARCH, name="", number=number, history=history, status=status
    )


# What a kill can leave

CURVES = {n: [n / 10 + e / 100 for e in range(EPOCHS)] for n in (5, 6, 7, 8)}


def rows_of(values: list[float]) -> list[dict[str, Any]]:
    return [{"epoch": e, "val_top1": v} for e, v in enumerate(values, start=1)]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_study_without_the_order_is_compared_in_that_of_its_numbers(
    name: str, tmp_path: Path
) -> None:
    config = study_of("tpe", scheduler=name)
    done = [record(n, {}, rows_of(values)) for n, values in CURVES.items()]
    scheduler = make_scheduler(config, records=done, log=tmp_path / ARRIVALS)
    assert stopped(scheduler, {1: [0.1] * EPOCHS, 9: [0.9] * EPOCHS}) == {1: 1}


def test_a_trial_that_came_to_a_rung_and_was_killed_unheard_is_stopped_on_resume(
    tmp_path: Path,
) -> None:
    """Its epoch is in its history, but the driver died before it looked at it."""
    good, bad = record(0, {}, rows_of([0.9] * EPOCHS)), record(1, {}, rows_of([0.1]))
    config = study_of("tpe", rungs=[1, 7])
    scheduler = make_scheduler(config, records=[good, bad], log=tmp_path / ARRIVALS)
    assert scheduler.stopped == {1}
    assert answer(scheduler, 1, 2, 0.9), "whatever it reports later"


def test_epochs_that_come_again_count_once(tmp_path: Path) -> None:
    """A process died, and its trial goes on from a checkpoint before the rung."""
    config = study_of("tpe", rungs=[2], reduction_factor=3)
    scheduler = make_scheduler(config, log=tmp_path / ARRIVALS)
    for number, value in ((0, 0.5), (1, 0.6), (0, 0.5)):
        answer(scheduler, number, 1, value)
        answer(scheduler, number, 2, value)
    lines = (tmp_path / ARRIVALS).read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == [0, 1]


def test_a_number_that_is_given_again_does_not_inherit_a_score(tmp_path: Path) -> None:
    """Its first trial was lost with the driver's disk; a torn line is left out."""
    log = tmp_path / ARRIVALS
    line = json.dumps({"trial": 0, "epoch": 1, "score": 0.9, "stopped": False})
    log.write_text(f"{line}\n{line[:9]}")
    make_scheduler(study_of("tpe", rungs=[1]), log=log)
    assert log.read_text() == ""


def test_the_median_rule_stops_nothing_that_is_at_its_end() -> None:
    config = study_of("tpe", scheduler="median", grace_epochs=EPOCHS)
    assert stopped(make_scheduler(config), {**CURVES, 9: [0.1] * EPOCHS}) == {}


# The rungs


def of_schedule(scheduler: str, epochs: int, schedule: str) -> Any:
    config = study_of("tpe", scheduler=scheduler, grace_epochs=1, reduction_factor=3)
    return config.replace(distill=config.distill.replace(epochs=epochs, schedule=schedule))


# (epochs, schedule, the rungs below full length): a stepped rate falls after 5 / 8 of the epochs.
LADDERS = [
    (9, "step", [1, 7]),
    (240, "step", [1, 151]),
    (9, "cosine", [1, 3]),
    (27, "cosine", [1, 3, 9]),
]


@pytest.mark.parametrize(("epochs", "schedule", "rungs"), LADDERS)
def test_trials_are_still_compared_at_the_last_rung_below_full_length(
    epochs: int, schedule: str, rungs: list[int]
) -> None:
    """docs/search.md: all but the best are stopped *at each rung*; nowhere else is anything."""
    last, good = rungs[-1], [0.5] * epochs
    worse_late = [0.6] * (last - 1) + [0.0] * (epochs - last + 1)
    config = of_schedule("asha", epochs, schedule).replace(rung_score="last")
    assert stopped(make_scheduler(config), {0: good, 1: worse_late}) == {1: last}
    after = [0.6] * last + [0.0] * (epochs - last)
    assert not stopped(make_scheduler(config), {0: good, 1: after})


@pytest.mark.parametrize(("epochs", "schedule", "rungs"), LADDERS)
def test_brackets_of_hyperband_begin_at_later_and_later_rungs(
    epochs: int, schedule: str, rungs: list[int]
) -> None:
    """A trial that is bad from the beginning is stopped at the first rung of its bracket."""
    scheduler = make_scheduler(of_schedule("hyperband", epochs, schedule))
    assert not stopped(scheduler, {n: [0.9] * epochs for n in range(20)})
    found = stopped(scheduler, {n: [0.1] * epochs for n in range(20, 40)})
    assert len(found) == 20, "none begins at full length, where every trial is over anyway"
    assert sorted(set(found.values())) == rungs


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_hyperband_gives_each_bracket_its_share(factor: int) -> None:
    """Algorithm 1 of Hyperband: with 81 units and a factor of 3, 81, 34, 15, 8, 5 trials."""
    counts = Counter(bracket_of(number, 4, 3, factor) for number in range(1000))
    begun = [math.ceil(5 / (s + 1) * factor**s) for s in (4, 3, 2)]
    if factor == 3:
        assert begun == [81, 34, 15]
    for bracket, count in enumerate(begun):
        assert counts[bracket] / 1000 == pytest.approx(count / sum(begun), abs=0.02)


def test_asha_compares_at_its_rungs_and_nowhere_else() -> None:
    """Four trials that are equally good until they differ; the rungs are no geometric series."""
    config = study_of("tpe", rungs=[2, 7], rung_score="last")
    late = [0.5, 0.5, *[0.4] * 4, 0.3, 0.9, 0.9]  # worse at 7
    early = [0.9, 0.3, *[0.9] * 7]  # worse at 2
    middle = [0.5, 0.6, 0.1, 0.1, 0.1, 0.1, 0.6, 0.1, 0.6]  # worse at others
    curves = {0: [0.5] * EPOCHS, 1: late, 2: early, 3: middle}
    assert stopped(make_scheduler(config), curves) == {1: 7, 2: 2}


@pytest.mark.parametrize(("score", "better"), [("mean", 0), ("last", 1)])
def test_rungs_compare_the_mean_of_the_epochs_or_the_last(score: str, better: int) -> None:
    """At the rung one is better in the mean, the other in its last epoch."""
    config = study_of("tpe", rungs=[3], rung_score=score)
    curves = {0: [0.9, 0.5, 0.5], 1: [0.5, 0.5, 0.6]}
    for order in ((0, 1), (1, 0)):
        found = stopped(make_scheduler(config), {n: curves[n] for n in order})
        assert (order[1] in found) == (order[1] != better)


def test_the_mean_begins_where_the_rate_fell() -> None:
    distill = DistillConfig(epochs=8, schedule="step", lr_milestones=(0.5,))
    rows = {row["epoch"]: row for row in rows_of([0.1, 0.1, 0.1, 0.1, 0.6, 0.8])}
    assert settled_since(distill, 6) == 5
    assert rung_score(rows, "val_top1", 6, distill, mean=True) == pytest.approx(0.7)


# Chance


def test_a_trial_that_guesses_is_compared_at_the_last_rung_only() -> None:
    """It neither stops others before that nor is stopped; 0.19 is chance, 0.2 is not."""
    config = study_of("tpe", rungs=[1, 2, 3], rung_score="last", reduction_factor=2)
    guess = [0.19, 0.05, 0.19, *[0.9] * 6]
    curves = {0: [0.9] * EPOCHS, 1: guess, 2: [0.2] * EPOCHS}
    assert stopped(make_scheduler(config, chance=CHANCE), curves) == {1: 3, 2: 1}
    assert stopped(make_scheduler(config), curves) == {1: 1, 2: 1}


@pytest.mark.parametrize(("first", "second", "stops"), [(0.5, 0.5, True), (0.15, 0.5, False),
                                                        (0.5, 0.15, False)])  # fmt: skip
def test_chance_is_looked_at_in_the_accuracy_whatever_the_metric(
    first: float, second: float, stops: bool
) -> None:
    """The second has the worse likelihood; one that guesses neither stops it nor is stopped."""
    config = study_of("tpe", rungs=[1, 2], metric="val_nll", rung_score="last")
    scheduler = make_scheduler(config, chance=CHANCE)
    rows = [{"epoch": 1, "val_nll": 1.0, "val_top1": first},
            {"epoch": 1, "val_nll": 2.3, "val_top1": second}]  # fmt: skip
    answers = [scheduler.on_trial_result(None, tune_trial(n), row) for n, row in enumerate(rows)]
    assert answers == ["CONTINUE", "STOP" if stops else "CONTINUE"]


@pytest.mark.parametrize(
    ("classes", "images", "accuracy", "expected"),
    [(10, 1000, 0.128, True), (10, 1000, 0.129, False), (100, 5000, 0.0142, True),
     (100, 5000, 0.0143, False), (10, 1000, 0.07, False)],
)  # fmt: skip
def test_three_standard_errors(classes: int, images: int, accuracy: float, expected: bool) -> None:
    assert Chance(classes=classes, images=images).explains(accuracy) == expected


def test_chance_is_that_of_the_validation_split() -> None:
    base = DistillConfig(dataset="digits", train_subset=560, validation_fraction=0.25)
    assert Chance.of_study(base, None) == Chance(classes=10, images=140)


# Cost


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_comparison_looks_at_few_scores_however_many_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that are compared or read for one answer, by the number of trials before."""
    looked = 0

    class Scores(list[float]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            nonlocal looked
            looked += len(self)
            return super().__iter__()

    config = study_of("tpe", scheduler=name, rungs=[1, 2], grace_epochs=1)
    worst = {}
    rng = np.random.default_rng(0)
    for trials in (100, 1_000, 10_000):
        scheduler: Any = make_scheduler(config, chance=CHANCE)
        monkeypatch.setattr(scheduler, "_scores", defaultdict(Scores))
        worst[trials] = 0
        for number in range(trials):
            looked = 0
            answer(scheduler, number, 1, rng.random())
            worst[trials] = max(worst[trials], looked)
        assert sum(map(len, scheduler._scores.values())) > 0.4 * trials
    assert worst[10_000] <= worst[100] + 8
