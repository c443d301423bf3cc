"""The count of what `make chaos` kills, and of what it cost."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

COLUMNS = ("kills", "lost", "repeated", "wrong")
WITHOUT_RAY = "no Ray: "  # the beginning of the kinds in which none runs


@dataclass
class Tally:
    """Kind of kill -> kills; records that were lost, runs that had ended and ran again, and
    whatever else was not as it is without a kill."""

    rows: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, **counts: int) -> None:
        self.rows.setdefault(kind, Counter()).update(counts)

    @contextlib.contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        """Count a check that fails within as something wrong."""
        try:
            yield
        except BaseException:
            self.add(kind, wrong=1)
            raise

    def totals(self) -> dict[str, dict[str, int]]:
        """Each kind's counts, and their sums with Ray and without."""
        counted = {kind: {c: row[c] for c in COLUMNS} for kind, row in self.rows.items()}
        parts = {"with Ray": False, "without Ray": True}
        sums = {
            name: {
                c: sum(row[c] for k, row in counted.items() if k.startswith(WITHOUT_RAY) is without)
                for c in COLUMNS
            }
            for name, without in parts.items()
        }
        return {**counted, **sums}


TALLY = Tally()
