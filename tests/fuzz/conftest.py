"""How the fuzzers try inputs: for a time, each within a limit, and counted."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from report_studies import exported, real_study, winner_config

from ekd_ray.errors import UserError

__all__ = ["exported", "real_study", "winner_config"]  # fixtures

# Of all fuzzers together; `make chaos` gives them ten minutes.
SECONDS = float(os.environ.get("EKD_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("EKD_CHAOS_SEED", "0"))
LIMIT = 10  # seconds that an input may compute; it may wait for six times as long
MOST_GROWTH = 2**20  # KiB by which inputs may make this process grow
CHUNK = 25  # inputs of one run of hypothesis
KINDS = 3


class Hangs(BaseException):
    """An input that is not done within the limit; no `except Exception` of the library holds it."""


def _stop(number: int, frame: Any) -> None:
    raise Hangs(f"not done after {LIMIT} s of computing, or {6 * LIMIT} s")


@contextmanager
def within_limit() -> Iterator[None]:
    """Raise `Hangs` where it is once the limit is over."""
    # On a busy machine what computes waits as well.
    limits = {
        signal.ITIMER_PROF: (signal.SIGPROF, LIMIT), signal.ITIMER_REAL: (signal.SIGALRM, 6 * LIMIT)
    }  # fmt: skip
    before = [(timer, sign, signal.signal(sign, _stop)) for timer, (sign, _) in limits.items()]
    try:
        for timer, (_, seconds) in limits.items():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, sign, handler in before:
            signal.setitimer(timer, 0)
            signal.signal(sign, handler)


@dataclass
class Fuzzer:
    """Tries inputs of a kind; the outcomes are a result or a `UserError`, and nothing else."""

    tell: Callable[[str, object], None]
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, kind: str, inputs: SearchStrategy[Any], use: Callable[[Any], None]) -> None:
        """Use new inputs until this kind's share of the time is over."""
        end = time.monotonic() + SECONDS / KINDS
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for chunk in range(10**9):

            @seed(1000 * SEED + chunk)
            @settings(
                max_examples=CHUNK, deadline=None, database=None, print_blob=False,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),
            )  # fmt: skip
            @given(inputs)
            def try_one(given_input: Any) -> None:
                if time.monotonic() > end:
                    return
                try:
                    with within_limit():
                        use(given_input)
                    outcome = "results"
                except UserError as error:
                    outcome = "refused" if str(error).isprintable() else "no sentence"
                assert outcome != "no sentence"
                self.counts[outcome] += 1

            try_one()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert after - grown < MOST_GROWTH, f"{(after - grown) >> 10} MiB more"
            if time.monotonic() > end:
                break
        self.tell("fuzz", f"{kind}: {self.counts.total()} tried, {self.counts['refused']} refused")


@pytest.fixture
def fuzzer(record_property: Callable[[str, object], None]) -> Fuzzer:
    """Its counts are in the last lines of the tests, see `tests/conftest.py`."""
    return Fuzzer(tell=record_property)
