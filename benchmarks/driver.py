"""Time that the driver itself computes for a trial and for a report, without Ray beneath it.

python -m benchmarks.driver --trials 500 --json out.json

Searcher, journal, records and progress are the real ones; trials are driven as Tune drives
them, many at once, with made-up scores. Processor time is told beside wall-clock, since it
holds on a machine that others use too.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, spread
from benchmarks.overhead import SPACE
from benchmarks.sleeper import HISTORY
from ekd_ray.cli.console import Console
from ekd_ray.cli.terminal import Terminal
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.files import write_json
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import RUN

EPOCHS, WINDOW = 9, 50


class Drive:
    """A search with its timings: (wall, processor) seconds of each call, by what was called."""

    def __init__(self, run: Path, trials: int) -> None:
        base = resolve(
            DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS)
        )
        config = StudyConfig(distill=base, space=SPACE, trials=trials, baselines=())
        run.mkdir()
        self.searcher = OptunaSearcher(run, config, base)
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        self.terminal = Terminal(rungs=milestone_epochs(config), shown=SPACE, console=console)
        self.terminal.stage("search", trials, EPOCHS)
        self.times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def timed(self, name: str, call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        wall, computed = time.perf_counter(), time.thread_time()
        found = call(*given, **options)
        self.times[name].append((time.perf_counter() - wall, time.thread_time() - computed))
        return found

    def end(self, name: str, run: RunRecord) -> None:
        """A trial's epochs (one in three stops early at one of two rungs) and its end."""
        assert run.number is not None
        epochs = (1, 3, EPOCHS)[run.number % 3]
        with open(run.folder / HISTORY, "a", encoding="utf-8") as history:
            for epoch in range(1, epochs + 1):
                score = -abs(math.log(run.config["lr"] / 0.01)) - 1 / epoch
                row = {"epoch": epoch, "val_top1": score, "train_loss": -score, "seconds": 1.0}
                history.write(json.dumps(row) + "\n")
                history.flush()
                self.timed("report", self._report, name, run.number, row, epoch < epochs)
        self.timed("end", self.searcher.on_trial_complete, name, {"epoch": epochs})
        self.terminal.ended(run.number, failed=False)

    def _report(self, name: str, number: int, row: dict[str, Any], more: bool) -> None:
        if more:
            self.searcher.on_trial_result(name, row)
        self.terminal.epoch(number, row)

    def run(self, trials: int, slots: int) -> None:
        """So many trials, `slots` of them at once."""
        running: deque[tuple[str, RunRecord]] = deque()
        for index in range(trials):
            suggested = self.timed("suggest", self.searcher.suggest, f"t{index}")
            run = RunRecord.from_dict(suggested[RUN])
            self.terminal.started(run.title, index, run.config)
            running.append((f"t{index}", run))
            if len(running) == slots:
                self.end(*running.popleft())
        while running:
            self.end(*running.popleft())
        self.terminal.close()


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of all calls, and processor time of the first and of the last ones."""
    wall, computed = ([1e3 * value for value in column] for column in zip(*times, strict=True))
    return {
        "wall_ms": spread(wall),
        "cpu_ms": spread(computed),
        "cpu_ms_mean": sum(computed) / len(computed),
        f"cpu_ms_mean_of_first_{WINDOW}": sum(computed[:WINDOW]) / len(computed[:WINDOW]),
        f"cpu_ms_mean_of_last_{WINDOW}": sum(computed[-WINDOW:]) / len(computed[-WINDOW:]),
    }


def main() -> None:
    """Measure once and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=1000, metavar="N")
    parser.add_argument("--slots", type=int, default=64, metavar="N", help="trials at once (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(threads=1)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        drive = Drive(Path(folder) / "study", args.trials)
        drive.run(args.trials, args.slots)
    result |= {
        "load_average_at_end": os.getloadavg()[0],
        "setup": {"trials": args.trials, "slots": args.slots, "parameters": len(SPACE)},
        "driver": {name: summary(times) for name, times in drive.times.items()},
    }
    print(json.dumps(result["driver"], indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
