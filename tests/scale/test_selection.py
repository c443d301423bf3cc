"""Who is given how many fresh seeds, on made-up scores."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.results.leaderboard import Row, find_lead, rank_contenders
from ekd_ray.results.paired import clearly_worse
from ekd_ray.scale.selection import wanted_seeds

CONFIG = DistillConfig(method="none")
CHAMPIONS = ("authors' values", "defaults")


def play(scores, **config):
    """The rows at the end and the number of rounds; `scores`: by name, None for a failure."""
    study = StudyConfig(distill=CONFIG, **config)
    rows = [
        Row(name=n, config=CONFIG, entered_as="champion" if n in CHAMPIONS else "finalist")
        for n in scores
    ]
    rounds = 0
    while wanted := wanted_seeds(rows, study):
        rounds += 1
        for index, row in enumerate(rows):
            if row.name in wanted:
                assert wanted[row.name] > len(row.val), "a round without a run"
                values = scores[row.name][: wanted[row.name]]
                failed = "diverged" if None in values else None
                rows[index] = replace(row, failed=failed, val=() if failed else tuple(values))
    return rows, study, rounds


def given_seeds(scores, **config):
    rows, _, rounds = play(scores, **config)
    return {row.name: len(row.val) for row in rows}, rounds


SEED_EFFECTS = [0.05 * seed + 0.004 * (seed * 5 % 3) for seed in range(10)]


def curve(quality, offset=0):
    """A score under each seed: what a seed does to all, and a little of its own."""
    return [
        quality + effect + 0.002 * ((offset * 7 + seed * 5) % 3)
        for seed, effect in enumerate(SEED_EFFECTS)
    ]


VALUES = st.floats(0, 1).map(lambda x: round(x, 2))
SCORES = st.lists(st.lists(st.one_of(VALUES, VALUES, VALUES, st.none()) | VALUES,
                           min_size=10, max_size=10), min_size=1, max_size=6)  # fmt: skip


@settings(deadline=None)
@given(SCORES, st.sampled_from([1, 2, 3, 5, "auto"]), st.booleans(),
       st.sampled_from(["val_top1", "val_nll"]))  # fmt: skip
def test_a_winner_is_never_worse_than_a_champion_in_the_race(curves, seeds, elimination, metric):
    names = [*CHAMPIONS, *(f"trial {n}" for n in range(4))]
    rows, study, _ = play(
        dict(zip(names, curves, strict=False)),
        confirm_seeds=seeds, confirm_elimination=elimination, metric=metric,
    )  # fmt: skip
    standing = [row for row in rows if not row.failed]
    ranked = rank_contenders(rows, study)
    assert bool(ranked) == bool(standing)
    if not ranked:
        return
    winner, sign = ranked[0], 1 if metric == "val_top1" else -1
    for row in standing:
        count = len(row.val)
        rivals = [r for r in standing if len(r.val) >= count]
        values = {r.name: [sign * value for value in r.val[:count]] for r in rivals}
        assert count == len(winner.val) or row.name in clearly_worse(values)
        if count == len(winner.val):
            assert sign * sum(winner.val) >= sign * sum(row.val) - 1e-9
    count = len(winner.val)
    assert count == seeds if seeds != "auto" else 2 <= count <= study.confirm_seeds_cap


def test_who_is_clearly_worse_is_given_no_further_seeds_be_it_a_champion():
    scores = {
        "authors' values": curve(0.40, 1), "trial 0": curve(0.60, 2), "trial 1": curve(0.61),
        "trial 2": curve(0.40, 3), "trial 3": curve(0.61, 4),
    }  # fmt: skip
    found, rounds = given_seeds(scores, confirm_seeds=5)
    assert found["trial 2"] == found["authors' values"] == 2 and found["trial 1"] == 5
    assert rounds == 4
    found, rounds = given_seeds(scores, confirm_seeds=5, confirm_elimination=False)
    assert set(found.values()) == {5} and rounds == 2


def test_the_winner_has_all_seeds_where_all_others_are_clearly_worse():
    scores = {"trial 0": curve(0.3, 1), "trial 1": curve(0.9, 2), "trial 2": curve(0.4, 3)}
    assert given_seeds(scores, confirm_seeds=4)[0] == {"trial 0": 2, "trial 1": 4, "trial 2": 2}
    found = given_seeds(scores, confirm_seeds=4, metric="val_nll")[0]
    assert found == {"trial 0": 4, "trial 1": 2, "trial 2": 2}, "of a loss the highest is out"


@pytest.mark.parametrize("bound", [{"objectives": ["val_nll"]}, {"constraints": ["val_ece<=9"]}])
def test_all_have_all_seeds_where_one_metric_does_not_decide(bound):
    scores = {"trial 0": curve(0.3), "trial 1": curve(0.9), "trial 2": curve(0.4)}
    assert set(given_seeds(scores, confirm_seeds=4, **bound)[0].values()) == {4}


# confirm_seeds: auto


def test_auto_stops_once_the_two_best_are_told_apart():
    """The third seed settles a gap of 0.1 in noise of 0.002, that of the first two does not."""
    scores = {"authors' values": curve(0.6, 1), "trial 1": curve(0.7, 2)}
    rows, study, _ = play(scores, confirm_seeds="auto")
    assert [len(row.val) for row in rows] == [3, 3]
    lead = find_lead(rows, study)
    assert (lead.over, lead.settled) == ("authors' values", True)


def test_auto_stops_at_the_cap_where_nothing_is_told_apart():
    same = [0.5, 0.6, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6, 0.5, 0.6]
    scores = {"authors' values": same, "trial 1": [*reversed(same)]}
    for cap in (2, 4, 10):
        rows, study, _ = play(scores, confirm_seeds="auto", confirm_seeds_cap=cap)
        assert [len(row.val) for row in rows] == [cap, cap]
        assert not find_lead(rows, study).settled


def test_auto_gives_further_seeds_to_all_that_can_still_win():
    noisy = [0.60, 0.70, 0.61, 0.69, 0.62, 0.68, 0.63, 0.67, 0.64, 0.66]
    scores = {"defaults": curve(0.1, 3), "trial 0": noisy, "trial 1": [*noisy[1:], 0.5],
              "trial 2": curve(0.2, 1)}  # fmt: skip
    found, _ = given_seeds(scores, confirm_seeds="auto", confirm_seeds_cap=6)
    assert found == {"defaults": 2, "trial 0": 6, "trial 1": 6, "trial 2": 2}


def test_a_single_entry_needs_no_more_than_two():
    assert given_seeds({"trial 0": curve(0.5)}, confirm_seeds="auto")[0] == {"trial 0": 2}


def test_what_keeps_the_constraints_less_is_no_rival():
    """However close its metric is to the winner's."""
    study = StudyConfig(distill=CONFIG, constraints=["val_ece<=0.1"])
    rows = [
        Row(name=name, config=CONFIG, val=(0.5, 0.6, 0.5), val_metrics=({"val_ece": ece},) * 3)
        for name, ece in (("trial 0", 0.05), ("trial 1", 0.2))
    ]
    assert find_lead(rows, study) is None
    assert find_lead(rows, study.replace(constraints=[])).over == "trial 1"
