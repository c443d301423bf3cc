"""The cost of speed in accuracy: bfloat16 and cached logits against float32 and the live teacher.

python -m benchmarks.accuracy --seeds 6 --json out.json

Both sides train the same configuration under the same seeds, so that differences are paired. The
score is the validation split's; the test split is not read. On hardware without bfloat16 the
first side is slow, not different.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.study import find_teacher
from benchmarks.study import flags as study_flags
from ekd_ray.config import DistillConfig
from ekd_ray.files import write_json
from ekd_ray.losses.methods import with_method
from ekd_ray.results.paired import LEVEL, paired_difference
from ekd_ray.scale.cluster import local_cpus

SIDES: dict[str, dict[str, Any]] = {
    "fast": {"precision": "bfloat16", "teacher_cache": "on"},
    "exact": {"precision": "float32", "teacher_cache": "off"},
}
METRICS = ("val_top1", "val_nll", "val_ece")
VALIDATION = 0.5


def run(settings: dict[str, Any], data_root: str) -> dict[str, float]:
    """Train one configuration on one thread; the last epoch's validation figures."""
    from ekd_ray.engine.distill import distill

    found = distill(DistillConfig.from_dict(settings), data_root=data_root, threads=1).metrics
    return {name: found[name] for name in METRICS}


def configuration(args: argparse.Namespace, side: str, seed: int) -> DistillConfig:
    """The run of one side under a seed; with one split for all of them."""
    teacher, _, student = args.study_pair.partition("-")
    base = DistillConfig(
        dataset=args.dataset, teacher=teacher, student=student,
        teacher_weights=args.teacher_weights, teacher_normalization=args.teacher_normalization,
        train_subset=args.train_subset, validation_fraction=VALIDATION, epochs=args.epochs,
        lr=args.lr, seed=seed, split_seed=0, **SIDES[side],
    )  # fmt: skip
    return with_method(base, args.method)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of both sides by seed, and their paired differences (fast minus exact)."""
    jobs = [(side, seed) for seed in range(args.seeds) for side in SIDES]
    # The runs are many and small: one thread each, as many at once as there are cores.
    with ProcessPoolExecutor(local_cpus(), mp_context=get_context("spawn")) as pool:
        settings = [configuration(args, side, seed).to_dict() for side, seed in jobs]
        rows: list[tuple[str, dict[str, float]]] = []
        scores = pool.map(run, settings, [args.data_root] * len(jobs))
        for (side, seed), row in zip(jobs, scores, strict=True):
            print(side, seed, row, flush=True)
            rows.append((side, row))
    found: dict[str, Any] = {"level": LEVEL}
    for metric in METRICS:
        fast, exact = ([row[metric] for side, row in rows if side == name] for name in SIDES)
        difference = paired_difference(fast, exact)
        found[metric] = {
            side: {"mean": statistics.fmean(v), "sd": statistics.stdev(v), "values": v}
            for side, v in (("fast", fast), ("exact", exact))
        }
        found[metric]["difference"] = vars(difference)
    return found


def main() -> None:
    """Train both sides, print and write what they differ by."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    study_flags(parser)
    parser.add_argument("--method", default="ekd", metavar="NAME")
    parser.add_argument("--epochs", type=int, default=10, metavar="N")
    parser.add_argument("--lr", type=float, default=0.0125, metavar="X")
    parser.add_argument("--seeds", type=int, default=6, metavar="N", help="at least 3 (6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args()
    find_teacher(args)
    if not args.teacher_weights:
        parser.error("needs CIFAR-10 and its teacher: give --data-root and --teacher-weights")
    if args.seeds < 3:
        parser.error(f"--seeds must be >= 3 for an interval, got {args.seeds}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE_DIR"] = folder
        found = measure(args)
    for metric in METRICS:
        print(metric, found[metric])
    if args.json:
        setup = {k: v for k, v in vars(args).items() if k in ("study_pair", "dataset", "method",
                 "epochs", "lr", "seeds", "train_subset")}  # fmt: skip
        write_json(args.json, {"machine": machine(1), "setup": setup, "accuracy": found})


if __name__ == "__main__":
    main()
