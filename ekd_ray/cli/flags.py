"""The launchers' flags; what becomes of them is `ekd_ray.cli.request`'s."""

from __future__ import annotations

import argparse
import os


def read(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a launcher. A shell that asks for completions gets these instead."""
    if "_ARGCOMPLETE" in os.environ:
        from ekd_ray.cli.completion import complete

        complete(made)
    return made.parse_args()


def parser(
    description: str, *, pair: bool = True, search: bool = False, home: str | None = None
) -> argparse.ArgumentParser:
    """A launcher's argument parser with the shared flags.

    Args:
        pair: add what names a teacher, a student and a method; search: add the flags of a
            search and of its confirmation.
        home: the folder of `search_spaces/` that pairs are looked up in (the data set's).
    """
    made = argparse.ArgumentParser(description=description)
    made.set_defaults(home=home)
    _add_shared(made, pair=pair)
    if search:
        _search_flags(made)
    where = made.add_argument_group("where and how")
    where.add_argument(
        "--out",
        metavar="RUN",
        help="folder of the results, or s3://BUCKET/FOLDER (default: below runs/)",
    )
    where.add_argument(
        "--data-root", metavar="DIR", help="folder of the data sets (default: $EKD_DATA_ROOT)"
    )
    where.add_argument("--download", action="store_true", help="fetch missing CIFAR archives")
    where.add_argument(
        "--cpus-per-trial",
        "--cpus-per-worker",
        type=int,
        metavar="N",
        help="CPU threads per worker",
    )
    where.add_argument("--resume", action="store_true", help="continue an interrupted run")
    where.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    where.add_argument("--quiet", action="store_true", help="no progress, results only")
    where.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return made


def _add_shared(made: argparse.ArgumentParser, *, pair: bool) -> None:
    """What says which run is meant."""
    what = made.add_argument_group("what to train")
    what.add_argument(
        "--dataset",
        "--data",
        metavar="NAME",
        help="cifar10, cifar100 (the default of CIFAR pairs), tiny_imagenet, imagenet, "
        "folder:PATH, digits (no download) or synthetic",
    )
    if pair:
        _pair_flags(what)
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, or a range to search it (log:LOW:HIGH, range:LOW:HIGH[:STEP], "
        "choice:A,B); repeatable",
    )
    what.add_argument("--epochs", type=int, help="epochs of a full run")
    what.add_argument("--train-subset", type=int, metavar="N", help="draw N training images")
    what.add_argument("--seed", type=int, help="seed of weights, order, views and search (0)")
    what.add_argument(
        "--ood-dataset", metavar="NAME", help="second data set, for out-of-distribution AUROC"
    )


def cache_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `launchers/cache.py`: ls, fill, verify and rm."""
    made = argparse.ArgumentParser(description=description)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("ls", help="tables, how full they are and what they take")
    fill = commands.add_parser("fill", help="compute the logits that runs will read")
    fill.set_defaults(home=None, config=None, resume=False)
    _add_shared(fill, pair=True)
    fill.add_argument(
        "--seeds", dest="run_seeds", default="0", metavar="LIST", help="seeds of the runs (0)"
    )
    fill.add_argument("--data-root", metavar="DIR", help="folder of the data sets")
    fill.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    fill.add_argument("--quiet", action="store_true", help="no progress")
    verify = commands.add_parser("verify", help="compare every check word of a table")
    remove = commands.add_parser("rm", help="remove tables")
    for command in (verify, remove):
        command.add_argument("tables", nargs="*", metavar="TABLE", help="name, or its beginning")
    remove.add_argument("--all", action="store_true", help="every table")
    remove.add_argument(
        "--unused-days", type=float, metavar="N", help="those not written to for so many days"
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="results as JSON")
    return made


def space_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `launchers/space.py`: show."""
    made = argparse.ArgumentParser(description=description)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="ranges, sampled points and shared settings of a file")
    show.add_argument("space", metavar="FILE", help="recipe in YAML, see search_spaces/")
    show.add_argument("--method", help="the recipe under another method, or any")
    show.add_argument("--points", type=int, default=5, metavar="N", help="points to sample (5)")
    show.add_argument("--seed", type=int, default=0, help="seed of the points (0)")
    show.add_argument("--json", action="store_true", help="points and settings as JSON")
    return made


def export_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `launchers/export_best.py`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("run", metavar="RUN", help="folder of a finished study")
    made.add_argument("--out", required=True, metavar="DIR", help="folder of the bundle to write")
    made.add_argument(
        "--format", metavar="LIST", help="also as programs: pt2 (torch.export), onnx, or pt2,onnx"
    )
    made.add_argument(
        "--normalized-input",
        action="store_true",
        help="these take normalised images (default: images in [0, 1])",
    )
    made.add_argument("--data-root", metavar="DIR", help="folder of the data sets, for --verify")
    made.add_argument(
        "--verify", action="store_true", help="also evaluate the stored weights on the test split"
    )
    made.add_argument("--dry-run", action="store_true", help="say what would be exported")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")
    made.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return made


def reproduce_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `launchers/reproduce.py`."""
    made = argparse.ArgumentParser(
        description=description,
        epilog="Prints bit-identical, within-tolerance or different, and where the runs parted "
        "first. Exit codes: 0 the first two, 1 different (with --exact also the second), 2 a "
        "mistake in what was given, 130 interrupted.",
    )
    made.add_argument("bundle", metavar="BUNDLE", help="folder that export_best.py wrote")
    made.add_argument("--data-root", metavar="DIR", help="folder of the data sets")
    made.add_argument("--dataset", metavar="NAME", help="the same data elsewhere: folder:PATH")
    made.add_argument("--download", action="store_true", help="fetch missing CIFAR archives")
    made.add_argument(
        "--teacher-weights",
        metavar="FILE",
        help="the teacher's checkpoint (default: the study's own, by its hash)",
    )
    made.add_argument("--out", metavar="RUN", help="folder of the run (default: below runs/)")
    made.add_argument("--resume", action="store_true", help="continue an interrupted run")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (as recorded)")
    made.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of the test accuracy, a fraction (2.8 sd of the seeds, at least 0.005)",
    )
    made.add_argument("--exact", action="store_true", help="1 unless bit-identical")
    made.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    made.add_argument("--quiet", action="store_true", help="no progress, the verdict only")
    made.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return made


def _pair_flags(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--pair", metavar="T-S", help="teacher-student pair that has a recipe")
    what.add_argument("--teacher", help="teacher architecture")
    what.add_argument("--student", help="student architecture")
    what.add_argument("--teacher-weights", metavar="FILE", help="the teacher's checkpoint")
    what.add_argument(
        "--teacher-zoo",
        metavar="DIR",
        help="folder of teachers by name, e.g. mdistiller's cifar_teachers",
    )
    what.add_argument(
        "--teacher-normalization",
        metavar="NAME",
        help="imagenet, cifar10, cifar100, half or mean,mean,mean/std,std,std",
    )
    what.add_argument(
        "--method",
        help="the recipe under another method: none, evidential, kd, dkd, mlkd, ctkd, ekd, "
        "dkd+ekd, mlkd+ekd, ctkd+ekd; kd-standardized and the like; any (searched too)",
    )
    what.add_argument("--space", metavar="FILE", help="recipe to use instead of the pair's own")


def _search_flags(made: argparse.ArgumentParser) -> None:
    search = made.add_argument_group("search")
    search.add_argument(
        "--pairs", metavar="LIST", help="'all', or pairs with commas between: a study for each"
    )
    search.add_argument(
        "--methods", metavar="LIST", help="methods with commas between: a study for each"
    )
    search.add_argument("--trials", type=int, help="configurations to try")
    search.add_argument(
        "--extend", type=int, metavar="N", help="N more configurations for the study in --out"
    )
    search.add_argument(
        "--warm-start",
        nargs="+",
        default=[],
        metavar="RUN",
        help="finished studies, the best points of which are tried first",
    )
    search.add_argument(
        "--budget-epochs", type=int, metavar="N", help="start no trial after N epochs in all"
    )
    search.add_argument(
        "--budget-hours", type=float, metavar="X", help="start no trial after X hours of search"
    )
    search.add_argument(
        "--budget-gpu-hours", type=float, metavar="X", help="the same, in GPU-hours of all trials"
    )
    search.add_argument(
        "--objective",
        action="append",
        metavar="NAME",
        help="optimise this too (val_ece, val_nll, val_aurc, parameters, flops, latency_ms, ...): "
        "a Pareto front; repeatable",
    )
    search.add_argument(
        "--constraint",
        action="append",
        metavar="BOUND",
        help="keep a bound, such as 'val_ece<=0.05'; repeatable",
    )
    search.add_argument(
        "--optuna-storage",
        metavar="URL",
        help="keep Optuna's records in a database; ${NAME} stands for an environment variable",
    )
    search.add_argument(
        "--track", metavar="mlflow[:URI]", help="also tell an MLflow server or store of every run"
    )
    search.add_argument("--seeds", type=int, help="seeds per finalist and baseline")
    search.add_argument("--top-k", type=int, help="finalists that are confirmed")
    search.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once")
    search.add_argument("--workers-per-trial", type=int, metavar="N", help="Ray Train workers")
    _gpus(search)
    _address(search)


def add_workers(made: argparse.ArgumentParser) -> None:
    """The flags of a launcher that trains one configuration on several Ray Train workers."""
    group = made.add_argument_group("several workers")
    group.add_argument(
        "--workers",
        default="1",
        metavar="N",
        help="data-parallel Ray Train workers (1); MIN:MAX takes as many as there is room for",
    )
    _gpus(group)
    _address(group)


def _gpus(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpus-per-trial", "--gpus-per-worker", type=float, metavar="X", help="GPUs per worker"
    )


def _address(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to run on, or auto for one of this machine (default: $RAY_ADDRESS, "
        "else a Ray of its own)",
    )
