"""A user's values, by flags or by keywords, laid over a recipe or a configuration."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.distill_config import DATASETS
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.errors import UserError, error_context, hide_secrets, shorten, unknown_name
from ekd_ray.files import expand_home
from ekd_ray.results.study_file import read_study_file
from ekd_ray.studies.fitting import fit_values, with_epochs
from ekd_ray.studies.places import absolute, absolute_paths
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe, find_recipe, merge

# Settings of a study by which its results, and the keys to a server, leave this machine: they are
# used on the user's own word, whatever a recipe or a study's file says.
BY_FLAG = {"optuna_storage": "--optuna-storage", "track": "--track"}
OF_A_STUDENT = ("student", "teacher", "teacher_weights", "method")  # not of a network alone

OWN_DATA = "folder"  # the recipes for data that have none of their own
LEAST_LARGE = 64  # pixels a side from which on pictures are for the networks of ImageNet


@dataclass(frozen=True, kw_only=True)
class Given:
    """The values that are said on top of a recipe.

    Attributes:
        settings: of `DistillConfig` and `StudyConfig` by name; one that both have (`seed`) is
            given to both. What is fixed so is no longer searched.
        space: settings that are searched -> the range, an entry of a search space; None takes a
            setting out of the space.
        method: what `Recipe.under` takes; None leaves the recipe's own.
        epochs: another budget, which every warm-up follows in proportion.
        teacher_zoo: folder of teachers by name.
        plugins: stamps of plugins beside those that a file names.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)
    method: Any = None
    epochs: int | None = None
    data_root: str | None = None
    teacher_zoo: str | Path | None = None
    plugins: Sequence[str] = ()


def choose_recipe(
    *, recipe: str | Path | None, pair: str | None, given: Given, home: str | None
) -> Recipe:
    """The recipe of a file, of a pair, of a teacher and a student, or for own data.

    Args:
        given: names data, teacher and student, where there are any.
        home: the folder of `search_spaces/` that is looked in, mostly the data set; None for any.

    Raises:
        UserError: nothing is named, or an unknown pair; own data that cannot be read.
    """
    if recipe:
        return Recipe.load(recipe, given.method)
    data, teacher, student = map(given.settings.get, ("dataset", "teacher", "student"))
    own, size = is_own_data(data), None
    if own:
        from ekd_ray.data import dataset_info  # loads torch

        # Refuses one that nobody knows.
        size = dataset_info(str(data), data_root=given.data_root).image_size
        home = OWN_DATA if home == data else home
    if pair:
        try:
            path = find_recipe(SEARCH_SPACES, home, pair)
        except UserError as error:
            if not own:
                raise
            text = f"{error} Other networks are named by --teacher T --student S."
            raise UserError(text, keys=error.keys) from None
        return Recipe.load(path, given.method)
    if own:
        return Recipe.load(f"{OWN_DATA}/{_kind_of_own_data(given, size)}", given.method)
    if student:
        folder = SEARCH_SPACES / (home or DistillConfig().dataset)
        names = folder / f"{teacher}-{student}.yaml", folder / "_base.yaml"
        path = next((p for p in names if p.exists()), SEARCH_SPACES / "default.yaml")
        return Recipe.load(path, given.method)
    raise UserError(
        "name what to distil: --pair T-S, or --teacher T --student S, or data of your own, "
        "--dataset folder:PATH."
    )


def _kind_of_own_data(given: Given, size: int | None) -> str:
    """The recipe for pictures of a size that have none: by that, and by weights to start from."""
    from ekd_ray.models import cached_weights, is_of_library  # loads torch

    settings = given.settings
    size = settings.get("image_size") or size
    if settings.get("student_weights"):
        return "fine-tune"
    defaults = Recipe.load(f"{OWN_DATA}/fine-tune").values["distill"]
    student = settings.get("student")
    if isinstance(size, int) and size < LEAST_LARGE and not (student and is_of_library(student)):
        return "small-pictures"
    teacher = settings.get("teacher") or defaults["teacher"]
    taught = settings.get("teacher_weights") or given.teacher_zoo or cached_weights(teacher)
    if cached_weights(student or defaults["student"]) and taught:
        return "fine-tune"
    return "from-scratch"


def lay_over(recipe: Recipe, given: Given) -> Recipe:
    """The recipe with what is given in the place of its own values.

    Raises:
        UserError: an unknown setting, a teacher that is not in the zoo, or one of `BY_FLAG` that
            the recipe alone names.
    """
    for name, flag in BY_FLAG.items():
        if recipe.values.get(name) is not None and name not in given.settings:
            with recipe.locate_errors(or_name_file=True):
                place = shlex.quote(hide_secrets(str(recipe.values[name])))
                raise UserError(
                    f"{name} is used only if you say so yourself, because it names a place that "
                    f"what you do is sent to: give {flag} {place} if you trust it.",
                    keys=(name,),
                )
    values = {**recipe.values, "distill": {**(recipe.values.get("distill") or {})}}
    if given.epochs is not None:
        if given.epochs < 1:
            raise UserError(f"epochs must be >= 1, got {given.epochs}.")
        with recipe.locate_errors():
            values = with_epochs(values, given.epochs)
    for name, spec in given.space.items():
        if name not in DistillConfig.names():
            raise unknown_name("setting to search:", name, DistillConfig.given_names())
        known = values.get("space") or {}
        space = {k: v for k, v in known.items() if k != name}
        if spec is not None and {*spec} == {"prior"}:  # of the range that there is
            values["space"] = merge(known, {name: spec})
        else:
            values["space"] = space if spec is None else {**space, name: spec}
    for name, value in given.settings.items():
        values = _with_setting(values, name, value)
    if given.data_root:
        values["data_root"] = given.data_root
    named = values["distill"].get("plugins") or ()
    values["distill"]["plugins"] = sorted({*named, *given.plugins})
    values = _from_zoo(values, given.teacher_zoo)
    values["distill"] = absolute_paths(values["distill"])
    if isinstance(softmax := values.get("softmax_teacher_weights"), str | Path):
        values["softmax_teacher_weights"] = absolute(softmax)
    if isinstance(training := values.get("teacher_training"), Mapping):
        values["teacher_training"] = absolute_paths({**training})
    named = {*given.settings, *given.space, *(() if given.epochs is None else ("epochs",))}
    laid = replace(recipe, values=values, given=frozenset(named))
    if not recipe.fit:
        return laid
    with laid.locate_errors():  # of a value that was given there is no line
        fitted = fit_values(values, recipe.fit, given=named, data_root=given.data_root)
    return replace(laid, values=fitted)


def _with_setting(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    of_run, of_study = name in DistillConfig.names(), name in StudyConfig.names()
    if not (of_run or of_study):
        names = {*DistillConfig.given_names(), *StudyConfig.given_names()}
        if name == "threads":  # of which there are two kinds
            raise UserError(
                "threads is no setting: give --cpus-per-trial N for the threads that train, "
                "--decode-threads N for those that decode pictures."
            )
        if name == "teacher_epochs":
            raise UserError(
                "teacher_epochs is no setting: give --set 'teacher_training={epochs: N}' for the "
                "epochs of a teacher that the study trains."
            )
        head, dot, inner = name.partition(".")
        if dot and head in names:
            raise UserError(
                f"{head} is given whole, got {shorten(name)}: --set '{head}={{{inner}: VALUE}}'."
            )
        raise unknown_name("setting", name, names)
    if of_run:
        space = {k: v for k, v in (values.get("space") or {}).items() if k != name}
        values = {**merge(values, {"distill": {name: value}}), "space": space}
    return {**values, name: value} if of_study else values


def count_extended(header: Path, more: int) -> int:
    """The number of trials of the study in `study.yaml`, and so many more.

    One that was being extended when it was interrupted is not extended again: until it has come to
    its end, the number in its file stands.

    Raises:
        UserError: `more` is less than 1.
    """
    if more < 1:
        raise UserError(f"a study is extended by >= 1 trials, got {more}.")
    values = read_study_file(header).values
    there = values.get("study")
    default = StudyConfig().trials
    trials = there.get("trials", default) if isinstance(there, Mapping) else default
    before = values.get(EXTENDED_FROM)
    if not isinstance(trials, int) or not isinstance(before, int | None):
        raise UserError(f"{header} is damaged: its number of trials is {shorten(trials)}.")
    if before is None:
        return trials + more
    if trials != before + more:
        warnings.warn(
            f"{header.parent} is being extended from {before} to {trials} trials already, which "
            f"stands until it has come to its end: --trials {trials + more} says another number.",
            stacklevel=2,
        )
    return trials


def authors_run(recipe: Recipe, given: Given) -> DistillConfig:
    """The run of a recipe that searches nothing: the authors' values, unless given otherwise."""
    recipe = replace(recipe, values={**recipe.values, "space": None})
    study = recipe.config
    authors = {k: v for k, v in (study.authors or {}).items() if k not in given.settings}
    values = {**study.distill.to_dict(), **authors}
    with recipe.locate_errors(), error_context("authors"):
        return DistillConfig.from_dict(values, where="the authors' values")


def with_settings(base: DistillConfig, given: Given, *, where: str) -> DistillConfig:
    """A run with what is given in the place of its own values."""
    values = {**base.to_dict(), **given.settings}
    values["plugins"] = sorted({*base.plugins, *given.plugins})
    if given.method is not None:
        values["method"] = given.method
    if given.epochs is not None:
        values["epochs"] = given.epochs
    return DistillConfig.from_dict(absolute_paths(values), where=where)


def teacher_run(
    model: str,
    given: Given,
    *,
    evidential: bool = False,
    candidates: int | None = None,
    seeds: list[int] | None = None,
    choose_by: str | None = None,
) -> tuple[DistillConfig, Candidates | None]:
    """A network trained alone, evidential with a learned prior or plain.

    Returns:
        Its first run, and its candidates if there are several.

    Raises:
        UserError: an illegal setting, or candidates that are.
    """
    named = {*given.settings} if given.method is None else {*given.settings, "method"}
    for name in sorted(named & {*OF_A_STUDENT}):
        raise UserError(
            f"{name} is no setting of a network that is trained alone, which --model and "
            "--evidential describe: drop it."
        )
    for name in sorted({*given.settings} - {*DistillConfig.names(), *DistillConfig.retired}):
        legal = {*DistillConfig.given_names()} - {*OF_A_STUDENT}
        raise unknown_name("setting in flags:", name, legal)
    base = _own_data_run(model, given) or DistillConfig(student=model, method="none")
    if evidential:
        base = base.replace(method="evidential", learn_log_prior=True)
    run = with_settings(base, given, where="flags")
    if seeds and "seed" in given.settings:
        raise UserError("give --seed for one training or --seeds for several, not both.")
    wanted = {"candidates": candidates, "seeds": seeds, "choose_by": choose_by}
    found = Candidates.parse(wanted, seed=run.seed)
    if len(found.seeds) > 1:
        return run.replace(seed=found.seeds[0]), found
    if choose_by:
        raise UserError(
            "--choose-by chooses among several candidates, got 1: add --candidates K, or drop it."
        )
    return run.replace(seed=found.seeds[0]), None


def _own_data_run(model: str, given: Given) -> DistillConfig | None:
    """The run of a network alone as the recipe for own data has it; None for other data."""
    if not is_own_data(given.settings.get("dataset")):
        return None
    named = replace(given, settings={**given.settings, "teacher": model, "student": model})
    recipe = choose_recipe(recipe=None, pair=None, given=replace(named, method="none"), home=None)
    return lay_over(recipe, named).config.distill.replace(teacher=None)


def is_own_data(name: Any) -> bool:
    """Whether a data set is the user's, so that no recipe was written for it."""
    return name is not None and name not in DATASETS


def _from_zoo(values: dict[str, Any], zoo: str | Path | None) -> dict[str, Any]:
    """The teachers' checkpoints out of a zoo, unless a file is named already."""
    distill = values["distill"]
    wants_softmax = "ekd-softmax" in (values.get("baselines") or ())
    missing = [distill.get("teacher_weights") is None]
    missing += [wants_softmax and values.get("softmax_teacher_weights") is None]
    if zoo is None or not any(missing):
        return values
    # These load torch.
    from ekd_ray.losses.methods import METHODS
    from ekd_ray.models import find_softmax_teacher, find_teacher

    model, folder = distill.get("teacher"), expand_home(zoo)
    if not isinstance(model, str):
        raise UserError("--teacher-zoo needs to know the teacher: give --teacher NAME or --pair.")
    if missing[0]:
        method = METHODS.get(distill.get("method", DistillConfig().method))
        found = find_teacher(folder, model, evidential=method is not None and method.evidential)
        values = {**values, "distill": {**distill, "teacher_weights": str(found)}}
    if missing[1] and (softmax := find_softmax_teacher(folder, model)):
        values = {**values, "softmax_teacher_weights": str(softmax)}
    return values
