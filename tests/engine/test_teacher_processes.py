"""One table, three processes at once: two that write the same and other rows, one that reads."""

from __future__ import annotations

import os

import numpy as np
import pytest
from rank_groups import process_server

from ekd_ray.engine.teacher.table import RowFormat, TableSpec, open_table

WIDTH, ROUNDS = 6000, 2000  # a row is three pages: it can be seen half written
SPEC = TableSpec(
    num_samples=60,
    num_views=2,
    row_format=RowFormat(num_classes=WIDTH),
    facts={"teacher": "resnet8", "dataset": "synthetic"},
)
# Both writers write these, with other bits; the rest is one writer's or the other's alone.
CONTESTED, OWN = np.arange(8), (np.arange(8, 60), np.arange(60, 112))
NOBODYS = np.arange(112, 120)


def rows_of(places, writer):
    """Rows uint16 [B, WIDTH] that differ in every word between writers and places."""
    base = np.asarray(places)[:, None] * 100 + np.arange(WIDTH) % 50
    return (2 * base + writer).astype(np.uint16)


def ids(places):
    return places // SPEC.num_views, places % SPEC.num_views


def open_at_once(cache: str, start):
    """The table, when all three processes are there."""
    os.environ["EKD_CACHE_DIR"] = cache  # the server of processes has that of its own start
    start.wait()
    return open_table(SPEC)


def write(writer: int, cache: str, start, done) -> None:
    """Opens (or makes) the table and writes the contested rows over and over, its own once."""
    draw = np.random.default_rng(writer)
    rows = rows_of(CONTESTED, writer)
    table = open_at_once(cache, start)
    for places in np.array_split(OWN[writer], ROUNDS):
        if len(places):
            table.write(*ids(places), rows_of(places, writer))
        order = draw.permutation(len(CONTESTED))
        table.write(*ids(CONTESTED[order]), rows[order])
    done.release()


def read(cache: str, start, done, record) -> None:
    """Reads at random until both writers are done; sends what it found and what was wrong."""
    draw = np.random.default_rng(9)
    everything = np.arange(SPEC.num_samples * SPEC.num_views)
    legal = [np.concatenate([CONTESTED, own]) for own in OWN]
    expected = [rows_of(everything, writer) for writer in (0, 1)]
    found, wrong, passes, ended = np.zeros(len(everything), bool), 0, 0, 0
    table = open_at_once(cache, start)
    while ended < 2:
        ended += done.acquire(block=False)
        places = np.concatenate([CONTESTED, draw.permutation(everything)[:2]])
        rows, there = table.read(*ids(places))
        whole = [
            (rows == expected[writer][places]).all(1) & np.isin(places, legal[writer])
            for writer in (0, 1)
        ]
        wrong += int((there & ~(whole[0] | whole[1])).sum())
        found[places[there]] = True
        passes += 1
    record.put((np.flatnonzero(found).tolist(), wrong, passes))


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory):
    """(the table, what the reader found) once all three processes have ended."""
    patch = pytest.MonkeyPatch()
    cache = str(tmp_path_factory.mktemp("cache"))
    patch.setenv("EKD_CACHE_DIR", cache)
    server = process_server()
    start, done, record = server.Barrier(3), server.Semaphore(0), server.Queue()
    processes = [server.Process(target=write, args=(n, cache, start, done)) for n in (0, 1)]
    processes.append(server.Process(target=read, args=(cache, start, done, record)))
    for process in processes:
        process.start()
    seen = record.get(timeout=120)
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    table = open_table(SPEC)
    patch.undo()
    return table, seen


def test_a_reader_never_trusts_a_row_that_nobody_wrote(aftermath):
    found, wrong, passes = aftermath[1]
    assert wrong == 0
    assert passes > 1
    assert not set(found) & set(NOBODYS.tolist())


def test_rows_of_one_writer_are_all_there(aftermath):
    table = aftermath[0]
    for writer in (0, 1):
        rows, there = table.read(*ids(OWN[writer]))
        assert there.all()
        assert (rows == rows_of(OWN[writer], writer)).all()


def test_rows_of_two_writers_are_one_of_the_two_or_missing(aftermath):
    """A row of one beside the word of the other is taken for missing and written again."""
    table = aftermath[0]
    rows, there = table.read(*ids(CONTESTED))
    whole = sum((rows == rows_of(CONTESTED, writer)).all(1) for writer in (0, 1))
    assert (whole[there] == 1).all()
    missing = CONTESTED[~there]
    if len(missing):
        table.write(*ids(missing), rows_of(missing, 0))
    assert table.read(*ids(CONTESTED))[1].all()
    assert not table.read(*ids(NOBODYS))[1].any()
    assert table.sound() == (112, 0)
