"""How long a search takes on how many slots: a model, checked here, then projected.

python -m benchmarks.scaling --json out.json

The model is a queue. Slots train; one driver serves them all, one thing at a time: every report
costs it `report` seconds, and a trial that ends and the one that follows it `trial` seconds, for
which the slot waits, and then another `latency` until the next trial trains. A search begins
`start` seconds before its first epoch, with the teacher's table filled in `fill` seconds.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import overhead
from benchmarks.measure import machine
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.files import write_json
from ekd_ray.results.records import milestone_epochs


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds: of the driver for a report and for a trial, between two trials of a slot
    besides that, before the first epoch, and of the teacher's table."""

    report: float
    trial: float
    latency: float
    start: float
    fill: float = 0.0


def simulate(lengths: Sequence[int], slots: int, epoch: float, costs: Costs) -> dict[str, float]:
    """A search of trials with so many epochs each, in order, on so many slots.

    Returns:
        `wall` seconds, `ideal` (epochs spread evenly over the slots, nothing else), `efficiency`
        (ideal over wall), `driver` (share of the time in which the driver is at work).
    """
    ready = costs.start + costs.fill
    waiting = list(lengths)[::-1]
    # (when a slot asks for the driver, slot, epochs that its trial has left)
    events = [(ready, slot, 0) for slot in range(min(slots, len(lengths)))]
    heapq.heapify(events)
    free, busy, wall = ready, 0.0, ready
    while events:
        now, slot, left = heapq.heappop(events)
        begins = max(now, free)
        ended = left == 0
        cost = costs.trial if ended else costs.report
        free = begins + cost
        busy += cost
        wall = max(wall, begins)
        if not ended:
            # The slot does not wait for the driver to have read its report.
            heapq.heappush(events, (now + epoch if left > 1 else free, slot, left - 1))
        elif waiting:
            heapq.heappush(events, (free + costs.latency + epoch, slot, waiting.pop()))
    ideal = sum(lengths) * epoch / slots
    return {
        "wall": wall, "ideal": ideal, "efficiency": ideal / wall, "driver": busy / wall,
    }  # fmt: skip


def asha_lengths(trials: int, milestones: Sequence[int], factor: int) -> list[int]:
    """Epochs of each trial where at every milestone but the last one in `factor` goes on."""
    *rungs, full = milestones
    lengths = []
    for index in range(trials):
        length, rest = full, index
        for rung in rungs:
            if rest % factor:
                length = rung
                break
            rest //= factor
        lengths.append(length)
    return lengths


@dataclass(frozen=True, kw_only=True)
class Case:
    """A search to project: its trials by ASHA at the default's rungs, the seconds of an epoch in
    a slot, slots per GPU, and the seconds that one GPU would need for the teacher's table."""

    name: str
    trials_per_slot: int
    schedule: DistillConfig
    epoch: float
    slots_per_gpu: int
    table: float


CASES = (
    Case(name="CIFAR-100, resnet8x4, 4 trials a GPU", trials_per_slot=8,
         schedule=DistillConfig(epochs=240), epoch=12.0, slots_per_gpu=4, table=600.0),
    Case(name="the same, epochs of 1 s", trials_per_slot=8,
         schedule=DistillConfig(epochs=240), epoch=1.0, slots_per_gpu=4, table=600.0),
    Case(name="ImageNet, resnet18, 1 trial a GPU", trials_per_slot=4,
         schedule=DistillConfig(epochs=100, lr_milestones=(0.3, 0.6, 0.9)), epoch=600.0,
         slots_per_gpu=1, table=0.0),
)  # fmt: skip
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8


def project(costs: Costs) -> list[dict[str, Any]]:
    """Every case on every number of GPUs, work growing with them."""
    found = []
    for case in CASES:
        for gpus in GPUS:
            slots = gpus * case.slots_per_gpu
            study = StudyConfig(distill=case.schedule)
            lengths = asha_lengths(
                case.trials_per_slot * slots, milestone_epochs(study), study.reduction_factor
            )
            # Each node fills its own table with its own GPUs, so that more nodes are not quicker.
            filled = replace(costs, fill=case.table / min(gpus, GPUS_PER_NODE))
            result = simulate(lengths, slots, case.epoch, filled)
            found.append({"case": case.name, "gpus": gpus, "slots": slots, **result})
    return found


def check(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Searches of sleeping trials at 1, 2 and 4 slots against the model with the costs of the
    search at high concurrency."""
    runs = {}
    for slots, trials in ((args.slots, args.trials), *((n, 8 * n) for n in (1, 2, 4))):
        chosen = argparse.Namespace(**{**vars(args), "slots": slots, "trials": trials})
        with tempfile.TemporaryDirectory() as folder:
            runs[slots] = overhead.measure(Path(folder) / "study", chosen)
        print(f"{slots} slot(s): {runs[slots]['wall_seconds']:.1f} s", file=sys.stderr, flush=True)
    found = []
    for slots in (1, 2, 4):
        run = runs[slots]
        costs = replace(costs_of(runs[args.slots]), start=run["first_start_seconds"])
        model = simulate(run["lengths"], slots, args.seconds, costs)
        found.append(
            {
                "slots": slots,
                "measured_seconds": run["wall_seconds"],
                "model_seconds": model["wall"],
                "model_over_measured": model["wall"] / run["wall_seconds"],
                "gap_seconds": run["gap_seconds"],
            }
        )
    return found, runs[args.slots]


def costs_of(run: dict[str, Any], *, alone: bool = False) -> Costs:
    """The model's costs from a search at high concurrency: as it was, or as it would be on a
    machine that the driver has for itself (its processor time, and 20 ms to start a trial in a
    process that is there)."""
    measured = "cpu_ms" if alone else "ms"
    trial = run[f"searcher_{measured}_per_trial"] / 1e3
    return Costs(
        report=run[f"{'cpu' if alone else 'busy'}_ms_per_report_without_searcher"] / 1e3,
        trial=trial,
        latency=0.02 if alone else max(0.0, run["gap_seconds"]["low"] - trial),
        start=run["first_start_seconds"],
    )


def main() -> None:
    """Measure, compare, project, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    overhead.flags(parser)
    parser.set_defaults(profile=False)
    args = parser.parse_args()
    before = machine(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder
        checked, run = check(args)
    lengths = run.pop("lengths")
    costs = costs_of(run, alone=True)
    result = {
        "machine": before,
        "load_average_at_end": os.getloadavg()[0],
        "overhead": {**run, "mean_epochs": float(np.mean(lengths))},
        "costs": asdict(costs),
        "check": checked,
        "projection": project(costs),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
