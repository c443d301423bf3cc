"""Real learning curves of random configurations, as a table that searches are simulated on.

    python -m benchmarks.curves --configs 300 --out benchmarks/curves/NAME.parquet \
        --repeats 30 --seeds 3 \
        --data-root DIR --teacher-weights FILE --teacher-normalization imagenet

Every configuration is drawn from an EKD space (`SPACE`) and trained for all epochs on the same
training images, validated on the same others; the test split is never opened. The first
`--repeats` of them are trained under `--seeds` seeds, which shows what a single score is worth.
What has been trained is kept in NAME.*.jsonl beside the table: an interrupted recording goes on,
and several processes may share one (`--part 1/2` and `--part 2/2`); the table is written by the
one that finds everything there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.environment import environment
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.space import Space, point_config
from ekd_ray.studies.fitting import with_epochs
from ekd_ray.studies.recipes import SEARCH_SPACES, load_recipe, merge

EPOCHS, IMAGES, VALIDATION = 9, 2000, 0.5
METRICS = ("val_top1", "val_nll", "val_ece")
# The EKD space of the tables that there are. They are of the authors' first release: its evidence
# function, and the temperature in the second order too.
SPACE = {
    "log_prior": {"low": -3.0, "high": 1.0},
    "ce_weight": {"low": 0.1, "high": 5.0, "log": True},
    "kd_weight": {"low": 0.1, "high": 20.0, "log": True},
    "ekd_weight": {"low": 0.05, "high": 20.0, "log": True},
    "temperature": {"low": 1.0, "high": 4.0, "log": True},
}
EVIDENCE = "log1p_softplus"


def recorded_study(epochs: int = EPOCHS, **distill_values: Any) -> StudyConfig:
    """The study whose space and budget are recorded: CIFAR-10, resnet56a -> resnet8.

    Args:
        distill_values: what else all runs share, such as another teacher, student or schedule.
    """
    recipe = load_recipe(SEARCH_SPACES / "cifar10" / "resnet56a-resnet8.yaml")
    shared = {
        "train_subset": IMAGES,
        "validation_fraction": VALIDATION,
        "teacher_cache": "on",
        "evidence": EVIDENCE,
        **{name: value for name, value in distill_values.items() if value is not None},
    }
    values = merge(with_epochs(recipe, epochs), {"distill": shared})
    authors = {**values["authors"], "evidence": EVIDENCE}
    return StudyConfig.from_dict({**values, "space": SPACE, "authors": authors})


def points(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The authors' values, then random points of the space."""
    config = recorded_study()
    drawn = Space(config.space).sample(count - 1, seed=seed)
    return [Space(config.space).searched_part(config.authors or {}), *drawn]


Run = tuple[int, int]  # number of the configuration, seed


def runs(count: int, repeats: int, seeds: int) -> list[Run]:
    """The runs to train: the first configurations under further seeds, then all under seed 0."""
    further = [(number, seed) for number in range(repeats) for seed in range(1, seeds)]
    return [*further, *((number, 0) for number in range(count))]


def _record(
    run: Run, given: list[dict[str, Any]], base: Mapping[str, Any], data_root: str | None
) -> dict[str, Any]:
    number, seed = run
    config = point_config(DistillConfig.from_dict(dict(base)), given[number])
    config = config.replace(seed=seed, ekd_temperature=config.to_dict()["temperature"])
    rows: list[dict[str, Any]] = []
    failed = None
    try:
        distill(config, data_root=data_root, on_epoch=rows.append, threads=1)
    except Diverged as error:
        failed = str(error)
    curve = [{name: row.get(name) for name in ("epoch", "seconds", *METRICS)} for row in rows]
    return {
        "number": number,
        "seed": seed,
        "params": given[number],
        "failed": failed,
        "curve": curve,
    }


def record(
    wanted: list[Run],
    out: Path,
    base: DistillConfig,
    data_root: str | None,
    *,
    part: tuple[int, int] = (1, 1),
    processes: int = 1,
) -> None:
    """Train what is missing of this part of the runs; write the table once all are there.

    Args:
        part: (i, n): every n-th run, from the i-th on.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    known = _known(out)
    given = points(max(number for number, _ in wanted) + 1)
    jobs = [run for run in wanted[part[0] - 1 :: part[1]] if run not in known]
    train = partial(_record, given=given, base=base.to_dict(), data_root=data_root)
    log = out.with_suffix(f".{part[0]}-{part[1]}.jsonl")
    if log.exists():  # what a kill cut off must not be written on to
        whole = log.read_bytes()
        log.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with multiprocessing.get_context("spawn").Pool(processes) as pool, open(log, "a") as file:
        for index, row in enumerate(pool.imap_unordered(train, jobs), start=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            last = (row["curve"] or [{}])[-1].get("val_top1")
            print(
                f"{index}/{len(jobs)} number {row['number']} seed {row['seed']} {last}", flush=True
            )
    known = _known(out)
    if not set(wanted) <= known.keys():
        return
    flat = [
        {"number": n, "seed": seed, **row["params"], "failed": row["failed"], **epoch}
        for (n, seed), row in sorted(known.items())
        for epoch in row["curve"]
    ]
    facts = {"base": base.replace(teacher_weights=None).to_dict(), "environment": environment()}
    table = pa.Table.from_pylist(flat)
    table = table.replace_schema_metadata({"ekd_ray": json.dumps(facts)})
    pq.write_table(table, out)


def _known(out: Path) -> dict[Run, dict[str, Any]]:
    """The runs that any part has trained; a line that a kill cut off is trained again."""
    found = {}
    for log in out.parent.glob(f"{out.stem}.*.jsonl"):
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                found[row["number"], row["seed"]] = row
    return found


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description="Record real learning curves.")
    parser.add_argument("--configs", type=int, default=300, metavar="N")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="under all seeds")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the repeated ones")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="one of several processes")
    parser.add_argument("--processes", type=int, default=local_cpus(), metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="PARQUET")
    parser.add_argument("--data-root", default=os.environ.get("EKD_DATA_ROOT"), metavar="DIR")
    parser.add_argument("--teacher", metavar="NAME", help="instead of resnet56a")
    parser.add_argument("--student", metavar="NAME", help="instead of resnet8")
    parser.add_argument("--schedule", metavar="NAME", help="of the learning rate, instead of step")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N")
    parser.add_argument("--teacher-weights", required=True, metavar="FILE")
    parser.add_argument("--teacher-normalization", metavar="NAME")
    args = parser.parse_args()
    study = recorded_study(
        args.epochs,
        schedule=args.schedule,
        teacher_weights=str(Path(args.teacher_weights).absolute()),
        teacher_normalization=args.teacher_normalization,
        teacher=args.teacher,
        student=args.student,
    )
    index, _, of = args.part.partition("/")
    record(
        runs(args.configs, args.repeats, args.seeds), args.out, study.distill, args.data_root,
        part=(int(index), int(of)), processes=args.processes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
