"""The model of a search's wall-clock against slower reckonings of the same."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks.overhead import gaps
from benchmarks.scaling import Costs, asha_lengths, project, simulate

FREE = Costs(report=0.0, trial=0.0, latency=0.0, start=0.0)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@given(lengths=LENGTHS, slots=st.integers(1, 8), epoch=st.sampled_from([0.5, 1.0, 2.0]))
def test_without_costs_it_is_list_scheduling(lengths, slots, epoch):
    ends = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length * epoch)
    found = simulate(lengths, slots, epoch, FREE)
    assert found["wall"] == pytest.approx(max(ends))
    assert found["ideal"] == pytest.approx(sum(lengths) * epoch / slots)


@given(lengths=LENGTHS)
def test_one_slot_pays_for_everything_in_turn(lengths):
    costs = Costs(report=0.1, trial=0.3, latency=0.2, start=5.0, fill=7.0)
    found = simulate(lengths, 1, 1.0, costs)
    # Reports but the last are read while the next epoch trains.
    expected = 12.0 + sum(0.3 + 0.2 + length + 0.1 for length in lengths)
    assert found["wall"] == pytest.approx(expected, abs=0.4)


@given(lengths=LENGTHS, slots=st.integers(1, 16))
def test_nothing_is_faster_than_the_driver_or_the_work(lengths, slots):
    costs = Costs(report=0.5, trial=0.7, latency=0.0, start=1.0)
    found = simulate(lengths, slots, 0.1, costs)
    assert found["wall"] >= 1.0 + 0.5 * sum(lengths)
    assert found["wall"] >= found["ideal"]
    assert 0 < found["efficiency"] <= 1 and found["driver"] <= 1


def test_costs_only_ever_add():
    lengths, walls = asha_lengths(64, (3, 9, 27), 3), []
    for scale in (0.0, 0.01, 0.1, 1.0):
        costs = Costs(report=scale, trial=scale, latency=scale, start=scale, fill=scale)
        walls.append(simulate(lengths, 8, 1.0, costs)["wall"])
    assert walls == sorted(walls) and len(set(walls)) == 4


def test_asha_keeps_a_third_at_every_rung():
    lengths = asha_lengths(270, (3, 9, 27), 3)
    assert [lengths.count(epochs) for epochs in (3, 9, 27)] == [180, 60, 30]


def test_projected_work_grows_with_the_gpus(monkeypatch):
    monkeypatch.setattr(scaling, "GPUS", (8, 64))
    found = project(FREE)
    assert {entry["gpus"] for entry in found} == {8, 64}
    for entry in found:
        assert 0.3 < entry["efficiency"] <= 1, entry
        assert entry["driver"] == 0


def test_a_gap_is_between_two_trials_of_a_process():
    spans = [
        {"pid": 1, "started": 0.0, "ended": 2.0}, {"pid": 2, "started": 1.0, "ended": 3.0},
        {"pid": 1, "started": 2.5, "ended": 4.0}, {"pid": 1, "started": 5.0, "ended": 6.0},
    ]  # fmt: skip
    assert gaps(spans) == [0.5, 1.0]
