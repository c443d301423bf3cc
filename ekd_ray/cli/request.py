"""Flags become a `Request`: a recipe, the flags laid over it, then `--set`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig, parse_yaml
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.phrases import joined
from ekd_ray.config.settings import value_type
from ekd_ray.config.study_config import Gpus
from ekd_ray.errors import UserError, hide_secrets, shorten
from ekd_ray.remote.location import Location
from ekd_ray.studies.overlay import (
    Given,
    authors_run,
    choose_recipe,
    count_extended,
    lay_over,
    teacher_run,
    with_settings,
)
from ekd_ray.studies.places import find_data_root, find_header, locate
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe, known_pairs


@dataclass(frozen=True, kw_only=True)
class Request:
    """The work that the flags ask for, checked as far as neither data nor torch are needed.

    Attributes:
        studies: by their folder below `out`, a single one under the name ""; the recipe also
            locates a mistake that is only found later.
        run: the configuration to train, of a command that searches nothing.
        role: what the plan calls its network.
        candidates: several trainings of it, one of which is chosen.
        teacher_training: settings to train its teacher with, where that has no weights.
        out: folder of the results; None for the command's own choice.
        location: the URI that `out` is this machine's copy of.
        assume: the nodes to plan for, as `parse_nodes` reads them; None for those that there are.
        workers: `N` or `MIN:MAX`.
        warm_start: finished studies that the search learns from.
        test: read the test split once, after the last epoch.
        require_gain: the command fails unless the gain over the student alone is settled.
        typed: the command and its flags, as they were given.
    """

    studies: Mapping[str, Recipe] = field(default_factory=dict)
    run: DistillConfig | None = None
    role: str = "student"
    candidates: Candidates | None = None
    teacher_training: Mapping[str, Any] | None = None
    out: Path | None = None
    location: Location | None = None
    data_root: str | None = None
    address: str | None = None
    assume: str | None = None
    keep_ray_logs: bool = False
    workers: str = "1"
    cpus_per_trial: int | None = None
    gpus_per_trial: Gpus | None = None
    warm_start: tuple[str, ...] = ()
    test: bool = False
    require_gain: bool = False
    download: bool = False
    resume: bool = False
    accept_versions: bool = False
    dry_run: bool = False
    quiet: bool = False
    json: bool = False
    typed: tuple[str, ...] = ()

    def typed_resume(self, out: object) -> str:
        """The command that was typed, as it continues what it has begun in `out`."""
        return resumed_command(self.typed, self.resume, None if self.out else out)


def resumed_command(typed: Sequence[str], resume: bool, out: object | None) -> str:
    """The command that was typed, with --resume, and with --out where that was not given."""
    added = [*([] if resume else ["--resume"]), *([] if out is None else ["--out", out])]
    return shlex.join([*map(hide_secrets, typed), *map(str, added)])


def study_request(args: argparse.Namespace) -> Request:
    """The studies that the flags describe.

    `--pairs` and `--methods` make a study for each pair and each method, `<pair>/<method>`.

    Raises:
        UserError: an unknown name, or a value out of its bounds.
    """
    if not (args.pairs or args.methods):
        recipe = _recipe(args, _given(args))
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
            recipe = _without_softmax_row(_recipe(one, _given(one)))
            shared = recipe.config.distill
            name = pair or f"{shared.teacher or 'none'}-{shared.student}"
            studies[f"{name}/{method or shared.method}"] = recipe
    return _request(args, studies=studies)


def run_request(args: argparse.Namespace) -> Request:
    """One run: a `--config` file, or the pair's recipe with the authors' values.

    `--resume --out RUN` alone is the run that RUN holds.
    """
    given = _given(args)
    for name, spec in given.space.items():
        if spec is not None:
            raise UserError(f"one run searches nothing: give --set {name} a value.")
    file = args.config
    if not file and _is_continued(args):
        file = find_header(args.out, "config.yaml")
    if not file:
        recipe = _recipe(args, given)
        training = recipe.config.teacher_training
        return _request(args, run=authors_run(recipe, given), teacher_training=training)
    if args.pair or args.recipe:
        raise UserError("--config is complete by itself: drop --pair and --space.")
    return _request(args, run=_run_of_file(file, given))


def _run_of_file(file: str | Path, given: Given) -> DistillConfig:
    """The run in a `config.yaml` or `distill.yaml`, with what is given in the place of its own."""
    return with_settings(DistillConfig.from_yaml(file), _of_run(given), where=str(file))


def teacher_request(args: argparse.Namespace) -> Request:
    """A network trained alone: `--model`, evidential with a learned prior, or plain.

    `--resume --out RUN` alone is the run that RUN holds.

    Raises:
        UserError: as `study_request`, and for candidates that are illegal or that go together
            with flags of a single training.
    """
    other = args.model or args.evidential or args.candidate_count or args.seeds or args.choose_by
    if args.resume and args.out and not other:
        run = _run_of_file(find_header(args.out, "config.yaml"), _given(args))
        return _request(args, run=run, role="teacher")
    if not args.model:
        raise UserError("name the network to train: --model NAME.")
    run, candidates = teacher_run(
        args.model, _of_run(_given(args)), evidential=args.evidential, seeds=args.seeds,
        candidates=args.candidate_count, choose_by=args.choose_by,
    )  # fmt: skip
    return _request(args, run=run, role="teacher", candidates=candidates)


def _request(args: argparse.Namespace, **found: Any) -> Request:
    """`found`, and the flags that are no part of a configuration."""
    names = {entry.name for entry in fields(Request)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {"data_root": find_data_root(args.data_root)}
    if args_out := getattr(args, "out", None):  # what only fills a cache has none
        given["out"], given["location"] = locate(args_out)
    if "warm_start" in given:
        given["warm_start"] = tuple(given["warm_start"])
    request = Request(**given, **found)
    if request.assume is not None and (request.address or not request.dry_run):
        raise UserError(
            f"--assume {shorten(request.assume)} is for plans: add --dry-run, and drop --address."
        )
    return request


def _recipe(args: argparse.Namespace, given: Given) -> Recipe:
    """The recipe that the flags choose, with their values laid over its own."""
    if getattr(args, "extend", None) is not None:
        given.settings["trials"] = _extended_trials(args)
    if _is_continued(args):
        recipe = Recipe.of_study(find_header(args.out, "study.yaml"), given.method)
    elif args.resume and not (args.out or args.pair or args.student or args.recipe or args.dataset):
        raise UserError("--resume goes on with what a folder holds: add --out RUN.")
    else:
        recipe = choose_recipe(
            recipe=args.recipe, pair=args.pair, given=given, home=args.home or args.dataset
        )
    return lay_over(recipe, given)


def _given(args: argparse.Namespace) -> Given:
    """The settings that have flags of their own, then each --set KEY=VALUE or KEY=RANGE."""
    typed = vars(args)
    names = dict.fromkeys((*StudyConfig.names(), *DistillConfig.__dataclass_fields__))
    settings = {name: typed[name] for name in names if typed.get(name) is not None}
    plugins = settings.pop("plugins", ())
    flags = dict(settings)
    space: dict[str, Any] = {}
    for text in args.set:
        key, value = _parse_set(text)
        _refuse_several(key, value)
        spec = _parse_range(key, value)
        if key in flags and flags[key] != (spec or value):
            raise UserError(
                f"{key} is given twice, as {shorten(flags[key])} by its flag and by --set as "
                f"{shorten(value)}: leave one out."
            )
        if spec is not None and key in DistillConfig.names():
            space[key] = spec
            settings.pop(key, None)
        else:
            settings[key] = value
            space.pop(key, None)
    method, epochs = settings.pop("method", None), settings.pop("epochs", None)
    return Given(
        settings=settings, space=space, method=method, epochs=epochs,
        data_root=find_data_root(args.data_root), teacher_zoo=getattr(args, "teacher_zoo", None),
        plugins=plugins,
    )  # fmt: skip


def _of_run(given: Given) -> Given:
    """Without the settings of a study, such as the resources of a trial."""
    only_study = {*StudyConfig.names()} - {*DistillConfig.names()}
    settings = {name: v for name, v in given.settings.items() if name not in only_study}
    return replace(given, settings=settings)


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{flag} takes different names with commas between, got {shorten(text)}.")
    return names


def _is_continued(args: argparse.Namespace) -> bool:
    """Whether `--resume --out RUN` stands alone, so that RUN itself says what it is."""
    return bool(args.resume and args.out and not (args.pair or args.student or args.recipe))


def _extended_trials(args: argparse.Namespace) -> int:
    """The number of trials of a study that is continued with --extend."""
    missing = ["--resume"] * (not args.resume) + ["--out RUN"] * (not args.out)
    if missing:
        raise UserError(f"--extend continues a study: add {joined(missing)}.")
    if args.trials is not None or args.extend < 1:
        raise UserError(
            f"give --trials for the whole number, or --extend >= 1 for what is added, got "
            f"--extend {args.extend}" + (f" and --trials {args.trials}." if args.trials else ".")
        )
    return count_extended(find_header(args.out, "study.yaml"), args.extend)


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


def _recipe_home(args: argparse.Namespace) -> str:
    """The folder of `search_spaces/` with the recipes of this launcher or data set."""
    return str(args.home or args.dataset or DistillConfig().dataset)


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals:
        raise UserError(f"--set takes KEY=VALUE, got {shorten(text)}.")
    return key, parse_yaml(raw, where=f"--set {key}")


def _refuse_several(key: str, value: Any) -> None:
    """Raise `UserError` for `KEY=A,B` where the setting takes one number or one of a few words."""
    if not isinstance(value, str) or "," not in value or ":" in value:
        return
    words = {field.name for field in DistillConfig.fields() if field.metadata["choices"]}
    if _is_number(key) or key in words:
        raise UserError(
            f"--set {key} takes one value, got {shorten(value)}: to search several, give "
            f"{key}=choice:A,B."
        )


def _is_number(key: str) -> bool:
    return key in DistillConfig.names() and value_type(DistillConfig, key) in (int, float)


_KINDS = ("log", "range", "choice", "prior")
_RANGES = (
    "log:LOW:HIGH, range:LOW:HIGH, range:LOW:HIGH:STEP, choice:A,B,... or prior:CENTER[:CONFIDENCE]"
)


_AS_PRINTED = re.compile(r"-?\d\S*? *\.\. *-?\d.*")  # `1 .. 4 (log)`, as a plan has it


def _parse_range(key: str, value: Any) -> dict[str, Any] | None:
    """A range on the command line as an entry of the space; None for any other value."""
    wrong = f"--set {key} takes {_RANGES} to search it, got "
    if isinstance(value, dict) and len(value) == 1:  # so YAML reads `choice:` and `log: 1:2`
        ((kind, rest),) = value.items()
        if str(kind).partition(":")[0] in _KINDS:
            raise UserError(f"{wrong}{kind}: {'nothing' if rest is None else shorten(rest)}.")
    if isinstance(value, str) and _AS_PRINTED.fullmatch(value):
        raise UserError(f"{wrong}{shorten(value)}.")
    kind, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in _KINDS or not colon:
        if colon and _is_number(key):
            raise UserError(f"{wrong}{shorten(value)}.")
        return None
    parts = rest.split("," if kind == "choice" else ":")
    items = [parse_yaml(part, where=f"--set {key}") if part.strip() else None for part in parts]
    if kind == "choice" and None not in items:
        return {"choices": items}
    if kind == "prior" and len(items) in (1, 2) and None not in items:
        return {"prior": dict(zip(("center", "confidence"), items, strict=False))}
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if numbers and kind == "log" and len(items) == 2:
        return {"low": items[0], "high": items[1], "log": True}
    if numbers and kind == "range" and len(items) in (2, 3):
        return dict(zip(("low", "high", "step"), items, strict=False))
    raise UserError(f"{wrong}{shorten(value)}.")
