"""The commands as functions: `tune`, `distill`, `train_teacher` and `evaluate`.

A keyword that is no argument of the function is a setting of the run or of the study, by the name
that it has in recipes (docs/reference/settings.md). There is one setting by each name: `seed` is
that of the runs and of the sampler, as `--seed` is. What is given is no longer searched. `epochs`
takes every warm-up with it, in proportion.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.arguments import check_keywords, checks_arguments
from ekd_ray.config.plugins import files_trusted, load_plugin, module_in_name
from ekd_ray.engine.measure.assessment import COVERAGES
from ekd_ray.errors import Interrupted, UserError
from ekd_ray.models.given import as_model_name, write_given_weights
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.run_result import RunResult
from ekd_ray.results.study import Study
from ekd_ray.studies.background import start_study
from ekd_ray.studies.callbacks import Together, check_callbacks, listening
from ekd_ray.studies.overlay import (
    Given,
    authors_run,
    choose_recipe,
    count_extended,
    lay_over,
    teacher_run,
    with_settings,
)
from ekd_ray.studies.pipeline import check_folder, conduct_study, prepare_study
from ekd_ray.studies.places import default_folder, find_data_root, find_header, locate
from ekd_ray.studies.recipes import Recipe
from ekd_ray.studies.training import Training, planned, run_training

PathLike = str | os.PathLike[str]
# A name, `package.module:function`, a function build(num_classes), or a module (`as_model_name`).
Model = str | nn.Module | Callable[[int], nn.Module]
_RUN, _STUDY = {*DistillConfig.names()}, {*StudyConfig.names()} - {"distill", "space"}
_RESOURCES = {"cpus_per_trial", "gpus_per_trial"}


@checks_arguments
def tune(
    pair: str | None = None,
    *,
    teacher: Model | None = None,
    student: Model | None = None,
    dataset: str | None = None,
    method: str | None = None,
    recipe: PathLike | None = None,
    space: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    out: PathLike | None = None,
    data_root: PathLike | None = None,
    teacher_zoo: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    trust_plugins: bool = False,
    warm_start: Sequence[PathLike] = (),
    extend: int | None = None,
    resume: bool = False,
    accept_versions: bool = False,
    download: bool = False,
    wait: bool = True,
    detach: bool = False,
    callbacks: Sequence[object] = (),
    progress: bool = True,
    **settings: Any,
) -> Study:
    """Search the best distillation, confirm and export it, as `ekd-ray tune` does.

    Ray that is initialised is used and left as it is; otherwise one is started, and ended after.

    Args:
        pair: a teacher-student pair that has a recipe, such as "resnet56-resnet20".
        teacher: an architecture in the place of the pair's: a name of the zoo or of a plugin,
            `package.module:function`, a function `build(num_classes)`, or a module, which brings
            its weights (`teacher_normalization` says how its inputs are normalised).
        student: likewise; of a module each run draws the weights anew.
        dataset: a name or "folder:PATH" (the recipe's own).
        method: the recipe under another method; "any" searches it too.
        recipe: a recipe's file, in the place of the pair's.
        space: settings to search -> `log`, `uniform`, `integer` or `choice`, on top of the
            recipe's; None takes one out of the space.
        epochs: of a run of full length.
        out: folder of the study, or s3://BUCKET/FOLDER (below runs/).
        data_root: folder of the data sets ($EKD_DATA_ROOT).
        teacher_zoo: folder of teachers by name.
        plugins: modules or FILE.py that register models, data sets or methods.
        trust_plugins: also run those that a recipe or study names.
        warm_start: finished studies, also of other pairs, that the search learns from.
        extend: so many more trials for the study in `out`, with `resume`.
        resume: continue the study in `out`; with `out` alone, as it is.
        accept_versions: resume also under releases whose results need not compare with those that
            the study has.
        download: fetch missing CIFAR archives.
        wait: False returns at once; the study runs in a child process, which ends with this one.
        detach: that process goes on when this one ends.
        callbacks: objects with some of the methods of `Callback`.
        progress: show a progress bar.
        **settings: any setting, by its name: `trials=32`, `teacher_weights=...`, `lr=0.1`.

    Returns:
        The finished study; with `wait=False` the one that runs: `status()`, `stop()`, `wait()`.

    Raises:
        UserError: a mistake in what was given, found before compute where that is possible.
        KeyboardInterrupt: stopped; `resume=True` continues.
    """
    with _in_python(), files_trusted(trust_plugins):
        _check_names(tune, settings, _RUN | _STUDY)
        check_callbacks(callbacks)
        given = _given(
            {"teacher": teacher, "student": student, "dataset": dataset}, settings, method=method,
            epochs=epochs, space=space, data_root=data_root, teacher_zoo=teacher_zoo,
            plugins=plugins,
        )  # fmt: skip
        if not wait and callbacks:
            raise UserError(
                "callbacks are called in the process of the study, got some with wait=False: "
                "follow that study by status(), or leave wait out."
            )
        if extend is not None:
            if not (resume and out) or "trials" in settings:
                raise UserError("extend=N goes together with resume=True and out, without trials.")
            given.settings["trials"] = count_extended(find_header(_text(out), "study.yaml"), extend)
        if resume and out and not (pair or student or recipe):
            chosen = Recipe.of_study(find_header(_text(out), "study.yaml"), method)
        else:
            chosen = _recipe(pair, given, dataset, recipe)
        chosen = lay_over(chosen, given)
        shared = chosen.config.distill
        found, location = locate(_text(out)) if out else (None, None)
        folder = found or default_folder(shared, shared.teacher or "none", shared.student)
        folder = folder.absolute()
        config = prepare_study(
            chosen, warm_start=[*map(_text, warm_start)], download=download,
            resumed=folder if resume else None,
        )  # fmt: skip
        if location is None and not wait:  # else `conduct_study` does
            check_folder(folder, config, resume=resume)
        if not wait:
            return start_study(
                config, folder, location=location, resume=resume, download=download,
                accept_versions=accept_versions, detach=detach,
            )  # fmt: skip
        with contextlib.closing(
            listening(callbacks, progress=progress, metric=config.metric)
        ) as observer:
            conduct_study(
                config, folder, observer, location=location, resume=resume, download=download,
                accept_versions=accept_versions,
            )  # fmt: skip
        return Study.load(folder)


@checks_arguments
def distill(
    pair: str | None = None,
    *,
    teacher: Model | None = None,
    student: Model | None = None,
    dataset: str | None = None,
    method: str | None = None,
    recipe: PathLike | None = None,
    config: DistillConfig | PathLike | None = None,
    epochs: int | None = None,
    out: PathLike | None = None,
    data_root: PathLike | None = None,
    teacher_zoo: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    trust_plugins: bool = False,
    workers: int | str = 1,
    test: bool = False,
    resume: bool = False,
    download: bool = False,
    callbacks: Sequence[object] = (),
    progress: bool = True,
    **settings: Any,
) -> RunResult:
    """Train one student without a search, as `ekd-ray distill` does.

    The settings are those of the recipe with the authors' values, and of the keywords. Arguments
    that are not listed here are as of `tune`.

    Args:
        config: a configuration or its file (`distill.yaml` of a bundle), in the place of a recipe.
        workers: data-parallel Ray Train workers; "MIN:MAX" takes as many as there is room for.
        test: read the test split once, after the last epoch.
        **settings: of a run; also `cpus_per_trial` and `gpus_per_trial`, of each worker.

    Raises:
        UserError: a mistake in what was given, or the run diverged or got no memory.
        KeyboardInterrupt: stopped; `resume=True` continues.
    """
    with _in_python(), files_trusted(trust_plugins):
        _check_names(distill, settings, _RUN | _RESOURCES)
        check_callbacks(callbacks)
        resources = {name: settings.pop(name) for name in _RESOURCES & settings.keys()}
        given = _given(
            {"teacher": teacher, "student": student, "dataset": dataset}, settings, method=method,
            epochs=epochs, data_root=data_root, teacher_zoo=teacher_zoo, plugins=plugins,
        )  # fmt: skip
        if config is None and resume and out and not (pair or student or recipe):
            config = find_header(_text(out), "config.yaml")
        training = None
        if config is None:
            chosen = lay_over(_recipe(pair, given, dataset, recipe), given)
            run, training = authors_run(chosen, given), chosen.config.teacher_training
        elif pair or recipe:
            raise UserError("config is complete by itself: drop pair and recipe.")
        elif isinstance(config, DistillConfig):
            run = with_settings(config, given, where="the configuration")
        else:
            run = with_settings(DistillConfig.from_yaml(_text(config)), given, where=_text(config))
        found, location = locate(_text(out)) if out else (None, None)
        with planned(
            run, out=found, location=location, teacher_training=training, workers=str(workers),
            data_root=given.data_root, test=test, download=download, resume=resume, **resources,
        ) as planned_run:  # fmt: skip
            return _run(planned_run, callbacks, progress=progress)


@checks_arguments
def train_teacher(
    model: Model,
    *,
    dataset: str | None = None,
    evidential: bool = False,
    candidates: int | None = None,
    seeds: Sequence[int] | None = None,
    choose_by: str | None = None,
    epochs: int | None = None,
    out: PathLike | None = None,
    data_root: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
    workers: int | str = 1,
    test: bool = False,
    resume: bool = False,
    download: bool = False,
    callbacks: Sequence[object] = (),
    progress: bool = True,
    **settings: Any,
) -> RunResult:
    """Train a network alone, as `ekd-ray train-teacher` does: `.weights` is its checkpoint.

    Arguments that are not listed here are as of `distill`.

    Args:
        model: an architecture, as `student` of `tune`.
        evidential: with evidential cross-entropy and a learned prior, which is in the checkpoint.
        candidates: train so many that differ by seed, and keep the best.
        seeds: theirs (`seed` and those after it).
        choose_by: "val_nll" (the default), "val_top1" or "val_aurc".

    Raises:
        UserError: a mistake in what was given, or every training failed.
        KeyboardInterrupt: stopped; `resume=True` continues.
    """
    with _in_python():
        _check_names(train_teacher, settings, _RUN | _RESOURCES)
        check_callbacks(callbacks)
        resources = {name: settings.pop(name) for name in _RESOURCES & settings.keys()}
        given = _given(
            {"dataset": dataset}, settings, epochs=epochs, data_root=data_root, plugins=plugins
        )
        run, several = teacher_run(
            _model_name(model), given, evidential=evidential, candidates=candidates,
            seeds=None if seeds is None else list(seeds), choose_by=choose_by,
        )  # fmt: skip
        found, location = locate(_text(out)) if out else (None, None)
        with planned(
            run, out=found, location=location, candidates=several, workers=str(workers),
            data_root=given.data_root, test=test, download=download, resume=resume, **resources,
        ) as training:  # fmt: skip
            return _run(training, callbacks, progress=progress)


@checks_arguments
def evaluate(
    bundle: Bundle | PathLike,
    *,
    dataset: str | None = None,
    data_root: PathLike | None = None,
    ood_datasets: Sequence[str] | None = None,
    scores: Sequence[str] = (),
    coverages: Sequence[float] = COVERAGES,
    resamples: int = 0,
    calibrated: bool = False,
    set_coverages: Sequence[float] = (),
) -> dict[str, float]:
    """Every metric of a bundle's student on a test split, as `ekd-ray evaluate` prints them.

    Args:
        bundle: a bundle or its folder.
        dataset: another data set, whose classes are among the bundle's by name (its own).
        data_root: folder of the data sets ($EKD_DATA_ROOT).
        ood_datasets: out-of-distribution sets: names of data sets, "folder:PATH" (also of pictures
            without classes), "noise", "constant" (the latter two, and that of the study).
        scores: further ones by which images are ranked: "max_probability", "entropy", "energy", and
            of an evidential student "expected_entropy", "mutual_information", "vacuity",
            "differential_entropy"; or "all".
        coverages: shares of the images, the most certain, on which the accuracy is given.
        resamples: of the images, for 95 % intervals; 0 gives none.
        calibrated: probabilities by the temperature that was fitted on validation images.
        set_coverages: of sets of classes (`coverage` of `Bundle.predict`): what they hold here.

    Returns:
        `test_<name>`: accuracies, errors and areas are fractions, losses in nats; with resamples
        also `test_<name>_low` and `test_<name>_high`.

    Raises:
        UserError: there is no bundle, no such data, a class that the student does not know, or an
            out-of-distribution set of the student's own classes.
    """
    with _in_python():
        found = bundle if isinstance(bundle, Bundle) else Bundle.load(_text(bundle))
        return found.evaluate(
            dataset=dataset, data_root=find_data_root(_optional(data_root)),
            ood_datasets=ood_datasets, scores=scores, coverages=coverages, resamples=resamples,
            calibrated=calibrated, set_coverages=set_coverages,
        )  # fmt: skip


# Ranges of a search space


@checks_arguments
def log(low: float, high: float) -> dict[str, Any]:
    """A range that is searched by its logarithm, `low` > 0 and `high` included."""
    return {"low": low, "high": high, "log": True}


@checks_arguments
def uniform(low: float, high: float, *, step: float | None = None) -> dict[str, Any]:
    """A range of numbers, `high` included; with `step` those that are `low` plus multiples."""
    return {"low": low, "high": high, **({} if step is None else {"step": step})}


@checks_arguments
def integer(low: int, high: int, *, step: int = 1) -> dict[str, Any]:
    """A range of whole numbers, `high` included."""
    return {"low": low, "high": high, "step": step}


@checks_arguments
def choice(*values: Any) -> dict[str, Any]:
    """One of several values: `choice("softplus", "exp")`."""
    return {"choices": list(values)}


# What the functions share


def _run(training: Training, callbacks: Sequence[object], *, progress: bool) -> RunResult:
    metric = training.candidates.choose_by if training.candidates else "val_top1"
    observer: Together = listening(callbacks, progress=progress, metric=metric)
    with contextlib.closing(observer):
        return run_training(training, observer)


def _recipe(
    pair: str | None,
    given: Given,
    dataset: str | None,
    recipe: PathLike | None,
) -> Recipe:
    return choose_recipe(
        recipe=_optional(recipe), pair=pair, given=given, home=dataset or DistillConfig().dataset
    )


def _given(
    names: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    method: str | None = None,
    epochs: int | None = None,
    space: Mapping[str, Any] | None = None,
    data_root: PathLike | None = None,
    teacher_zoo: PathLike | None = None,
    plugins: Sequence[PathLike] = (),
) -> Given:
    models = {"teacher", "student"}
    loaded = [load_plugin(_text(plugin)).stamp for plugin in plugins]
    chosen = {
        name: _model_name(value) if name in models else value
        for name, value in names.items()
        if value is not None
    }
    plain = {k: _text(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}
    if isinstance(names.get("teacher"), nn.Module):  # which brings its weights
        plain.setdefault("teacher_weights", str(write_given_weights(names["teacher"])))
    for name in {*plain} & {*(space or {})}:
        raise UserError(
            f"{name} is given a value, {plain[name]!r}, and a range in space: drop one of the two."
        )
    return Given(
        settings=chosen | plain, space=space or {}, method=method, epochs=epochs,
        data_root=find_data_root(_optional(data_root)), teacher_zoo=_optional(teacher_zoo),
        plugins=loaded,
    )  # fmt: skip


def _model_name(model: Model) -> str:
    """The name by which a model is known to every process."""
    name = as_model_name(model)
    if module := module_in_name(name):
        load_plugin(module)
    return name


def _text(path: PathLike) -> str:
    return os.fspath(path)


def _optional(path: PathLike | None) -> str | None:
    return None if path is None else os.fspath(path)


def _check_names(
    function: Callable[..., Any], settings: Iterable[str], legal: Iterable[str]
) -> None:
    """Refuse a keyword that is neither an argument nor a setting, with the nearest there are."""
    known = {*[*inspect.signature(function).parameters][:-1], *legal}
    for name in settings:
        keyword = _KEYWORDS.get(name.replace("_", "-"))
        if name not in known and keyword in known:
            raise UserError(
                f"unknown argument of {function.__name__}: {name!r}, which is a flag's name: give "
                f"{keyword}=."
            )
    check_keywords(f"argument of {function.__name__}:", settings, known)


_FLAG = re.compile(r"--([a-z][a-z-]*)")
# Flags whose keyword has another name.
_KEYWORDS = {
    "constraint": "constraints", "objective": "objectives", "plugin": "plugins",
    "seeds": "confirm_seeds", "space": "recipe", "top-k": "confirm_top_k", "resume": "resume=True",
}  # fmt: skip


@contextlib.contextmanager
def _in_python() -> Iterator[None]:
    """Errors that name flags name keywords, and a stop by the user is a `KeyboardInterrupt`.

    Signals are handled afterwards as before: Tune leaves a handler of its own for Ctrl-C.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except UserError as error:
        text = _FLAG.sub(lambda m: _KEYWORDS.get(m[1], m[1].replace("-", "_")), str(error))
        error.args = (text,)
        raise
    except Interrupted:
        raise KeyboardInterrupt("stopped; resume=True continues") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None is one that Python did not set
                    signal.signal(number, handler)
