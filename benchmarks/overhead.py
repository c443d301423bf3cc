"""The cost of a search for its driver: many trials that train nothing, at high concurrency.

python -m benchmarks.overhead --trials 1000 --slots 32 --json out.json

Searcher, scheduler, journal, records, progress and Tune are the real ones; only the body of a
trial is made up: it writes and reports its epochs and sleeps between them.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import io
import itertools
import json
import os
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.measure import machine, spread
from benchmarks.sleeper import SPAN, sleeper
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.files import write_json

SPACE = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "momentum": {"low": 0.5, "high": 0.99},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "optimizer": {"choices": ["sgd", "adamw"]},
    "batch_size": {"low": 16, "high": 64, "step": 16},
}


def gaps(spans: list[dict[str, float]]) -> list[float]:
    """Seconds between the end of one trial and the start of the next in the same process."""
    by_process = defaultdict(list)
    for span in spans:
        by_process[span["pid"]].append((span["started"], span["ended"]))
    found = []
    for times in by_process.values():
        times.sort()
        found += [later[0] - earlier[1] for earlier, later in itertools.pairwise(times)]
    return found


def measure(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run the search; seconds of the driver by report, gaps by slot, and what it took."""
    import ray

    from ekd_ray.cli.console import Console
    from ekd_ray.cli.terminal import Terminal
    from ekd_ray.results.records import milestone_epochs
    from ekd_ray.results.study import Study
    from ekd_ray.scale.cluster import connected
    from ekd_ray.scale.schedulers import make_scheduler
    from ekd_ray.scale.search import run_tuner
    from ekd_ray.scale.searcher import OptunaSearcher
    from ekd_ray.studies.pipeline import check_study, open_run

    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=args.epochs)
    config = StudyConfig(
        distill=base, space=SPACE, trials=args.trials, sampler=args.sampler, baselines=(),
        max_concurrent=args.slots,
    )  # fmt: skip
    config = check_study(config)
    open_run(run, config, resume=False)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    terminal = Terminal(rungs=milestone_epochs(config), shown=SPACE, console=console)
    spent: dict[str, float] = defaultdict(float)
    at_work: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Any) -> Any:
        def wrapped(*given: Any, **options: Any) -> Any:
            before, computed = time.perf_counter(), time.thread_time()
            try:
                return call(*given, **options)
            finally:
                spent[name] += time.perf_counter() - before
                at_work[name] += time.thread_time() - computed

        return wrapped

    profile = cProfile.Profile() if args.profile else None
    # A slot costs no core here: trials only sleep.
    with patch("ekd_ray.scale.cluster.local_cpus", lambda: args.slots), connected(config):
        searcher = OptunaSearcher(run, config, config.distill)
        terminal.stage("search", args.trials, args.epochs)
        for name in ("suggest", "on_trial_complete"):
            setattr(searcher, name, timed("searcher", getattr(searcher, name)))
        began = time.time()
        wall, thread = time.perf_counter(), time.thread_time()
        # Light processes, so that many start on few cores; what they run does not matter here.
        light = functools.partial(light_trainable, args.seconds)
        with (
            patch("ekd_ray.scale.search.make_trainable", light),
            patch("ray.wait", timed("wait", ray.wait)),
            profile or contextlib.nullcontext(),
        ):
            run_tuner(
                run,
                config,
                lambda *_: None,
                searcher=searcher,
                scheduler=make_scheduler(config),
                observer=terminal,
            )
        wall, thread = time.perf_counter() - wall, time.thread_time() - thread
        terminal.close()
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(70)
    lengths = [len(record.history) for record in Study.load(run).records()]
    reports = sum(lengths)
    spans = [json.loads(path.read_text()) for path in run.glob(f"trials/*/{SPAN}")]
    busy = wall - spent["wait"]
    return {
        "setup": {
            "trials": len(lengths), "slots": args.slots, "epochs": args.epochs,
            "seconds_per_epoch": args.seconds, "sampler": args.sampler, "parameters": len(SPACE),
        },
        "lengths": lengths,
        "reports": reports,
        "wall_seconds": wall,
        # Until a slot is at work, and until all are.
        "first_start_seconds": min(s["started"] for s in spans) - began,
        "all_started_seconds": sorted(s["started"] for s in spans)[args.slots - 1] - began,
        # Processes that trained, and slots at work on the average of the time.
        "processes": len({span["pid"] for span in spans}),
        "mean_at_work": sum(s["ended"] - s["started"] for s in spans) / wall,
        "busy_ms_per_report": 1e3 * busy / reports,
        "busy_ms_per_report_without_searcher": 1e3 * (busy - spent["searcher"]) / reports,
        "searcher_ms_per_trial": 1e3 * spent["searcher"] / len(lengths),
        # Processor time of the driver's thread: what is left of it on a machine of its own.
        "cpu_ms_per_report": 1e3 * thread / reports,
        "cpu_ms_per_report_without_searcher": 1e3 * (thread - at_work["searcher"]) / reports,
        "searcher_cpu_ms_per_trial": 1e3 * at_work["searcher"] / len(lengths),
        "gap_seconds": spread(gaps(spans)) if len(spans) > args.slots else None,
    }  # fmt: skip


def light_trainable(seconds: float, config: StudyConfig, *_: Any) -> Any:
    """A trainable that sleeps, for the place of `make_trainable`."""
    from ray import tune

    return tune.with_resources(functools.partial(sleeper, seconds=seconds), {"cpu": 1})


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the measurement and of its result file."""
    parser.add_argument("--trials", type=int, default=1000, metavar="N")
    parser.add_argument("--slots", type=int, default=32, metavar="N", help="trials at once (32)")
    parser.add_argument("--epochs", type=int, default=9, metavar="N", help="of each trial (9)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="an epoch (1)")
    parser.add_argument("--sampler", default="tpe", help="Optuna's sampler (tpe)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")


def main() -> None:
    """Measure once and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    flags(parser)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        before = machine(threads=1)
        result = measure(Path(folder) / "study", args)
    lengths = result.pop("lengths")
    print(json.dumps(result, indent=2), f"mean length {np.mean(lengths):.2f}", file=sys.stderr)
    if args.json:
        result["load_average_at_end"] = os.getloadavg()[0]
        write_json(args.json, {"machine": before, "overhead": result})


if __name__ == "__main__":
    main()
