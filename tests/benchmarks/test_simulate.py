"""The simulated race: its landscape, its clock, its arithmetic."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.tune.schedulers import FIFOScheduler

from benchmarks.curves import EPOCHS, _known, points, recorded_study, runs
from benchmarks.landscape import METRIC, Landscape, read_recorded, unit_coordinates
from benchmarks.search_race import _spread, epochs_to_reach
from benchmarks.simulate import Ledger, bring_best_points, follow, play, rank_by_score
from benchmarks.tables import Source, SourceRow
from benchmarks.transfer import left_out
from ekd_ray.scale.space import Space


def value(point, epoch):
    """A smooth truth: best at kd_weight 2, ekd_weight 1."""
    final = 0.5 - 0.03 * (np.log(point["kd_weight"] / 2) ** 2 + np.log(point["ekd_weight"]) ** 2)
    return final * (1 - np.exp(-epoch / 3))


@pytest.fixture(scope="module")
def landscape(tmp_path_factory):
    path = tmp_path_factory.mktemp("curves") / "table.parquet"
    rows = [
        {"number": number, **point, "epoch": epoch, METRIC: value(point, epoch)}
        for number, point in enumerate(points(120))
        for epoch in range(1, EPOCHS + 1)
        if not (number == 7 and epoch > 2)  # diverged
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return open_landscape(path)


def open_landscape(path):
    return Landscape(read_recorded(path), Space(recorded_study().space))


def test_the_landscape_is_near_the_truth(landscape):
    assert landscape.explained > 0.6
    truth = [value(point, EPOCHS) for point in landscape.recorded]
    guessed = [landscape.curve(point)[1] for point in landscape.recorded]
    assert np.corrcoef(truth, guessed)[0, 1] > 0.9
    assert 0.45 < landscape.best < 0.5


def test_a_configuration_has_one_curve(landscape):
    point, other = points(3, seed=9)[1:]
    assert landscape.curve(point) == landscape.curve(dict(point))
    assert landscape.curve(point) != landscape.curve(other)
    curve, true = landscape.curve(point)
    assert len(curve) == EPOCHS and curve[-1] != true


def test_the_noise_of_a_configuration_is_another_for_every_seed(landscape):
    point = points(2, seed=9)[1]
    drawn = [landscape.curve(point, seed) for seed in range(40)]
    assert landscape.curve(point) == drawn[0] and landscape.curve(point, 7) == drawn[7]
    assert len({true for _, true in drawn}) == 1
    assert len({tuple(curve) for curve, _ in drawn}) > 8  # of sixteen there are


def test_the_noise_is_that_of_runs_that_do_about_as_well(tmp_path):
    """Good configurations are exact and bad ones off by .1: a good one must not be."""
    rng = np.random.default_rng(0)
    rows = []
    for number, point in enumerate(points(150)):
        fails = point["ekd_weight"] > 1.0
        final = 0.2 + 0.1 * rng.choice([-1, 1]) if fails else 0.5
        rows += [
            {"number": number, **point, "epoch": epoch, METRIC: final}
            for epoch in range(1, EPOCHS + 1)
        ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    found = open_landscape(tmp_path / "table.parquet")
    good = [p for p in points(200, seed=5) if p["ekd_weight"] < 0.4]
    off = [abs(curve[-1] - true) for curve, true in map(found.curve, good)]
    assert np.mean(off) < 0.03


class Fixed:
    """Proposes given points and notes what it is told."""

    def __init__(self, given):
        self.given, self.told = list(given), []

    def ask(self, trial_id):
        return self.given.pop(0) if self.given else None

    def tell(self, trial_id, row, *, last):
        self.told.append((trial_id, row["epoch"], last))


def test_four_workers_train_side_by_side_and_the_best_is_held(landscape):
    given = landscape.recorded[:6]
    player = Fixed(given)
    budget = 6 * EPOCHS
    epochs = play(landscape, player, FIFOScheduler(), np.random.default_rng(0))
    config = recorded_study().replace(champions=[])
    ledger = Ledger(lambda trials: rank_by_score(trials, config, ()))
    outcome = follow(epochs, ledger, landscape, config, budget)
    assert len(outcome.regret) == len(player.told) == budget
    for trial in range(6):
        own = [(epoch, last) for name, epoch, last in player.told if name == f"t{trial}"]
        assert own == [(epoch, epoch == EPOCHS) for epoch in range(1, EPOCHS + 1)]
    first_epochs = {name for name, *_ in player.told[:4]}
    assert first_epochs == {"t0", "t1", "t2", "t3"}
    ended = [name for name, _, last in player.told if last]
    assert set(ended[:4]) == first_epochs
    seen = [landscape.curve(point) for point in given]
    best = max(seen, key=lambda item: item[0][-1])
    assert outcome.regret[-1] == pytest.approx(landscape.best - best[1])
    assert outcome.oracle[-1] == pytest.approx(landscape.best - max(true for _, true in seen))
    assert all(a >= b for a, b in zip(outcome.regret, outcome.oracle, strict=True))


class StopsAtThree(FIFOScheduler):
    def on_trial_result(self, controller, trial, result):
        return "STOP" if result["epoch"] == 3 else "CONTINUE"


def test_a_stopped_trial_frees_its_worker(landscape):
    player = Fixed(landscape.recorded[:9])
    list(play(landscape, player, StopsAtThree(), np.random.default_rng(0)))
    assert len(player.told) == 27 and not player.given
    assert {epoch for _, epoch, last in player.told if last} == {3}


@pytest.mark.parametrize(
    ("mean", "regret", "expected"),
    [([3, 2, 1], 2, 2), ([3, 1, 2, 1], 1.5, 4), ([1, 1], 2, 1), ([3, 3], 1, None)],
)
def test_when_a_regret_is_reached_for_good(mean, regret, expected):
    assert epochs_to_reach(mean, regret) == expected


def test_the_interval_is_over_seeds():
    found = _spread(np.array([[0.0, 1.0], [0.0, 3.0]]))
    assert found["mean"] == [0.0, 2.0]
    assert found["low"] == [0.0, 1.0]
    assert found["high"] == [0.0, 3.0]


# Recording


def test_the_first_configurations_are_trained_under_all_seeds():
    wanted = runs(4, 2, 3)
    assert sorted(wanted) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]
    assert wanted[:4] == [(0, 1), (0, 2), (1, 1), (1, 2)]  # they come first


def test_a_recording_knows_what_all_of_its_parts_have_trained(tmp_path):
    def line(number, seed):
        return json.dumps({"number": number, "seed": seed, "curve": []}) + "\n"

    (tmp_path / "a.1-2.jsonl").write_text(line(0, 0) + line(2, 0))
    (tmp_path / "a.2-2.jsonl").write_text(line(1, 1) + line(3, 0)[:9])  # killed
    (tmp_path / "b.1-1.jsonl").write_text(line(7, 0))
    assert sorted(_known(tmp_path / "a.parquet")) == [(0, 0), (1, 1), (2, 0)]


# What seeds do


def test_noise_is_what_a_seed_does_to_one_configuration_and_not_to_all(tmp_path):
    """A seed adds a constant to all, and a normal draw of a known spread to each."""
    rng = np.random.default_rng(0)
    rows = []
    for number, point in enumerate(points(200)):
        for seed in range(3 if number < 60 else 1):
            noise = rng.normal(0, 0.02) + 0.1 * seed
            rows += [
                {"number": number, "seed": seed, **point, "epoch": epoch,
                 METRIC: value(point, epoch) + noise}
                for epoch in range(1, EPOCHS + 1)
            ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    found = open_landscape(tmp_path / "table.parquet")
    assert found.noise == pytest.approx(0.02, rel=0.15)
    drawn = [found.curve(point) for point in points(300, seed=8)]
    off = [curve[-1] - true for curve, true in drawn]
    assert np.std(off) == pytest.approx(0.02, rel=0.2)
    # All are brought to the mean of the seeds, whichever they were trained under.
    truth = np.array([value(point, EPOCHS) for point in found.recorded])
    guessed = np.array([found.curve(point)[1] for point in found.recorded])
    assert np.mean(guessed - truth) == pytest.approx(0.1, abs=0.02)


# What other pairs have found


def test_a_pair_left_out_is_compared_with_chance():
    tables = {
        "a": {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3},
        "b": {0: 0.6, 1: 0.8, 2: 0.4, 3: 0.1, 4: 0.2},
    }
    found = left_out("a", tables)  # b's best three: 1, 0, 2
    assert (found["warm_starts"], found["best_warm_start"]) == (3, 0.9)
    assert found["mean_warm_start"] == pytest.approx(0.5)
    best = [max(draw) for draw in itertools.combinations(tables["a"].values(), 3)]
    assert found["best_of_random"] == pytest.approx(np.mean(best))
    assert (found["authors"], found["best"], found["rank"]) == (0.5, 0.9, 0.8)


def test_the_best_points_of_a_source_are_those_of_its_last_epoch(tmp_path):
    given = points(6)
    finals = [0.1, 0.5, 0.2, 0.4, 0.3, 0.0]
    # Number 0 leads until the last epoch.
    rows = [
        SourceRow(number=n, point=given[n], scores=(*([1.0 - n] * (EPOCHS - 1)), finals[n]))
        for n in range(6)
    ]
    study = recorded_study()
    found = bring_best_points(study, [Source(name="a", rows=rows)], tmp_path)
    assert [*found.warm_points.values()] == [given[n] for n in (1, 3, 4)]


def test_a_chart_of_a_race(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.regret import FIRST, chart

    curve = list(np.linspace(0.1, 0.01, 40))
    result = {"seeds": 3, "regret": {"a & b": {"mean": curve, "low": curve, "high": curve}}}
    chart(result, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text()
    assert "a &amp; b" in text and "mean of 3 simulated searches" in text
    assert FIRST < 40


def test_coordinates_of_a_point_lie_in_the_unit_cube():
    space = Space({
        "lr": {"low": 0.001, "high": 0.1, "log": True}, "momentum": {"low": 0.5, "high": 0.99},
        "optimizer": {"choices": ["sgd", "adamw"]},
        "nesterov": {"choices": [True, False], "when": {"optimizer": ["sgd"]}},
    })  # fmt: skip
    found = unit_coordinates(space, {"lr": 0.01, "momentum": 0.99, "optimizer": "adamw"})
    assert found == pytest.approx([0.5, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert unit_coordinates(space, {"lr": 0.1})[:2] == pytest.approx([1.0, 0.5])
