"""Flags become a configuration: recipe, then flags, then `--set`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, load_yaml, parse_yaml
from ekd_ray.errors import UserError, at, unknown_name
from ekd_ray.remote.location import is_uri, parse_location, working_copy
from ekd_ray.studies.recipes import (
    Origin,
    find_recipe,
    known_pairs,
    load_recipe,
    merge,
    select_method,
    with_epochs,
)

SEARCH_SPACES = Path(__file__).resolve().parents[2] / "search_spaces"

# Flags that are settings of DistillConfig under the same name.
_RUN_FLAGS = (
    "dataset",
    "teacher",
    "student",
    "teacher_weights",
    "teacher_normalization",
    "train_subset",
    "ood_dataset",
    "seed",
)
_STUDY_FLAGS = {
    "trials": "trials",
    "budget_epochs": "budget_epochs",
    "budget_hours": "budget_hours",
    "budget_gpu_hours": "budget_gpu_hours",
    "objective": "objectives",
    "constraint": "constraints",
    "optuna_storage": "optuna_storage",
    "track": "track",
    "seeds": "confirm_seeds",
    "top_k": "confirm_top_k",
    "max_concurrent": "max_concurrent",
    "workers_per_trial": "workers_per_trial",
    "cpus_per_trial": "cpus_per_trial",
    "gpus_per_trial": "gpus_per_trial",
    "data_root": "data_root",
}


def recipe_config(args: argparse.Namespace) -> StudyConfig:
    """The study that a recipe alone describes; sets `args.origins` as `study_configs` does."""
    values = load_recipe(args.space, args.method)
    origin = Origin(path=Path(args.space), values=values, method=args.method)
    args.origins = {"": origin}
    return _study(origin)


def study_config(args: argparse.Namespace) -> StudyConfig:
    """The study that the flags describe: recipe, then flags, then --set.

    Raises:
        UserError: an unknown name, or a value out of its bounds.
    """
    return _study(_study_values(args))


def _study(origin: Origin) -> StudyConfig:
    with origin.lines():
        return StudyConfig.from_dict(origin.values, where=str(origin.path))


def study_configs(args: argparse.Namespace) -> dict[str, StudyConfig]:
    """Every study that the flags ask for, by its folder below --out; one alone has "".

    `--pairs` and `--methods` make a study for each pair and each method, `<pair>/<method>`.
    Sets `args.origins`: where each was read, for errors that are only found later.
    """
    _locate(args)
    if not (args.pairs or args.methods):
        args.origins = {"": _study_values(args)}
        return {"": _study(args.origins[""])}
    if args.pairs and (args.pair or args.student or args.space):
        raise UserError("--pairs names its recipes by itself: drop --pair, --student and --space.")
    if args.methods and args.method:
        raise UserError("give --method for one study or --methods for several, not both.")
    pairs = [args.pair]
    if args.pairs:
        pairs = known_pairs(SEARCH_SPACES, recipe_home(args))
        if args.pairs != "all":
            pairs = _names("--pairs", args.pairs)
    configs, args.origins = {}, {}
    for pair in pairs:
        for method in _names("--methods", args.methods) if args.methods else [args.method]:
            one = argparse.Namespace(**{**vars(args), "pair": pair, "method": method})
            origin = _study_values(one)
            config = _study(origin)
            shared = config.distill
            name = pair or f"{shared.teacher or 'none'}-{shared.student}"
            configs[f"{name}/{method or shared.method}"] = config
            args.origins[f"{name}/{method or shared.method}"] = origin
    args.data_root = one.data_root
    return configs


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{flag} takes different names with commas between, got {text!r}.")
    return names


def distill_config(args: argparse.Namespace) -> DistillConfig:
    """One run: a `--config` file, or the pair's recipe with the authors' values.

    `--resume --out RUN` alone is the run that RUN holds.
    """
    for text in args.set:
        if _parse_range(*_parse_set(text)) is not None:
            raise UserError(
                f"one run searches nothing: give --set {text.partition('=')[0]} a value."
            )
    _locate(args)
    if _continues(args) and not args.config:
        args.config = str(_header(args) / "config.yaml")
    if args.config:
        if args.pair or args.space:
            raise UserError("--config is complete by itself: drop --pair and --space.")
        _absolute_data_root(args)
        values = DistillConfig.from_yaml(args.config).to_dict()
        return _run_config(values, args, where=args.config)
    origin, where = _study_values(args), "the authors' values"
    with origin.lines():
        study = StudyConfig.from_dict({**origin.values, "space": None}, where=str(origin.path))
        fixed = {text.partition("=")[0] for text in args.set}
        authors = {k: v for k, v in (study.authors or {}).items() if k not in fixed}
        with at("authors"):
            config = DistillConfig.from_dict({**study.distill.to_dict(), **authors}, where=where)
    return config


def teacher_run_config(args: argparse.Namespace) -> DistillConfig:
    """A network trained alone: `--model`, evidential with a learned prior, or plain."""
    _locate(args)
    _absolute_data_root(args)
    values: dict[str, Any] = {"student": args.model, "method": "none"}
    if args.evidential:
        values |= {"method": "evidential", "learn_log_prior": True}
    return _run_config(values, args, where="flags")


def _run_config(values: dict[str, Any], args: argparse.Namespace, *, where: str) -> DistillConfig:
    for key in (*_RUN_FLAGS, "method", "epochs"):
        if getattr(args, key, None) is not None:
            values[key] = getattr(args, key)
    for text in args.set:
        key, value = _parse_set(text)
        values[key] = value
    return DistillConfig.from_dict(_absolute_paths(values), where=where)


def _absolute_data_root(args: argparse.Namespace) -> None:
    """The data root as seen from here: trials run in other folders."""
    args.data_root = args.data_root or os.environ.get("EKD_DATA_ROOT")
    if args.data_root:
        args.data_root = _absolute(args.data_root)


def _absolute_paths(distill: dict[str, Any]) -> dict[str, Any]:
    """The same for checkpoint and image folders, wherever named: flag, --set or recipe."""
    changes = {}
    weights = distill.get("teacher_weights")
    if isinstance(weights, str):
        changes["teacher_weights"] = _absolute(weights)
    for name in ("dataset", "ood_dataset"):
        kind, colon, path = str(distill.get(name)).partition(":")
        if colon and kind == "folder":
            changes[name] = f"folder:{_absolute(path)}"
    return {**distill, **changes}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _study_values(args: argparse.Namespace) -> Origin:
    """`StudyConfig`'s values from recipe and flags, and where they come from."""
    _absolute_data_root(args)
    method = _method_flag(args)
    root: tuple[str, ...] = ()
    if _continues(args):
        recipe, root = _header(args) / "study.yaml", ("study",)
        values = select_method(load_yaml(recipe).get("study") or {}, method)
    else:
        recipe = recipe_path(args)
        values = load_recipe(recipe, method)
    origin = Origin(path=recipe, values=values, method=method, root=root)
    if args.epochs is not None:
        if args.epochs < 1:
            raise UserError(f"epochs must be >= 1, got {args.epochs}.")
        with origin.lines():
            values = with_epochs(values, args.epochs)
    given = {key: getattr(args, key) for key in _RUN_FLAGS if getattr(args, key) is not None}
    values = merge(values, {"distill": given})
    for flag, name in _STUDY_FLAGS.items():
        if getattr(args, flag, None) is not None:
            values[name] = getattr(args, flag)
    if args.seed is not None:
        values["seed"] = args.seed
    if getattr(args, "extend", None) is not None:
        values["trials"] = _extended(values, args)
    for text in args.set:
        values = _set(values, text)
    values["distill"] = _absolute_paths(_from_zoo(values["distill"], args))
    return replace(origin, values=values)


def _locate(args: argparse.Namespace) -> None:
    """Where the results go: `args.out` a folder, `args.location` the URI that it is a copy of.

    Args:
        args: `out` becomes this machine's working copy if it is a URI.
    """
    args.location = None
    if is_uri(getattr(args, "out", None)):  # what only fills a cache has none
        found = parse_location(args.out)
        args.location = None if isinstance(found, Path) else found
        args.out = str(found if isinstance(found, Path) else working_copy(found))


def _header(args: argparse.Namespace) -> Path:
    """The folder whose header says what `--resume --out RUN` continues."""
    if getattr(args, "location", None) is None:
        return Path(args.out)
    from ekd_ray.remote.session import header_folder

    return header_folder(args.location)


def _continues(args: argparse.Namespace) -> bool:
    """Whether `--resume --out RUN` stands alone, so that RUN itself says what it is."""
    return bool(args.resume and args.out and not (args.pair or args.student or args.space))


def _extended(values: Mapping[str, Any], args: argparse.Namespace) -> int:
    """The number of trials of a study that is continued with --extend."""
    if not args.resume or not args.out:
        raise UserError("--extend continues a study: add --resume and --out RUN.")
    if args.trials is not None or args.extend < 1:
        raise UserError(
            f"give --trials for the whole number, or --extend >= 1 for what is added, got "
            f"--extend {args.extend}" + (f" and --trials {args.trials}." if args.trials else ".")
        )
    there = load_yaml(_header(args) / "study.yaml").get("study") or {}
    return int(there.get("trials", StudyConfig().trials)) + args.extend


def _from_zoo(distill: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The teacher's checkpoint out of --teacher-zoo, unless a file is named already."""
    if args.teacher_zoo is None or distill.get("teacher_weights") is not None:
        return distill
    from ekd_ray.models import find_teacher

    if not isinstance(distill.get("teacher"), str):
        raise UserError("--teacher-zoo needs to know the teacher: give --teacher NAME or --pair.")
    path = find_teacher(Path(args.teacher_zoo).expanduser(), distill["teacher"])
    return {**distill, "teacher_weights": str(path)}


def recipe_path(args: argparse.Namespace) -> Path:
    """The recipe that --space, --pair, or --teacher and --student name."""
    if args.space:
        return Path(args.space)
    home = recipe_home(args)
    if args.pair:
        return find_recipe(SEARCH_SPACES, home, args.pair)
    if args.student:
        own = SEARCH_SPACES / home / f"{args.teacher}-{args.student}.yaml"
        base = SEARCH_SPACES / home / "_base.yaml"
        return next((p for p in (own, base) if p.exists()), SEARCH_SPACES / "default.yaml")
    raise UserError("name what to distil: --pair T-S, or --teacher T --student S.")


def recipe_home(args: argparse.Namespace) -> str:
    """The folder of `search_spaces/` with the recipes of this launcher or data set."""
    return str(args.home or args.dataset or DistillConfig().dataset)


def _method_flag(args: argparse.Namespace) -> Any:
    """What --method, or --set method=, asks for; None leaves the recipe's own."""
    chosen = args.method
    for text in args.set:
        key, value = _parse_set(text)
        fixed = _parse_range(key, value) is None
        chosen = value if key == "method" and fixed else chosen
    return chosen


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, got {text!r}.")
    return key, parse_yaml(raw, where=f"--set {key}")


_RANGES = "log:LOW:HIGH, range:LOW:HIGH, range:LOW:HIGH:STEP or choice:A,B,..."


def _parse_range(key: str, value: Any) -> dict[str, Any] | None:
    """A range on the command line as an entry of the space; None for any other value."""
    kind, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or kind not in ("log", "range", "choice"):
        return None
    parts = rest.split("," if kind == "choice" else ":")
    items = [parse_yaml(part, where=f"--set {key}") if part.strip() else None for part in parts]
    if kind == "choice" and None not in items:
        return {"choices": items}
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if numbers and kind == "log" and len(items) == 2:
        return {"low": items[0], "high": items[1], "log": True}
    if numbers and kind == "range" and len(items) in (2, 3):
        return dict(zip(("low", "high", "step"), items, strict=False))
    raise UserError(f"--set {key} takes {_RANGES} to search it, got {value!r}.")


def _set(values: dict[str, Any], text: str) -> dict[str, Any]:
    """Apply one --set KEY=VALUE; a setting that is fixed so is no longer searched.

    A range as value (`_parse_range`) has the setting searched instead.
    """
    key, value = _parse_set(text)
    spec = _parse_range(key, value)
    if spec is not None and key in DistillConfig.names():
        return {**values, "space": {**(values.get("space") or {}), key: spec}}
    if key == "method":  # has chosen the recipe's method already
        return values
    if key in DistillConfig.names():
        space = {k: v for k, v in (values.get("space") or {}).items() if k != key}
        return {**merge(values, {"distill": {key: value}}), "space": space}
    if key in StudyConfig.names():
        return {**values, key: value}
    raise unknown_name("setting in --set:", key, (*DistillConfig.names(), *StudyConfig.names()))
