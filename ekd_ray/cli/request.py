"""Flags become a `Request`: a recipe, the flags laid over it, then `--set`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, YamlFile, parse_yaml
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.settings import Settings
from ekd_ray.config.study_config import Gpus
from ekd_ray.errors import UserError, error_context, unknown_name
from ekd_ray.remote.location import Location, is_uri, parse_location, working_copy
from ekd_ray.studies.recipes import (
    SEARCH_SPACES,
    Recipe,
    find_recipe,
    known_pairs,
    merge,
    with_epochs,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The work that the flags ask for, checked as far as neither data nor torch are needed.

    Attributes:
        studies: by their folder below `out`, a single one under the name ""; the recipe also
            locates a mistake that is only found later.
        run: the configuration to train, of a command that searches nothing.
        role: what the plan calls its network.
        candidates: several trainings of it, one of which is chosen.
        out: folder of the results; None for the command's own choice.
        location: the URI that `out` is this machine's copy of.
        workers: `N` or `MIN:MAX`.
        warm_start: finished studies whose best points are tried first.
        test: read the test split once, after the last epoch.
    """

    studies: Mapping[str, Recipe] = field(default_factory=dict)
    run: DistillConfig | None = None
    role: str = "student"
    candidates: Candidates | None = None
    out: Path | None = None
    location: Location | None = None
    data_root: str | None = None
    address: str | None = None
    workers: str = "1"
    cpus_per_trial: int | None = None
    gpus_per_trial: Gpus | None = None
    warm_start: tuple[str, ...] = ()
    test: bool = False
    download: bool = False
    resume: bool = False
    dry_run: bool = False
    quiet: bool = False
    json: bool = False


def study_request(args: argparse.Namespace) -> Request:
    """The studies that the flags describe.

    `--pairs` and `--methods` make a study for each pair and each method, `<pair>/<method>`.

    Raises:
        UserError: an unknown name, or a value out of its bounds.
    """
    if not (args.pairs or args.methods):
        recipe = _recipe(args)
        _ = recipe.config  # refuses a mistake before anything heavy is loaded
        return _request(args, studies={"": recipe})
    if args.pairs and (args.pair or args.student or args.recipe):
        raise UserError("--pairs names its recipes by itself: drop --pair, --student and --space.")
    if args.methods and args.method:
        raise UserError("give --method for one study or --methods for several, not both.")
    pairs = [args.pair]
    if args.pairs:
        known = known_pairs(SEARCH_SPACES, _recipe_home(args))
        pairs = known if args.pairs == "all" else _names("--pairs", args.pairs)
    methods = _names("--methods", args.methods) if args.methods else [args.method]
    studies = {}
    for pair in pairs:
        for method in methods:
            one = argparse.Namespace(**{**vars(args), "pair": pair, "method": method})
            recipe = _without_softmax_row(_recipe(one))
            shared = recipe.config.distill
            name = pair or f"{shared.teacher or 'none'}-{shared.student}"
            studies[f"{name}/{method or shared.method}"] = recipe
    return _request(args, studies=studies)


def run_request(args: argparse.Namespace) -> Request:
    """One run: a `--config` file, or the pair's recipe with the authors' values.

    `--resume --out RUN` alone is the run that RUN holds.
    """
    for text in args.set:
        if _parse_range(*_parse_set(text)) is not None:
            raise UserError(
                f"one run searches nothing: give --set {text.partition('=')[0]} a value."
            )
    file = args.config or (_header(args, "config.yaml") if _is_continued(args) else None)
    if file:
        if args.pair or args.recipe:
            raise UserError("--config is complete by itself: drop --pair and --space.")
        return _request(args, run=_run(args, DistillConfig.from_yaml(file), where=str(file)))
    recipe = _recipe(args)
    recipe = replace(recipe, values={**recipe.values, "space": None})
    study = recipe.config
    fixed = {text.partition("=")[0] for text in args.set}
    authors = {k: v for k, v in (study.authors or {}).items() if k not in fixed}
    values = {**study.distill.to_dict(), **authors}
    with recipe.locate_errors(), error_context("authors"):
        return _request(args, run=DistillConfig.from_dict(values, where="the authors' values"))


def teacher_request(args: argparse.Namespace) -> Request:
    """A network trained alone: `--model`, evidential with a learned prior, or plain.

    Raises:
        UserError: as `study_request`, and for candidates that are illegal or that go together
            with flags of a single training.
    """
    base = DistillConfig(student=args.model, method="none")
    if args.evidential:
        base = base.replace(method="evidential", learn_log_prior=True)
    run = _run(args, base, where="flags")
    if args.seeds and args.seed is not None:
        raise UserError("give --seed for one training or --seeds for several, not both.")
    wanted = {
        "candidates": args.candidate_count, "seeds": args.seeds, "choose_by": args.choose_by
    }  # fmt: skip
    candidates = Candidates.parse(wanted, seed=run.seed)
    run = run.replace(seed=candidates.seeds[0])
    if len(candidates.seeds) == 1:
        if args.choose_by:
            raise UserError(
                "--choose-by chooses among several candidates, got 1: add --candidates K, or drop "
                "it."
            )
        return _request(args, run=run, role="teacher")
    for flag, given in (("--test", args.test), ("--workers", args.workers != "1")):
        if given:
            raise UserError(
                f"{flag} is for one training, got {len(candidates.seeds)} candidates: drop one of "
                "the two flags."
            )
    return _request(args, run=run, role="teacher", candidates=candidates)


def _request(args: argparse.Namespace, **found: Any) -> Request:
    """`found`, and the flags that are no part of a configuration."""
    names = {entry.name for entry in fields(Request)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {"data_root": _data_root(args)}
    if args_out := getattr(args, "out", None):  # what only fills a cache has none
        given["out"], given["location"] = _locate(args_out)
    if "warm_start" in given:
        given["warm_start"] = tuple(given["warm_start"])
    return Request(**given, **found)


def _run(args: argparse.Namespace, base: DistillConfig, *, where: str) -> DistillConfig:
    values = {**base.to_dict(), **_given(args, DistillConfig), **dict(map(_parse_set, args.set))}
    values["plugins"] = _all_plugins(args, base.plugins)
    return DistillConfig.from_dict(_absolute_paths(values), where=where)


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags choose, with their values laid over its own."""
    method = _chosen_method(args)
    if _is_continued(args):
        recipe = Recipe.of_study(_header(args, "study.yaml"), method)
    else:
        recipe = Recipe.load(_recipe_path(args), method)
    values = dict(recipe.values)
    if args.epochs is not None:
        if args.epochs < 1:
            raise UserError(f"epochs must be >= 1, got {args.epochs}.")
        with recipe.locate_errors():
            values = with_epochs(values, args.epochs)
    given = _given(args, DistillConfig)
    given.pop("method", None)  # has chosen the recipe's method already
    given["plugins"] = _all_plugins(args, (values.get("distill") or {}).get("plugins"))
    values = merge(values, {"distill": given}) | _given(args, StudyConfig)
    values |= {"data_root": _data_root(args)} if _data_root(args) else {}
    if getattr(args, "extend", None) is not None:
        values["trials"] = _extended_trials(values, args)
    for text in args.set:
        values = _with_set(values, text)
    values = _from_zoo(values, args)
    values["distill"] = _absolute_paths(values["distill"])
    if isinstance(softmax := values.get("softmax_teacher_weights"), str):
        values["softmax_teacher_weights"] = _absolute(softmax)
    return replace(recipe, values=values)


def _given(args: argparse.Namespace, cls: type[Settings]) -> dict[str, Any]:
    """The settings of a class that have a flag of their own, where it was given."""
    values = vars(args)
    return {name: values[name] for name in cls.names() if values.get(name) is not None}


def _all_plugins(args: argparse.Namespace, named: Iterable[str] | None) -> list[str]:
    """The stamps of the plugins that a file names and of those that flags name."""
    return sorted({*(named or ()), *(getattr(args, "plugins", None) or ())})


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{flag} takes different names with commas between, got {text!r}.")
    return names


def _data_root(args: argparse.Namespace) -> str | None:
    """The data root as seen from here: trials run in other folders."""
    root = args.data_root or os.environ.get("EKD_DATA_ROOT")
    return _absolute(root) if root else None


def _absolute_paths(distill: dict[str, Any]) -> dict[str, Any]:
    """The same for checkpoint and folders of data, wherever named: flag, --set or recipe."""
    changes = {}
    weights = distill.get("teacher_weights")
    if isinstance(weights, str):
        changes["teacher_weights"] = _absolute(weights)
    for name in ("dataset", "ood_dataset"):
        kind, colon, path = str(distill.get(name)).partition(":")
        if colon and kind in ("folder", "hf"):
            changes[name] = f"{kind}:{_absolute(path)}"
    return {**distill, **changes}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _locate(out: str) -> tuple[Path, Location | None]:
    """The folder of the results on this machine, and the URI that it is a copy of, if any."""
    found = parse_location(out) if is_uri(out) else Path(out)
    return (found, None) if isinstance(found, Path) else (working_copy(found), found)


def _header(args: argparse.Namespace, name: str) -> Path:
    """The file that says what `--resume --out RUN` continues."""
    folder, location = _locate(args.out)
    if location is not None:
        from ekd_ray.remote.session import header_folder  # loads pyarrow

        folder = header_folder(location)
    if not (folder / name).is_file():
        raise UserError(
            f"{folder} holds nothing to resume (no {name}): check --out, or drop --resume."
        )
    return folder / name


def _is_continued(args: argparse.Namespace) -> bool:
    """Whether `--resume --out RUN` stands alone, so that RUN itself says what it is."""
    return bool(args.resume and args.out and not (args.pair or args.student or args.recipe))


def _extended_trials(values: Mapping[str, Any], args: argparse.Namespace) -> int:
    """The number of trials of a study that is continued with --extend."""
    if not args.resume or not args.out:
        raise UserError("--extend continues a study: add --resume and --out RUN.")
    if args.trials is not None or args.extend < 1:
        raise UserError(
            f"give --trials for the whole number, or --extend >= 1 for what is added, got "
            f"--extend {args.extend}" + (f" and --trials {args.trials}." if args.trials else ".")
        )
    there = YamlFile.read(_header(args, "study.yaml")).values.get("study") or {}
    return int(there.get("trials", StudyConfig().trials)) + args.extend


def _from_zoo(values: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The teachers' checkpoints out of --teacher-zoo, unless a file is named already."""
    distill = values["distill"]
    wants_softmax = "ekd-softmax" in (values.get("baselines") or ())
    missing = [distill.get("teacher_weights") is None]
    missing += [wants_softmax and values.get("softmax_teacher_weights") is None]
    if args.teacher_zoo is None or not any(missing):
        return values
    # These load torch.
    from ekd_ray.losses.methods import METHODS
    from ekd_ray.models import find_softmax_teacher, find_teacher

    model, folder = distill.get("teacher"), Path(args.teacher_zoo).expanduser()
    if not isinstance(model, str):
        raise UserError("--teacher-zoo needs to know the teacher: give --teacher NAME or --pair.")
    if missing[0]:
        method = METHODS.get(distill.get("method", DistillConfig().method))
        found = find_teacher(folder, model, evidential=method is not None and method.evidential)
        values = {**values, "distill": {**distill, "teacher_weights": str(found)}}
    if missing[1] and (softmax := find_softmax_teacher(folder, model)):
        values = {**values, "softmax_teacher_weights": str(softmax)}
    return values


def _without_softmax_row(recipe: Recipe) -> Recipe:
    """A recipe, one of several, without the baseline ekd-softmax where its method has no such."""
    config = recipe.config
    if "ekd-softmax" not in config.baselines:
        return recipe
    from ekd_ray.losses.methods import method_of  # loads torch

    if method_of(config.distill).evidential:
        return recipe
    rows = [name for name in config.baselines if name != "ekd-softmax"]
    return replace(
        recipe, values={**recipe.values, "baselines": rows, "softmax_teacher_weights": None}
    )


def _recipe_path(args: argparse.Namespace) -> Path:
    """The recipe that --space, --pair, or --teacher and --student name."""
    if args.recipe:
        return Path(args.recipe)
    home = _recipe_home(args)
    if args.pair:
        return find_recipe(SEARCH_SPACES, home, args.pair)
    if args.student:
        own = SEARCH_SPACES / home / f"{args.teacher}-{args.student}.yaml"
        base = SEARCH_SPACES / home / "_base.yaml"
        return next((p for p in (own, base) if p.exists()), SEARCH_SPACES / "default.yaml")
    raise UserError("name what to distil: --pair T-S, or --teacher T --student S.")


def _recipe_home(args: argparse.Namespace) -> str:
    """The folder of `search_spaces/` with the recipes of this launcher or data set."""
    return str(args.home or args.dataset or DistillConfig().dataset)


def _chosen_method(args: argparse.Namespace) -> Any:
    """The value of --method or --set method=; None leaves the recipe's own."""
    chosen = args.method
    for text in args.set:
        key, value = _parse_set(text)
        if key == "method" and _parse_range(key, value) is None:
            chosen = value
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


def _with_set(values: dict[str, Any], text: str) -> dict[str, Any]:
    """Values under one --set KEY=VALUE; a setting that is fixed so is no longer searched.

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
