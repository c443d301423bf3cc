"""Real learning curves of random configurations, as a table that searches are simulated on.

    python -m benchmarks.curves --configs 200 --out benchmarks/curves/NAME.parquet \
        --data-root DIR --teacher-weights FILE --teacher-normalization imagenet

Every configuration is drawn from the default EKD space and trained for all epochs on the same
training images, validated on the same others; the test split is never opened. What has been
trained is kept in NAME.jsonl beside the table: an interrupted recording goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ekd_ray.cli import SEARCH_SPACES
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.precision import environment
from ekd_ray.recipes import load_recipe, merge, with_epochs
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.space import Space, point_config

EPOCHS, IMAGES, VALIDATION = 9, 2000, 0.5
METRICS = ("val_top1", "val_nll", "val_ece")


def recorded_study(**distill_values: Any) -> StudyConfig:
    """The study whose space and budget are recorded: CIFAR-10, resnet56a -> resnet8.

    Args:
        distill_values: what else all runs share, such as another teacher or student.
    """
    recipe = load_recipe(SEARCH_SPACES / "cifar10" / "resnet56a-resnet8.yaml")
    shared = {
        "train_subset": IMAGES,
        "validation_fraction": VALIDATION,
        "teacher_cache": "on",
        **{name: value for name, value in distill_values.items() if value is not None},
    }
    values = merge(with_epochs(recipe, EPOCHS), {"distill": shared})
    return StudyConfig.from_dict(values)


def points(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The authors' values, then random points of the space."""
    config = recorded_study()
    drawn = Space(config.space).sample(count - 1, seed=seed)
    return [Space(config.space).searched(config.authors or {}), *drawn]


def _record(
    job: tuple[int, dict[str, Any]], base: dict[str, Any], data_root: str | None
) -> dict[str, Any]:
    number, point = job
    config = point_config(DistillConfig.from_dict(base), point)
    rows: list[dict[str, Any]] = []
    failed = None
    try:
        distill(config, data_root=data_root, on_epoch=rows.append, threads=1)
    except Diverged as error:
        failed = str(error)
    curve = [{name: row.get(name) for name in ("epoch", "seconds", *METRICS)} for row in rows]
    return {"number": number, "params": point, "failed": failed, "curve": curve}


def record(count: int, out: Path, base: DistillConfig, data_root: str | None) -> None:
    """Train what is missing of `count` configurations, then write the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".jsonl")
    known = {row["number"]: row for row in _rows(log)}
    jobs = [job for job in enumerate(points(count)) if job[0] not in known]
    train = partial(_record, base=base.to_dict(), data_root=data_root)
    with multiprocessing.get_context("spawn").Pool(local_cpus()) as pool, open(log, "a") as file:
        for row in pool.imap_unordered(train, jobs):
            known[row["number"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            last = (row["curve"] or [{}])[-1].get("val_top1")
            print(f"{len(known)}/{count} number {row['number']} val_top1 {last}", flush=True)
    flat = [
        {"number": row["number"], **row["params"], "failed": row["failed"], **epoch}
        for row in sorted(known.values(), key=lambda row: row["number"])
        for epoch in row["curve"]
    ]
    facts = {"base": base.replace(teacher_weights=None).to_dict(), "environment": environment()}
    table = pa.Table.from_pylist(flat)
    table = table.replace_schema_metadata({"ekd_ray": json.dumps(facts)})
    pq.write_table(table, out)


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description="Record real learning curves.")
    parser.add_argument("--configs", type=int, default=200, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="PARQUET")
    parser.add_argument("--data-root", default=os.environ.get("EKD_DATA_ROOT"), metavar="DIR")
    parser.add_argument("--teacher", metavar="NAME", help="instead of resnet56a")
    parser.add_argument("--student", metavar="NAME", help="instead of resnet8")
    parser.add_argument("--teacher-weights", required=True, metavar="FILE")
    parser.add_argument("--teacher-normalization", metavar="NAME")
    args = parser.parse_args()
    study = recorded_study(
        teacher_weights=str(Path(args.teacher_weights).absolute()),
        teacher_normalization=args.teacher_normalization,
        teacher=args.teacher,
        student=args.student,
    )
    record(args.configs, args.out, study.distill, args.data_root)


if __name__ == "__main__":
    main()
