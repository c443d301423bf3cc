"""What the launchers share: flags, how they become a configuration, and how errors end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, load_yaml, parse_yaml
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.recipes import find_recipe, load_recipe, merge, with_epochs

SEARCH_SPACES = Path(__file__).resolve().parent.parent / "search_spaces"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Flags that are settings of DistillConfig under the same name.
_RUN_FLAGS = (
    "dataset",
    "teacher",
    "student",
    "teacher_weights",
    "teacher_normalization",
    "method",
    "train_subset",
    "seed",
)
_STUDY_FLAGS = {
    "trials": "trials",
    "seeds": "confirm_seeds",
    "top_k": "confirm_top_k",
    "max_concurrent": "max_concurrent",
    "workers_per_trial": "workers_per_trial",
    "cpus_per_trial": "cpus_per_trial",
    "gpus_per_trial": "gpus_per_trial",
    "data_root": "data_root",
}


def run(main: Callable[[], int | None]) -> None:
    """Run a launcher's main and leave with its exit code: 0 done, 1 a check said no,
    2 the user's mistake (one sentence, no traceback), 130 interrupted."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: run the same command with --resume to continue.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def parser(description: str, *, pair: bool = True, search: bool = False) -> argparse.ArgumentParser:
    """A launcher's argument parser with the shared flags.

    Args:
        pair: add what names a teacher, a student and a method; search: add the flags of a
            search and of its confirmation.
    """
    made = argparse.ArgumentParser(description=description)
    what = made.add_argument_group("what to train")
    what.add_argument(
        "--dataset", help="cifar10, cifar100 (default), digits (no download) or synthetic"
    )
    if pair:
        _pair_flags(what)
    what.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable"
    )
    what.add_argument("--epochs", type=int, help="epochs of a full run")
    what.add_argument("--train-subset", type=int, metavar="N", help="draw N training images")
    what.add_argument("--seed", type=int, help="seed of weights, order, views and search (0)")
    if search:
        _search_flags(made)
    where = made.add_argument_group("where and how")
    where.add_argument("--out", metavar="RUN", help="folder of the results (default: below runs/)")
    where.add_argument(
        "--data-root", metavar="DIR", help="folder of the data sets (default: $EKD_DATA_ROOT)"
    )
    where.add_argument("--download", action="store_true", help="fetch missing CIFAR archives")
    where.add_argument("--cpus-per-trial", type=int, metavar="N", help="CPU threads per worker")
    where.add_argument("--resume", action="store_true", help="continue an interrupted run")
    where.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    where.add_argument("--quiet", action="store_true", help="no progress, results only")
    where.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return made


def _pair_flags(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--pair", metavar="T-S", help="teacher-student pair that has a recipe")
    what.add_argument("--teacher", help="teacher architecture")
    what.add_argument("--student", help="student architecture")
    what.add_argument("--teacher-weights", metavar="FILE", help="the teacher's checkpoint")
    what.add_argument(
        "--teacher-normalization",
        metavar="NAME",
        help="imagenet, cifar10, cifar100, half or mean,mean,mean/std,std,std",
    )
    what.add_argument("--method", help="none, evidential, kd or ekd (default: the recipe's)")
    what.add_argument("--space", metavar="FILE", help="recipe to use instead of the pair's own")


def _search_flags(made: argparse.ArgumentParser) -> None:
    search = made.add_argument_group("search")
    search.add_argument("--trials", type=int, help="configurations to try")
    search.add_argument("--seeds", type=int, help="seeds per finalist and baseline")
    search.add_argument("--top-k", type=int, help="finalists that are confirmed")
    search.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once")
    search.add_argument("--workers-per-trial", type=int, metavar="N", help="Ray Train workers")
    search.add_argument("--gpus-per-trial", type=float, metavar="X", help="GPUs per worker")


def study_config(args: argparse.Namespace) -> StudyConfig:
    """The study that the flags describe: recipe, then flags, then --set.

    Raises:
        UserError: an unknown name, or a value out of its bounds.
    """
    values, where = _study_values(args)
    return StudyConfig.from_dict(values, where=where)


def distill_config(args: argparse.Namespace) -> DistillConfig:
    """One run: a `--config` file, or the pair's recipe with the authors' values."""
    if args.config:
        if args.pair or args.space:
            raise UserError("--config is complete by itself: drop --pair and --space.")
        _absolute_data_root(args)
        values = DistillConfig.from_yaml(args.config).to_dict()
        return _run_config(values, args, where=args.config)
    values, where = _study_values(args)
    study = StudyConfig.from_dict({**values, "space": None}, where=where)
    fixed = {text.partition("=")[0] for text in args.set}
    authors = {k: v for k, v in (study.authors or {}).items() if k not in fixed}
    return DistillConfig.from_dict({**study.distill.to_dict(), **authors}, where=where)


def teacher_run_config(args: argparse.Namespace) -> DistillConfig:
    """A network trained alone: `--model`, evidential with a learned prior, or plain."""
    _absolute_data_root(args)
    values: dict[str, Any] = {"student": args.model, "method": "none"}
    if args.evidential:
        values |= {"method": "evidential", "learn_log_prior": True}
    return _run_config(values, args, where="flags")


def _run_config(values: dict[str, Any], args: argparse.Namespace, *, where: str) -> DistillConfig:
    for key in (*_RUN_FLAGS, "epochs"):
        if getattr(args, key, None) is not None:
            values[key] = getattr(args, key)
    for text in args.set:
        key, value = _parse_set(text)
        values[key] = value
    return DistillConfig.from_dict(_absolute_weights(values), where=where)


def _absolute_data_root(args: argparse.Namespace) -> None:
    """The data root as seen from here: trials run in other folders."""
    args.data_root = args.data_root or os.environ.get("EKD_DATA_ROOT")
    if args.data_root:
        args.data_root = _absolute(args.data_root)


def _absolute_weights(distill: dict[str, Any]) -> dict[str, Any]:
    """The same for the teacher's checkpoint, wherever it was named: flag, --set or recipe."""
    weights = distill.get("teacher_weights")
    if isinstance(weights, str):
        return {**distill, "teacher_weights": _absolute(weights)}
    return distill


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _study_values(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`StudyConfig`'s values from recipe and flags, and the name of the recipe."""
    _absolute_data_root(args)
    if args.resume and args.out and not (args.pair or args.student or args.space):
        recipe = Path(args.out) / "study.yaml"
        values = load_yaml(recipe).get("study") or {}
    else:
        recipe = recipe_path(args)
        values = load_recipe(recipe)
    if args.epochs is not None:
        if args.epochs < 1:
            raise UserError(f"epochs must be >= 1, got {args.epochs}.")
        values = with_epochs(values, args.epochs)
    if args.method is not None:
        values = _under_method(values, args.method)
    given = {key: getattr(args, key) for key in _RUN_FLAGS if getattr(args, key) is not None}
    values = merge(values, {"distill": given})
    for flag, name in _STUDY_FLAGS.items():
        if getattr(args, flag, None) is not None:
            values[name] = getattr(args, flag)
    if args.seed is not None:
        values["seed"] = args.seed
    for text in args.set:
        values = _set(values, text)
    values["distill"] = _absolute_weights(values["distill"])
    return values, str(recipe)


def recipe_path(args: argparse.Namespace) -> Path:
    """The recipe that --space, --pair, or --teacher and --student name."""
    if args.space:
        return Path(args.space)
    dataset = args.dataset or DistillConfig().dataset
    if args.pair:
        return find_recipe(SEARCH_SPACES, dataset, args.pair)
    if args.student:
        own = SEARCH_SPACES / dataset / f"{args.teacher}-{args.student}.yaml"
        return own if own.exists() else SEARCH_SPACES / "default.yaml"
    raise UserError("name what to distil: --pair T-S, or --teacher T --student S.")


def _under_method(values: dict[str, Any], method: str) -> dict[str, Any]:
    """The recipe under another method: its method settings and their ranges do not carry over."""
    from ekd_ray.losses.objective import METHOD_SETTINGS, METHODS

    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("method", method, METHODS)
    distill = values.get("distill") or {}
    if distill.get("method", DistillConfig().method) == method:
        return values
    kept = {k: v for k, v in distill.items() if k not in METHOD_SETTINGS}
    space = values.get("space") or {}
    unused = set(METHOD_SETTINGS) - set(METHODS[method].uses)
    return {
        **values,
        "distill": {**kept, "method": method},
        "space": {k: v for k, v in space.items() if k not in unused and k != "method"},
        "authors": None,
        "first_points": [],
    }


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, got {text!r}.")
    return key, parse_yaml(raw, where=f"--set {key}")


def _set(values: dict[str, Any], text: str) -> dict[str, Any]:
    """Apply one --set KEY=VALUE; a setting that is fixed so is no longer searched."""
    key, value = _parse_set(text)
    if key == "method":
        return _under_method(values, value)
    if key in DistillConfig.names():
        space = {k: v for k, v in (values.get("space") or {}).items() if k != key}
        return {**merge(values, {"distill": {key: value}}), "space": space}
    if key in StudyConfig.names():
        return {**values, key: value}
    raise unknown_name("setting in --set:", key, (*DistillConfig.names(), *StudyConfig.names()))
