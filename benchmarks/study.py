"""A whole search: the published loop under plain Ray Tune against ours, wall-clock.

Both search the temperature and the two weights of KD for the same pair, on the same training
and validation images, with the same number of trials and epochs, ASHA with the same rungs and
the sampler that is the default of each. Each runs in a process of its own, and the clock runs
from its start to its end: start-up of Ray, data, and the filling of the teacher's table are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, spread

PAIR = "resnet56a-resnet20"
TEACHER_FILE = "teachers/cifar10_resnet56a_jpeg.th"  # below the data root
EPOCHS, TRIALS, VALIDATION, REDUCTION = 8, 16, 0.2, 3
RUNGS = (1, 3)  # where Ray's ASHA has them, with this reduction
SPACE = {
    "temperature": {"low": 1.0, "high": 10.0, "log": True},
    "ce_weight": {"low": 0.05, "high": 2.0, "log": True},
    "kd_weight": {"low": 0.1, "high": 20.0, "log": True},
}


def measure(args: argparse.Namespace, note: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """(details, flat ratios): each side `args.study_rounds` times, taking turns."""
    found: dict[str, list[dict[str, float]]] = {"reference": [], "ours": []}
    for index in range(args.study_rounds):
        for side, results in found.items():
            results.append(_in_own_process(side, args, seed=index))
            note(f"study round {index + 1}/{args.study_rounds}: {side} {results[-1]}")
    whole = [[row["seconds"] for row in rows] for rows in found.values()]
    # How many epochs the rungs let through is luck on either side: the ratios by epoch beside.
    by_epoch = [[row["seconds"] / row["epochs_trained"] for row in rows] for rows in found.values()]
    spreads = {
        "study/reference_over_ours": ratio(*whole),
        "study/reference_over_ours_per_epoch": ratio(*by_epoch),
        "study/overhead_share": spread([row["overhead_share"] for row in found["ours"]]),
    }
    medians = {name: values["median"] for name, values in spreads.items()}
    return found | {"setup": _setup(args), "spreads": spreads}, medians


def _setup(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset": args.dataset,
        "pair": args.study_pair,
        "images": args.train_subset,
        "validation_fraction": VALIDATION,
        "trials": TRIALS,
        "epochs": EPOCHS,
        "n": args.study_rounds,
    }


def _in_own_process(side: str, args: argparse.Namespace, *, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "benchmarks.study", side, folder,
            "--dataset", args.dataset, "--study-pair", args.study_pair,
            "--train-subset", str(args.train_subset), "--seed", str(seed),
        ]  # fmt: skip
        for flag in ("data_root", "teacher_weights", "teacher_normalization"):
            if getattr(args, flag):
                command += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
        # An empty teacher cache: its filling is part of the price. The decoded images are
        # there for neither side.
        environment = {**os.environ, "EKD_CACHE_DIR": folder + "/cache", "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    slots = result.pop("slots")
    return {
        "seconds": seconds,
        **result,
        "overhead_share": 1 - result["trained_seconds"] / (slots * seconds),
    }


def _base(args: argparse.Namespace) -> Any:
    from ekd_ray.config import DistillConfig

    teacher, _, student = args.study_pair.partition("-")
    return DistillConfig(
        dataset=args.dataset,
        teacher=teacher,
        student=student,
        teacher_weights=args.teacher_weights,
        teacher_normalization=args.teacher_normalization,
        teacher_cache="on",
        method="kd",
        temperature=4.0,
        ce_weight=0.1,
        kd_weight=0.9,
        epochs=EPOCHS,
        train_subset=args.train_subset,
        validation_fraction=VALIDATION,
    )


class _Silent:
    """An observer that shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def ours(out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Our search, through the same calls as a launcher's."""
    from ekd_ray.config import StudyConfig
    from ekd_ray.data import load_dataset
    from ekd_ray.scale.cluster import connected, local_cpus
    from ekd_ray.scale.search import search
    from ekd_ray.studies.pipeline import check_study, open_run

    config = check_study(
        StudyConfig(
            distill=_base(args), space=SPACE, trials=TRIALS, reduction_factor=REDUCTION,
            rungs=RUNGS, data_root=args.data_root, baselines=("none",), seed=args.seed,
        )
    )  # fmt: skip
    study = open_run(out / "study", config, resume=False)
    load_dataset(args.dataset, "train", data_root=args.data_root)
    with connected(config):
        search(study.path, config, config.distill, _Silent())
    records = study.records()
    return {
        "slots": local_cpus(),
        "epochs_trained": sum(len(record.history) for record in records),
        "trained_seconds": sum(record.seconds for record in records),
        "best_val_top1": max(record.value("val_top1") or 0.0 for record in records),
    }


def reference(out: Path, args: argparse.Namespace) -> dict[str, float]:
    """The published loop as a function trainable, with Ray's own search and scheduler."""
    from ray import init, tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from ekd_ray.scale.cluster import local_cpus

    init(num_cpus=local_cpus(), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    space = {name: tune.loguniform(r["low"], r["high"]) for name, r in SPACE.items()}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, args=vars(args)), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="val_top1",
            mode="max",
            num_samples=TRIALS,
            search_alg=OptunaSearch(seed=args.seed),
            scheduler=ASHAScheduler(
                max_t=EPOCHS, grace_period=1, reduction_factor=REDUCTION, stop_last_trials=False
            ),
        ),
        run_config=tune.RunConfig(storage_path=str(out / "ray"), verbose=0),
    )
    results = tuner.fit()
    frames = [found.metrics_dataframe for found in results]
    return {
        "slots": local_cpus(),
        "epochs_trained": sum(len(frame) for frame in frames),
        "trained_seconds": float(sum(frame["train_seconds"].sum() for frame in frames)),
        "best_val_top1": float(max(frame["val_top1"].max() for frame in frames)),
    }


def _trial(config: dict[str, float], args: dict[str, Any]) -> None:
    """One trial as the research code would do it: everything is loaded again."""
    import numpy as np
    import torch
    from ray import tune
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from benchmarks.reference import Pictures, Reference, kd_loss
    from ekd_ray.config.normalization import parse_normalization
    from ekd_ray.data import dataset_info, load_dataset
    from ekd_ray.engine.resolve import resolve
    from ekd_ray.engine.rundata import split_ids
    from ekd_ray.models import build_model, load_weights

    base = resolve(_base(argparse.Namespace(**args)), data_root=args["data_root"])
    arrays = load_dataset(base.dataset, "train", data_root=args["data_root"])
    train_ids, validation_ids = split_ids(base, arrays.labels)
    train, held = Pictures(arrays, train_ids), Pictures(arrays, validation_ids)  # type: ignore[arg-type]
    # One normalisation for both networks, as in that code: the teacher's.
    statistics = parse_normalization(str(base.teacher_normalization))
    normal = transforms.Normalize(statistics.mean, statistics.std)
    train.transform.transforms[-1] = normal
    held.transform = transforms.Compose([transforms.ToTensor(), normal])
    classes = dataset_info(base.dataset).num_classes
    teacher = build_model(str(base.teacher), classes)
    load_weights(teacher, str(base.teacher_weights))
    torch.manual_seed(0)
    student = build_model(base.student, classes)

    loss = partial(
        kd_loss,
        temperature=config["temperature"],
        ce_weight=config["ce_weight"],
        kd_weight=config["kd_weight"],
    )
    run = Reference(student, teacher, train, batch_size=base.batch_size, loss=loss)
    validation = DataLoader(held, batch_size=base.batch_size, num_workers=2)
    milestones = [round(m * EPOCHS) for m in base.lr_milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(run.optimizer, milestones, base.lr_decay)
    for _ in range(EPOCHS):
        started = time.perf_counter()
        for images, target in run.loader:
            run.step(images, target)
        schedule.step()
        student.eval()
        with torch.no_grad():
            right = [(student(x).argmax(1) == y).float().numpy() for x, y in validation]
        tune.report(
            {
                "val_top1": float(np.concatenate(right).mean()),
                "train_seconds": time.perf_counter() - started,
            }
        )


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the study and its data."""
    parser.add_argument("--study-pair", default=PAIR, metavar="T-S")
    parser.add_argument("--dataset", default="cifar10", help="data set of the study (cifar10)")
    parser.add_argument("--train-subset", type=int, default=1000, metavar="N")
    parser.add_argument("--data-root", metavar="DIR")
    parser.add_argument("--teacher-weights", metavar="FILE", help="the study's teacher")
    parser.add_argument("--teacher-normalization", metavar="NAME")


def find_teacher(args: argparse.Namespace) -> None:
    """Fill in the data root and, for the default pair, the teacher that lies there."""
    args.data_root = args.data_root or os.environ.get("EKD_DATA_ROOT")
    if args.data_root and not args.teacher_weights:
        path = Path(args.data_root) / TEACHER_FILE
        if args.study_pair == PAIR and path.exists():
            args.teacher_weights = str(path)
            args.teacher_normalization = "imagenet"


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("reference", "ours"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    flags(parser)
    args = parser.parse_args()
    result = {"reference": reference, "ours": ours}[args.side](args.out, args)
    (args.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _main()
