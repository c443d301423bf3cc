"""The race over all pairs: nothing leaks, and its figures are what they say."""

import argparse
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import search_race, tables
from benchmarks.curves import EPOCHS, points, recorded_study
from benchmarks.landscape import Noise, Recorded
from benchmarks.search_race import check_flags, entrants, interval, measure, summarize
from benchmarks.simulate import (
    CONTESTANTS,
    SEEDS_OF_A_SEARCH,
    Contestant,
    Outcome,
    confirm_points,
    play,
    with_priors,
)
from benchmarks.simulate import race as race_of_simulate
from benchmarks.tables import TABLES, open_target, reverse_source, show_source
from ekd_ray.scale.space import Space

SPACE = Space(recorded_study().space)


# What a search may know


@pytest.mark.parametrize("name", TABLES)
def test_no_source_shows_a_configuration_that_the_target_is_fitted_to(name):
    target = open_target(name)
    shown = {row.number for source in target.sources for row in source.rows}
    assert shown and target.fitted and not shown & target.fitted
    # By their values too, whatever their numbers say.
    fitted = {tuple(SPACE.searched_part(p).values()) for p in target.landscape.recorded}
    assert len(fitted) == len(target.fitted)
    assert not fitted & {tuple(r.point.values()) for s in target.sources for r in s.rows}
    assert TABLES[name].pair not in {TABLES[source.name].pair for source in target.sources}
    assert len(target.fitted) >= 24 and all(len(s.rows) >= 8 for s in target.sources)


def test_what_is_left_out_of_a_fit_changes_nothing_of_the_landscape(monkeypatch):
    """The scores of what sources show are drawn anew: the target's landscape stays."""
    name = "resnet56a-resnet14"
    before = open_target(name)
    read = tables.Table.read

    def read_shuffled(table):
        recorded = read(table)
        if table is TABLES[name]:
            shown = {row.number for source in before.sources for row in source.rows}
            for number in shown & recorded.keys():
                curves = {s: 1 - c for s, c in recorded[number].curves.items()}
                recorded[number] = replace(recorded[number], curves=curves)
        return recorded

    monkeypatch.setattr(tables.Table, "read", read_shuffled)
    after = open_target.__wrapped__(name)
    point = points(3, seed=4)[2]
    assert before.landscape.curve(point) == after.landscape.curve(point)
    assert before.landscape.best == after.landscape.best


def test_a_reversed_source_says_the_opposite():
    recorded = {
        n: Recorded(point=p, curves={0: np.linspace(0, n, EPOCHS)}) for n, p in enumerate(points(5))
    }
    source = show_source("a", recorded, SPACE, frozenset({3}))
    assert [row.number for row in source.rows] == [0, 1, 2, 4]
    turned = {row.number: row.scores[-1] for row in reverse_source(source).rows}
    assert turned == {0: 4, 1: 2, 2: 1, 4: 0}


def test_only_what_transfers_is_told_of_other_pairs(monkeypatch):
    given = {}

    def spy(name):
        def player(game):
            given[name] = [row.scores[-1] for s in game.sources for row in s.rows]
            return Silent()

        return player

    target = open_target("resnet56a-resnet14")
    base = recorded_study().replace(champions=[], first_points=[])
    for name, options in {
        "cold": {}, "warm": {"transfer": True},
        "misled": {"transfer": True, "reversed_prior": True},
    }.items():  # fmt: skip
        contestant = Contestant(player=spy(name), settings={"scheduler": "none"}, **options)
        race(target, contestant, base)
    assert given["cold"] == [] and sorted(given["warm"]) == sorted(given["misled"])
    assert given["warm"] != given["misled"]


class Silent:
    """Proposes two points."""

    left = 2

    def ask(self, trial_id):
        self.left -= 1
        return points(3)[self.left + 1] if self.left >= 0 else None

    def tell(self, trial_id, row, *, last):
        return None


def race(target, contestant, base):
    return race_of_simulate(target, contestant, base, seed=3, budget=4)


# Confirm


class Known:
    """A landscape of three points whose noise is what the seed says."""

    epochs, space = EPOCHS, SPACE

    def __init__(self):
        self.asked = []
        self.points = points(4, seed=1)[1:]

    def curve(self, point, seed=0):
        self.asked.append(seed)
        true = 0.1 * self.points.index(point)
        return [true + 0.001 * (seed % 7)] * EPOCHS, true


def test_finalists_run_under_fresh_seeds_and_every_epoch_counts():
    known, config = Known(), recorded_study().replace(seed=5, confirm_seeds=2)
    finalists = {f"trial {n}": point for n, point in enumerate(known.points)}
    winner, spent = confirm_points(known, config, {}, finalists, 1000)
    assert winner == known.points[2] and spent == 3 * 2 * EPOCHS
    first = 5 * SEEDS_OF_A_SEARCH  # what the search has seen
    assert sorted(known.asked) == [first + 1] * 3 + [first + 2] * 3


def test_the_confirm_stage_keeps_to_its_budget():
    known, config = Known(), recorded_study().replace(confirm_seeds=3)
    finalists = {f"trial {n}": point for n, point in enumerate(known.points)}
    assert confirm_points(known, config, {}, finalists, 5 * EPOCHS)[1] == 3 * EPOCHS
    winner, spent = confirm_points(known, config, {}, finalists, EPOCHS)
    assert (winner, spent) == (known.points[0], 0)  # the search's own choice


# Trials that wait


class Pauses:
    """Stops its first trial after two epochs and goes on with it when nothing else is left."""

    def __init__(self):
        self.told, self.proposes = [], [points(2)[1], None, None, None, 0]

    def ask(self, trial_id):
        return self.proposes.pop(0) if self.proposes else None

    def tell(self, trial_id, row, *, last):
        self.told.append((trial_id, row["epoch"]))
        return row["epoch"] == 2


def test_a_trial_that_waits_goes_on_where_it_was():
    from ray.tune.schedulers import FIFOScheduler

    player = Pauses()
    target = open_target("resnet56a-resnet14").landscape
    done = list(play(target, player, FIFOScheduler(), np.random.default_rng(0)))
    assert player.told == [("t0", epoch) for epoch in range(1, EPOCHS + 1)]
    assert [e.epoch for e in done if e.last] == [2, EPOCHS]


# Figures


def outcome(end, confirmed, drop):
    """A regret of `end` in points from epoch `drop` on."""
    regret = [9.0 / 100] * (drop - 1) + [end / 100] * (10 - drop + 1)
    return Outcome(
        regret=regret, oracle=regret, confirmed=confirmed / 100, searched=6, confirming=4
    )


def test_figures_are_means_over_tables_and_their_differences_are_paired():
    def both(*ends, drop=3):
        return {t: [outcome(end + 0.5 * n, end / 2, drop + 2 * n) for end in ends]
                for n, t in enumerate("ab")}  # fmt: skip

    found = {
        search_race.REFERENCE: both(2.0, 4.0),
        search_race.COLD: both(1.0, 3.0, drop=2),
        search_race.TRANSFER: both(1.0, 2.0, drop=1),
        search_race.REVERSED: both(8.0, 8.0),
        "x": both(5.0, 5.0),
        "y": both(1.5, 3.5),
    }
    result = summarize(found, {name: name in "xy" for name in found})
    assert result["figures"] == pytest.approx({
        "epochs_to_random/transfer": 2.0, "epochs_to_random/cold": 3.0,
        "epochs_to_random/reversed": 10.0,  # never: all that there were
        "regret_300/confirmed": 1.0, "regret_300/reversed": 8.25,
        "best_opponent/paired_difference": 1.0,
        "best_opponent/paired_difference/low": 0.5, "best_opponent/paired_difference/high": 1.5,
    })  # fmt: skip
    assert result["best_opponent"] == "y"
    assert result["by_table"]["epochs_to_random/cold"] == {"a": 2, "b": 4}
    assert result["regret"]["x"]["mean"][-1] == pytest.approx(5.25)


def test_what_did_not_race_has_no_figure():
    found = {search_race.REFERENCE: {"a": [outcome(1, 1, 2)]}}
    figures = summarize(found, {search_race.REFERENCE: False})["figures"]
    assert len(figures) == 8 and set(figures.values()) == {None}


def test_an_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0, 1, 400)
    low, high = interval(400, lambda of: values[of][None].mean(axis=1))
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def arguments(**given):
    values = {
        "seeds": 1, "first_seed": 1000, "budget": 12, "opponents": "none",
        "tables": "resnet56a-resnet14", "only": None, "keep": None,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **given})


def refuse(text):
    raise ValueError(text)


def test_who_races_and_what_is_refused():
    args = arguments(only="default,default+reversed")
    check_flags(args, refuse)
    assert {*entrants(args)} == {search_race.REFERENCE, "default", "default+reversed"}
    for wrong in ({"only": "nobody"}, {"tables": "x"}, {"opponents": "y"}, {"seeds": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_flags(arguments(**wrong), refuse)
    args = arguments()
    check_flags(args, refuse)
    assert entrants(args) == CONTESTANTS


def test_what_was_raced_is_kept_and_not_raced_again(monkeypatch, tmp_path):
    monkeypatch.setattr(search_race.multiprocessing, "get_context", lambda kind: InProcess())
    args = arguments(only="random", budget=6, seeds=2, keep=tmp_path / "kept.jsonl")
    check_flags(args, refuse)
    first = measure(args, str)
    text = args.keep.read_text()
    args.keep.write_text(text[:-9])  # a kill cut off the second
    asked = []

    def spy(*given, seed, budget):
        asked.append(seed)
        return race_of_simulate(*given, seed=seed, budget=budget)

    monkeypatch.setattr(search_race, "race", spy)
    assert measure(args, str)["figures"] == first["figures"]
    assert asked == [1001] and args.keep.read_text().count("\n") == 2


def test_a_race_runs_and_an_opponent_that_is_missing_says_so(monkeypatch):
    lacking = Contestant(rival=True, package="no_such_package")
    monkeypatch.setattr(search_race, "entrants", lambda args: {
        search_race.REFERENCE: CONTESTANTS[search_race.REFERENCE], "missing": lacking
    })  # fmt: skip
    args = arguments()
    check_flags(args, refuse)
    monkeypatch.setattr(search_race.multiprocessing, "get_context", lambda kind: InProcess())
    said = []
    result = measure(args, said.append)
    assert "no_such_package" in result["not_run"]["missing"]
    assert any("missing" in line and "not run" in line for line in said)
    curve = result["tables"]["resnet56a-resnet14"][search_race.REFERENCE]["regret"]["mean"]
    assert len(curve) == 12 and result["landscapes"]["resnet56a-resnet14"]["fitted"] == 24


class InProcess:
    """A pool of this process alone."""

    def Pool(self, count):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def imap(self, function, jobs):
        return map(function, jobs)


def test_noise_is_borrowed_from_runs_at_the_same_level():
    levels = np.linspace(0, 1, 50)
    noise = Noise(levels=levels, deviations=np.repeat(levels[:, None, None], 2, axis=1))
    assert all(abs(noise.draw(0.5, key)[0] - 0.5) < 0.2 for key in range(100))
    assert len({float(noise.draw(0.5, key)[0]) for key in range(100)}) == 16


def test_users_are_told_the_best_place_or_the_worst():
    landscape = open_target("resnet20a-resnet8").landscape
    best, worst = landscape.extreme_points()
    drawn = [landscape.curve(point)[1] for point in landscape.space.sample(200, seed=0)]
    assert landscape.curve(best)[1] == pytest.approx(landscape.best)
    assert landscape.best >= max(drawn)
    assert landscape.curve(worst)[1] <= min(drawn) + 0.005  # beside an edge of a tree
    told = with_priors(recorded_study(), worst)
    centers = {name: p.prior.value for name, p in Space(told.space).parameters.items()}
    assert centers == worst
