"""Items made ahead in a second stream: what a GPU would do, acted out by streams that wait.

A fake stream is a list of operations that are done later, in any order that the waits allow.
Memory is as in torch's allocator: an item's place is free when nobody holds the item any more, and
the next item that the same stream makes takes it.
"""

from __future__ import annotations

import contextlib
import gc
import random

import numpy as np
import pytest
import torch

from ekd_ray.data import HostCopy, make_ahead, to_device

CUDA = torch.device("cuda", 0)


class Stream:
    """Operations in order; each is a function, and an event is an operation that is done."""

    def __init__(self):
        self.queue, self.done = [], 0

    def add(self, operation):
        self.queue.append(operation)

    def record_event(self):
        self.add(lambda: None)
        return self, len(self.queue)

    def wait_event(self, event):
        self.queue.append(event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def can_go_on(self):
        if self.done == len(self.queue):
            return False
        upcoming = self.queue[self.done]
        return callable(upcoming) or upcoming[0].done >= upcoming[1]

    def go_on(self):
        upcoming = self.queue[self.done]
        if callable(upcoming):
            upcoming()
        self.done += 1


class Item:
    """A batch that lies at `place` of the side stream's memory."""

    def __init__(self, number, free):
        self.number, self._free = number, free
        self.place = free.pop() if free else object()

    def __del__(self):
        self._free.append(self.place)


@pytest.fixture
def gpu(monkeypatch):
    """(main stream, side streams, stack of current streams)."""
    main, sides, current = Stream(), [], []

    def stream(device=None):
        sides.append(Stream())
        return sides[-1]

    @contextlib.contextmanager
    def inside(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    return main, sides, current


def act_out(gpu, count, seed):
    """What the steps of `count` items read, the streams being as fast as chance will have it."""
    main, sides, current = gpu
    memory, free, places, read = {}, [], [], []
    main.add(lambda: memory.update(staged=True))

    def items():
        for number in range(count):
            item = Item(number, free)
            places.append(item.place)

            def write(place=item.place, number=number):
                memory[place] = number if memory.get("staged") else "nothing staged"

            current[-1].add(write)
            yield item

    for item in make_ahead(items(), CUDA):
        assert not current
        main.add(lambda place=item.place: read.append(memory.get(place)))
    streams, chance = [main, *sides], random.Random(seed)
    while ready := [stream for stream in streams if stream.can_go_on()]:
        chance.choice(ready).go_on()
    assert all(stream.done == len(stream.queue) for stream in streams)
    return read, places


@pytest.mark.quick_ids("[0]", "[1]", "[2]", "[3]", "[4]", "[5]", "[6]", "[7]")
@pytest.mark.parametrize("seed", range(30))
def test_each_step_reads_its_own_item_in_any_order_of_the_streams(seed, gpu):
    read, places = act_out(gpu, 12, seed)
    assert read == list(range(12))
    gc.collect()
    assert len(set(places)) <= 3  # memory does not grow with the steps


def test_one_item_is_made_ahead_of_its_step_and_no_more(gpu):
    main, sides, _ = gpu
    log = []

    def items():
        for number in range(5):
            sides[0].add(lambda number=number: log.append(f"made {number}"))
            yield number

    for number in make_ahead(items(), CUDA):
        main.add(lambda number=number: log.append(f"step {number}"))
    while main.can_go_on() or sides[0].can_go_on():  # the side stream is as fast as it may be
        (sides[0] if sides[0].can_go_on() else main).go_on()
    pairs = [f"made {n + 1} step {n}" for n in range(4)]
    assert " ".join(log) == f"made 0 {' '.join(pairs)} step 4"


@pytest.mark.parametrize("device", [torch.device("cpu"), CUDA], ids=str)
def test_errors_come_in_their_turn_and_the_source_is_closed(device, gpu):
    closed = []

    def items():
        try:
            yield 1
            yield 2
            raise KeyError("third")
        finally:
            closed.append(True)

    source = make_ahead(items(), device)
    assert [next(source), next(source), *closed] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(source)
    assert closed == [True]
    held = items()
    with contextlib.closing(make_ahead(held, device)) as source:
        next(source)
    assert closed == [True, True]


def test_the_cpu_has_one_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", None)
    assert list(make_ahead((n for n in range(3)), torch.device("cpu"))) == [0, 1, 2]
    array = np.arange(3)
    values = to_device(array, torch.device("cpu"))
    assert values.data_ptr() == array.ctypes.data
    copy = HostCopy(values)
    assert copy.arrived and copy.values() is values
