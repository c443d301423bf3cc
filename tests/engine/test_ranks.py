"""Two data-parallel processes over gloo: one spawn does every run, the tests read its record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_runs import Killed, state, untimed
from rank_groups import group, start

import ekd_ray.engine.distill as engine
from ekd_ray.config import DistillConfig
from ekd_ray.data import epoch_batches, load_dataset
from ekd_ray.engine import ranks
from ekd_ray.engine.distill import distill
from ekd_ray.engine.history import read_history
from ekd_ray.engine.rundata import split_ids
from ekd_ray.losses.methods import with_method

WORLD = 2


def kill_after_first_epoch(row):
    if row["epoch"] == 1:
        raise Killed


def worker(rank: int, settings: dict, folder: str) -> None:
    with group(rank, WORLD, Path(folder)):
        torch.save(records(rank, settings, Path(folder)), Path(folder) / f"rank{rank}.pt")


def records(rank: int, settings: dict, out: Path) -> dict:
    """One of the processes: an uninterrupted run, and one killed twice and resumed."""
    config = DistillConfig.from_dict(settings)
    steps, saves, kill_at = [], [], [0]
    step, write = engine._train_step, engine.save_checkpoint

    def recorded(run, part, factors):
        batch = part.batch
        ids = (batch.sample_ids, batch.view_ids, batch.strong_ids)
        steps.append((run.epoch, batch.step, ids))
        if len(steps) == kill_at[0]:
            raise Killed
        step(run, part, factors)

    def counted(path, **kwargs):
        saves.append(path.name)
        write(path, **kwargs)

    engine._train_step, engine.save_checkpoint = recorded, counted
    reported = []
    straight = distill(
        config, out=out / "straight", on_epoch=reported.append, threads=1, checkpoint_seconds=3600
    )
    record = {
        "history": straight.history, "reported": reported, "weights": state(straight),
        "log_prior": straight.log_prior, "steps": list(steps), "saves": list(saves),
        "helpers": (ranks.rank(), ranks.world_size(), ranks.is_first(),
                    ranks.from_first({"rank": rank}),
                    ranks.gather_rows(torch.arange(3 - rank) * 2 + rank, 5).tolist()),
    }  # fmt: skip
    killed = []
    for options in (
        {"on_epoch": kill_after_first_epoch, "checkpoint_seconds": 0.0},
        {"checkpoint_steps": 2, "checkpoint_seconds": 3600.0},
    ):
        steps.clear()
        kill_at[0] = 3 if "checkpoint_steps" in options else 0
        try:
            distill(config, out=out / "resumed", threads=1, **options)
        except Killed:
            killed.append(True)
        dist.barrier()
    steps.clear()
    kill_at[0] = 0
    resumed = distill(config, out=out / "resumed", threads=1)
    return record | {
        "killed": killed, "resumed_history": resumed.history, "resumed_weights": state(resumed),
        "resumed_steps": list(steps),
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny, with_teacher):
    """A learned prior, a teacher whose tables both processes fill, and two views."""
    return with_method(tiny(), "mlkd+ekd", learn_log_prior=True, view_pool=4, **with_teacher)


@pytest.fixture(scope="module")
def two_ranks(config, tmp_path_factory):
    """(records by rank, folder) of the runs above."""
    folder = tmp_path_factory.mktemp("ranks")
    load_dataset("synthetic", "train")  # decoded once, before two processes want it
    arguments = (config.to_dict(), str(folder))
    start(worker, WORLD, *arguments)
    records = [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(WORLD)]
    return records, folder


def test_one_process_needs_no_group():
    value = torch.tensor([3.0])
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (0, 1, True)
    assert ranks.gather_rows(value, 1) is value
    assert ranks.gather_columns([value], 1) == [value]
    module = torch.nn.Linear(1, 1)
    assert ranks.parallelize(module, torch.device("cpu")) is module


def test_only_the_first_rank_writes(two_ranks):
    records, folder = two_ranks
    assert [record["reported"] == record["history"] for record in records] == [True, True]
    assert len(records[0]["saves"]) == 1
    assert records[1]["saves"] == []
    assert untimed(read_history(folder / "straight")) == untimed(records[0]["history"])
    assert len(list((folder / "straight").glob("events.out.tfevents.*"))) == 1


def test_together_they_train_on_what_one_worker_would(two_ranks, config):
    train_ids, _ = split_ids(config, load_dataset("synthetic", "train").labels)
    shares = [{(e, s): ids for e, s, ids in record["steps"]} for record in two_ranks[0]]
    for epoch in (1, 2):
        alone = epoch_batches(
            train_ids, batch_size=16, seed=0, epoch=epoch, num_views=162, strong_pool=4
        )
        for batch in alone:
            parts = [share.pop((epoch, batch.step)) for share in shares]
            assert [len(ids) for part in parts for ids in part] == [8] * 6
            both = [row for part in parts for row in zip(*part, strict=True)]
            ids = (batch.sample_ids, batch.view_ids, batch.strong_ids)
            expected = list(zip(*ids, strict=True))
            assert sorted(both) == sorted(expected)
    assert shares == [{}, {}]


def test_a_resumed_group_ends_bit_for_bit_the_same(two_ranks):
    """Killed after epoch 1, then in step 3 of epoch 2 with a checkpoint after its step 2."""
    for record in two_ranks[0]:
        assert record["killed"] == [True, True]
        assert [(epoch, step) for epoch, step, *_ in record["resumed_steps"]] == [(2, 2)]
        assert untimed(record["resumed_history"]) == untimed(record["history"])
    first = two_ranks[0][0]
    expected, found = first["weights"], first["resumed_weights"]
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
