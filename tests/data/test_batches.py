"""Orders and views are functions of counters; their values are frozen."""

import itertools

import numpy as np
import pytest
from counter_oracle import counter_oracle, splitmix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ekd_ray.data import counter_hash, epoch_batches, epoch_order, epoch_views, steps_per_epoch
from ekd_ray.data.counter import STREAM_ORDER, STREAM_STRONG_ID, STREAM_VIEW
from ekd_ray.errors import UserError


def test_the_oracle_is_splitmix64():
    # Published first outputs for seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(1234567, k) for k in range(3)] == published


@given(st.integers(-(2**63), 2**64 - 1), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_hash_agrees_with_big_integers(seed, counters):
    assert int(counter_hash(seed, *counters)) == counter_oracle(seed, *counters)


def test_hash_broadcasts():
    got = counter_hash(5, np.arange(3)[:, None], 9, np.arange(4))
    assert got.shape == (3, 4)
    assert got.dtype == np.uint64
    for i, j in itertools.product(range(3), range(4)):
        assert int(got[i, j]) == counter_oracle(5, i, 9, j)
    with pytest.raises(TypeError):
        counter_hash(5, np.array([0.5]))


def test_frozen_values():
    """If this fails, recorded runs, splits and caches can no longer be replayed."""
    assert int(counter_hash(0)) == 0xE220A8397B1DCDAF  # SplitMix64(0)'s first output
    order = epoch_order(10, seed=7, epoch=3).tolist()
    assert order == sorted(range(10), key=lambda i: counter_oracle(7, STREAM_ORDER, 3, i))
    assert (STREAM_ORDER, STREAM_VIEW) == (1, 2)
    assert order == FROZEN_ORDER
    views = epoch_views(np.array([0, 1, 49_999]), 7, 3, 162).tolist()
    assert views == [
        (counter_oracle(7, STREAM_VIEW, 3, i) >> 32) * 162 >> 32 for i in (0, 1, 49_999)
    ]
    assert views == FROZEN_VIEWS


FROZEN_ORDER = [4, 7, 5, 9, 2, 6, 0, 1, 3, 8]
FROZEN_VIEWS = [40, 109, 21]


def test_order_and_views_look_random():
    n, epochs = 2000, 60
    first = np.concatenate([epoch_order(n, 1, e)[:100] for e in range(epochs)])
    counts = np.bincount(first // 100, minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-4
    views = np.stack([epoch_views(np.arange(n), 1, e, 162) for e in range(epochs)])
    assert views.min() == 0
    assert views.max() == 161
    assert stats.chisquare(np.bincount(views.ravel(), minlength=162)).pvalue > 1e-4
    # A sample's views over epochs, and views of neighbours, are unrelated.
    for a, b in ((views[:-1], views[1:]), (views[:, :-1], views[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    for other in (epoch_order(n, 2, 0), epoch_order(n, 1, 1)):
        assert abs(np.corrcoef(epoch_order(n, 1, 0), other)[0, 1]) < 4 / np.sqrt(n)


@settings(deadline=None)
@given(
    st.integers(8, 120),
    st.sampled_from([4, 7, 8]),
    st.integers(0, 99),
    st.integers(0, 5),
    st.sampled_from([1, 2, 3, 4]),
)
def test_workers_together_see_what_one_alone_sees(n, batch, seed, epoch, workers):
    ids = np.arange(n) * 3 + 100
    settings_ = {
        "batch_size": batch, "seed": seed, "epoch": epoch, "num_views": 162, "strong_pool": 5,
    }  # fmt: skip
    alone = list(epoch_batches(ids, **settings_))
    assert [b.step for b in alone] == list(range(n // batch))
    seen = np.concatenate([b.sample_ids for b in alone])
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(ids.tolist())
    parts = [
        list(epoch_batches(ids, **settings_, rank=r, world_size=workers)) for r in range(workers)
    ]
    for step, whole in enumerate(alone):
        for field in ("sample_ids", "view_ids", "strong_ids"):
            together = np.empty(batch, dtype=np.int64)
            for r in range(workers):
                piece = getattr(parts[r][step], field)
                assert len(piece) in (batch // workers, -(-batch // workers))
                together[r::workers] = piece
            np.testing.assert_array_equal(together, getattr(whole, field))


def test_restart_in_the_middle_of_an_epoch():
    settings_ = {"batch_size": 8, "seed": 1, "epoch": 2, "num_views": 162}
    whole = list(epoch_batches(np.arange(67), **settings_, rank=1, world_size=2))
    rest = list(epoch_batches(np.arange(67), **settings_, rank=1, world_size=2, start_step=3))
    assert [b.step for b in rest] == [3, 4, 5, 6, 7]
    for a, b in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(a.sample_ids, b.sample_ids)
        np.testing.assert_array_equal(a.view_ids, b.view_ids)
    assert list(epoch_batches(np.arange(67), **settings_, start_step=8)) == []


def test_mistakes_are_named_at_the_call():
    settings_ = {"seed": 1, "epoch": 2, "num_views": 162}
    with pytest.raises(UserError, match=r"5 .*batch of 8.*batch_size <= 5"):
        epoch_batches(np.arange(5), batch_size=8, **settings_)
    with pytest.raises(UserError, match=r"a batch of 8 has no row for each of 9 workers"):
        epoch_batches(np.arange(50), batch_size=8, world_size=9, **settings_)
    with pytest.raises(UserError, match="batch_size must be >= 1"):
        steps_per_epoch(5, 0)
    with pytest.raises(ValueError, match="rank"):
        epoch_batches(np.arange(50), batch_size=8, rank=2, world_size=2, **settings_)
    with pytest.raises(ValueError, match="start_step"):
        epoch_batches(np.arange(50), batch_size=8, start_step=7, **settings_)
    assert steps_per_epoch(50_000, 64) == 781


def test_strong_ids_are_drawn_apart_from_views():
    settings_ = {"batch_size": 6, "seed": 1, "epoch": 2, "num_views": 162}
    plain = list(epoch_batches(np.arange(500), **settings_))
    strong = list(epoch_batches(np.arange(500), **settings_, strong_pool=5))
    drawn = set()
    for a, b in zip(plain, strong, strict=True):
        assert a.strong_ids is None
        assert a.sample_ids.tolist() == b.sample_ids.tolist()
        assert a.view_ids.tolist() == b.view_ids.tolist()
        bits = [counter_oracle(1, STREAM_STRONG_ID, 2, i) for i in b.sample_ids.tolist()]
        assert b.strong_ids.tolist() == [(word >> 32) * 5 >> 32 for word in bits]
        drawn |= set(b.strong_ids.tolist())
    assert drawn == set(range(5))
    assert STREAM_STRONG_ID == 8
