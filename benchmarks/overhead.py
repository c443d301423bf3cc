"""What a search costs its driver: many trials that train nothing, at high concurrency.

python -m benchmarks.overhead --trials 1000 --slots 32 --save

Searcher, scheduler, journal, records, progress and Tune are the real ones; only the body of a
trial is made up: it writes and reports its epochs and sleeps between them.
"""

from __future__ import annotations

import argparse
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

from benchmarks.measure import machine, spread
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.files import write_json

SPACE = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "momentum": {"low": 0.5, "high": 0.99},
    "weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    "optimizer": {"choices": ["sgd", "adamw"]},
    "batch_size": {"low": 16, "high": 64, "step": 16},
}
SPANS = "spans.jsonl"


def made_up(job: Any, report: Any, *, seconds: float) -> None:
    """A trial without training: its epochs' rows, as far as the search looks at them."""
    import math

    from ekd_ray.engine.runlog import HISTORY

    folder, started = Path(job.folder), time.time()
    with open(folder / HISTORY, "a", encoding="utf-8") as history:
        total = 0.0
        for epoch in range(1, job.settings["epochs"] + 1):
            time.sleep(seconds)
            score = -abs(math.log(job.settings["lr"] / 0.01)) - 1 / epoch
            total += score
            row = {"epoch": epoch, "val_top1": score, "train_loss": -score, "seconds": seconds}
            history.write(json.dumps(row) + "\n")
            history.flush()
            _span(folder, started)
            report({**row, "rung_score": total / epoch})


def _span(folder: Path, started: float) -> None:
    """Where and when this trial has been at work so far: a stopped one does not return."""
    span = {"pid": os.getpid(), "started": started, "ended": time.time()}
    (folder / SPANS).write_text(json.dumps(span), encoding="utf-8")


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
    from rich.console import Console

    from ekd_ray.pipeline import check_study, open_run
    from ekd_ray.results.study import milestone_epochs
    from ekd_ray.scale.cluster import connected
    from ekd_ray.scale.samplers import make_scheduler
    from ekd_ray.scale.search import run_tuner
    from ekd_ray.scale.searcher import OptunaSearcher
    from ekd_ray.terminal import Terminal

    base = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=args.epochs)
    config = StudyConfig(
        distill=base, space=SPACE, trials=args.trials, sampler=args.sampler, baselines=(),
        max_concurrent=args.slots,
    )  # fmt: skip
    config = check_study(config)
    open_run(run, config, resume=False)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    terminal = Terminal(rungs=milestone_epochs(config), shown=SPACE, console=console)
    waited, wait = 0.0, ray.wait

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal waited
        before = time.perf_counter()
        try:
            return wait(*given, **options)
        finally:
            waited += time.perf_counter() - before

    profile = cProfile.Profile() if args.profile else None
    with connected(config):
        searcher = OptunaSearcher(run, config, config.distill)
        terminal.stage("search", args.trials, args.epochs)
        ray.wait = timed
        wall, thread = time.perf_counter(), time.thread_time()
        if profile:
            profile.enable()
        run_tuner(
            run, config, searcher=searcher, scheduler=make_scheduler(config), num_samples=-1,
            observer=terminal, body=functools.partial(made_up, seconds=args.seconds),
        )  # fmt: skip
        if profile:
            profile.disable()
        wall, thread = time.perf_counter() - wall, time.thread_time() - thread
        ray.wait = wait
        terminal.close()
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(70)
    histories = [record.history for record in searcher_records(run)]
    reports = sum(len(history) for history in histories)
    spans = [json.loads(path.read_text()) for path in run.glob(f"trials/*/{SPANS}")]
    return {
        "setup": {
            "trials": len(histories), "slots": args.slots, "epochs": args.epochs,
            "seconds_per_epoch": args.seconds, "sampler": args.sampler, "parameters": len(SPACE),
        },
        "reports": reports,
        "wall_seconds": wall,
        "busy_ms_per_report": 1e3 * (wall - waited) / reports,
        "cpu_ms_per_report": 1e3 * thread / reports,
        "gap_seconds": spread(gaps(spans)),
    }  # fmt: skip


def searcher_records(run: Path) -> list[Any]:
    """The records of the trials that ended."""
    from ekd_ray.results import Study

    return Study.load(run).records()


def main() -> None:
    """Measure once and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=1000, metavar="N")
    parser.add_argument("--slots", type=int, default=32, metavar="N", help="trials at once (32)")
    parser.add_argument("--epochs", type=int, default=9, metavar="N", help="of each trial (9)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="an epoch (1)")
    parser.add_argument("--sampler", default="tpe", help="Optuna's sampler (tpe)")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder + "/cache"
        from ekd_ray.scale import cluster

        before = machine(threads=1)
        # A slot costs no core here: trials only sleep.
        cluster.local_cpus = lambda: args.slots
        result = measure(Path(folder) / "study", args)
    print(json.dumps(result, indent=2), file=sys.stderr)
    if args.json:
        result["load_average_at_end"] = os.getloadavg()[0]
        write_json(args.json, {"machine": before, "overhead": result})


if __name__ == "__main__":
    main()
