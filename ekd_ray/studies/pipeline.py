"""A study from teacher to exported winner: teacher -> search -> confirm -> export.

Each stage leaves its artefact in the study's folder and is skipped or continued when it
is there already.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.normalization import parse_normalization
from ekd_ray.config.phrases import command_text, several
from ekd_ray.config.plugins import write_sources
from ekd_ray.config.settings import Settings
from ekd_ray.config.study_config import EXTENDED_FROM, TESTED_AT
from ekd_ray.config.targets import OF_OTHERS
from ekd_ray.data import check_dataset, load_dataset
from ekd_ray.data.scan import Say
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.data_pin import check_pinned, pin_data
from ekd_ray.engine.environment import environment, hardware, warn_of_change
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.engine.measure import teacher_figures
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.measure.teacher_pass import (
    WeakTeacher,
    check_teacher,
    measure_teacher,
    refuse_weak_teacher,
)
from ekd_ray.engine.out_of_memory import refused_memory_reported
from ekd_ray.engine.resolve import (
    check_images,
    check_teacher_settings,
    check_workers,
    resolve,
    used_plugins,
)
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import count_pictures
from ekd_ray.engine.runlog import Session, metric_tag, write_experiment
from ekd_ray.engine.teacher.tried import try_teacher
from ekd_ray.engine.train_teacher import teacher_candidates, teacher_config, train_teacher
from ekd_ray.errors import Damaged, Halted, UserError, error_context, hide_secrets, shorten
from ekd_ray.files import (
    check_folder_place,
    check_own_folder,
    is_temporary,
    remove_path,
    remove_temporaries,
)
from ekd_ray.losses.methods import METHODS, method_of, resolve_method, with_method
from ekd_ray.models import checkpoints_kept, read_metadata
from ekd_ray.remote.location import Location
from ekd_ray.remote.mirror import STATE as MIRROR_STATE
from ekd_ray.remote.session import mirrored
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.bundle_export import export_bundle
from ekd_ray.results.failure_log import error_kept
from ekd_ray.results.records import (
    BEST,
    CONFIRMED,
    DATA,
    FORMAT_VERSION,
    JOURNAL_LOCKS,
    LOCK,
    PLACE,
    STUDY_FILE,
    trial_folders,
)
from ekd_ray.results.study import DRIVER_LOG, Study
from ekd_ray.results.study_file import (
    describe_missing,
    describe_other_settings,
    read_study_file,
    write_study_file,
)
from ekd_ray.results.words import describe_teacher, resume_command, warn_of_teacher
from ekd_ray.scale.budget import check_budget
from ekd_ray.scale.cluster import (
    check_address,
    check_fits,
    check_visible,
    connected,
    count_trials,
    describe_gpus,
    known_nodes,
    local_cpus,
    on_cluster,
    with_gpus,
)
from ekd_ray.scale.confirm import baselines, champions, confirm
from ekd_ray.scale.one_run import epochs_reported, note_continued
from ekd_ray.scale.samplers import check_sampler
from ekd_ray.scale.search import NoWinner, search
from ekd_ray.scale.space import around_prior, check_space, with_pairs_prior
from ekd_ray.scale.storage import check_storage, drop_unknown_trials
from ekd_ray.scale.tasks import compute_off_driver
from ekd_ray.scale.teacher_candidates import candidate_study, train_candidates
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.tracking_services import check_tracking
from ekd_ray.scale.trainer import SCRATCH
from ekd_ray.studies.recipes import Recipe
from ekd_ray.studies.warm_start import warm_started

TEACHER = Path("teacher") / "teacher.safetensors"
SOFTMAX_TEACHER = Path("teacher-softmax") / TEACHER.name
MOST_NAMED = 5  # settings that differ
LEAST_FREE_BYTES = 200 * 2**20


def _check_watched(config: StudyConfig) -> None:
    """Raise `UserError` for a metric that some of the study's trials would not have."""
    base = config.distill
    searched = (config.space or {}).get("method") or {}
    methods = {name: METHODS.get(name) for name in (searched.get("choices") or (base.method,))}
    known = {name: method for name, method in methods.items() if method is not None}
    for metric in config.watched:
        if metric in OF_OTHERS and base.ood_dataset is None:
            raise UserError(f"{metric} needs a second data set: give --ood-dataset NAME.")
        for name, method in known.items():
            lacks = {
                "val_mi_auroc": "Dirichlet" * (not method.evidential),
                "val_vacuity_corr": "teacher" * (not method.needs_teacher),
            }.get(metric)
            if lacks:
                raise UserError(
                    f"{metric} cannot be watched, because method {name} has no {lacks}: choose "
                    "another metric, or another --method."
                )


@checkpoints_kept()
def check_study(
    config: StudyConfig, *, download: bool = False, say: Say = lambda done, total: None
) -> StudyConfig:
    """Everything that can be refused before compute: space, names, data, teacher, baselines.

    With `download`, archives that would be fetched may be missing; nothing is fetched here. `say`
    is told how many pictures have been looked at, and how many there are.

    Returns:
        The study with its shared settings resolved as far as they can be: a teacher that
        is still to be trained has no hash yet.
    """
    check_sampler(config, check_space(config))
    check_budget(config, known_nodes())
    check_fits(config)
    check_address()
    check_storage(config)
    check_tracking(config)
    base = config.distill
    _check_watched(config)
    if "val_vacuity_corr" in config.watched:
        base = base.replace(compare_teacher=True)
        config = config.replace(distill=base)
    with error_context("distill"):
        check_teacher_settings(base)
    with error_context("distill", "dataset"):
        check_dataset(base.dataset, data_root=config.data_root, download=download)
        check_images(base, config.data_root, say)
    if base.validation_fraction == 0:
        raise UserError(
            "validation_fraction must be > 0 in a study: the search needs the split.",
            keys=("distill", "validation_fraction"),
        )
    if base.student_weights is not None and "student" in (config.space or {}):
        raise UserError(
            "student_weights are those of one student, but student is searched: drop one of the "
            "two.",
            keys=("distill", "student_weights"),
        )
    check_workers(base, config.workers_per_trial)
    if method_of(base).needs_teacher and base.teacher_weights is None:
        config = check_teaching(config, download=download)
        base = config.distill
    else:
        if base.teacher and config.teacher_training:
            _teacher_run(base, config.teacher_training)
        with error_context("distill"):
            base = with_pairs_prior(config, resolve_method(base))
            base = resolve(base, data_root=config.data_root, download=download)
            check_teacher(base, config.data_root)
        config = around_prior(config, base)
    rows = baselines(config, base)
    if "ekd-softmax" in rows:
        config = config.replace(softmax_teacher_sha256=_check_softmax_teacher(config, base))
    elif "ekd-softmax" in config.baselines:
        raise UserError(
            f"baseline ekd-softmax needs an evidential method with a teacher, got {base.method!r}: "
            "drop the baseline, or choose another --method.",
            keys=("baselines",),
        )
    elif config.softmax_teacher_weights:
        raise UserError(
            "softmax_teacher_weights serves the baseline ekd-softmax only: add that to "
            "--baselines, or drop the file.",
            keys=("softmax_teacher_weights",),
        )
    for row in (*champions(config, base).values(), *rows.values()):
        if row.teacher_weights is not None or not method_of(row).needs_teacher:
            row = resolve(row, data_root=config.data_root, download=download)
            try_teacher(row, config.data_root)
    return config.replace(distill=base.replace(plugins=used_plugins(base, config.space)))


def check_teaching(config: StudyConfig, *, download: bool = False) -> StudyConfig:
    """A study that trains its teacher, its shared settings resolved as far as they can be.

    The weights that the teacher's training starts from are pinned by their SHA-256.

    Raises:
        UserError: the teacher or the student cannot be trained, or nothing says how the teacher is.
    """
    base, root = config.distill, config.data_root
    if base.teacher_normalization is not None:  # unused, and yet no place for a slip
        parse_normalization(base.teacher_normalization)
    if not config.teacher_training or base.teacher is None:
        with error_context("distill"):  # says what is missing
            resolve(base, data_root=root, download=download)
    training = config.teacher_training or {}
    with error_context("distill"):
        alone = resolve(with_method(base, "none"), data_root=root, download=download)
    teacher = _teacher_run(base, training)
    try:
        teacher = resolve(teacher, data_root=root, download=download)
    except UserError as error:
        sentence = f"the teacher {base.teacher}, which the study trains first: {error}"
        raise UserError(sentence, keys=error.keys) from None
    if teacher.student_sha256 is not None:
        training = {**training, "student_sha256": teacher.student_sha256}
    names = ("student_weights", "student_sha256", "student_normalization")
    base = resolve_method(base.replace(**{name: getattr(alone, name) for name in names}))
    return config.replace(distill=base, teacher_training=training or None)


def _teacher_run(base: DistillConfig, training: dict[str, Any]) -> DistillConfig:
    """The training of a study's teacher; a mistake in its settings names where they stand."""
    with error_context("teacher_training"):
        try:
            return teacher_config(base, str(base.teacher), training)
        except UserError as error:
            raise UserError(f"teacher_training: {error}", keys=error.keys) from None


def prepare_study(
    recipe: Recipe,
    *,
    warm_start: Sequence[str | Path] = (),
    download: bool = False,
    resumed: Path | None = None,
    say: Say = lambda done, total: None,
) -> StudyConfig:
    """The study of a recipe, warm-started and checked; a mistake of its file is located.

    Args:
        warm_start: finished studies that the search learns from.
        resumed: the folder of the study that it is to continue.
        say: as of `check_study`.
    """
    with recipe.locate_errors():
        config = recipe.config
        if resumed and (resumed / STUDY_FILE).exists():
            there = Study.load(resumed).config
            # Before anything connects to another place than the study's own.
            same = there.replace(optuna_storage=config.optuna_storage)
            check_unchanged(resumed, there, same, given=recipe.given)
        if warm_start:
            config = warm_started(config, warm_start)
        if config.recipe_name is None and recipe.path.name != STUDY_FILE:
            config = config.replace(recipe_name=recipe.name)
        return check_study(config, download=download, say=say)


def _check_softmax_teacher(config: StudyConfig, base: DistillConfig) -> str | None:
    """Refuse the baseline ekd-softmax unless the study's teacher is evidential and another.

    Returns:
        The SHA-256 of the softmax teacher, None where it is still to be trained.
    """
    given, softmax = base.teacher_weights, config.softmax_teacher_weights
    key = base.teacher_key
    teacher = read_metadata(given, whole_classifier=False, key=key) if given else None
    trained = (config.teacher_training or {}).get("method") if teacher is None else None
    is_softmax = teacher and teacher.layout == "ekd_ray" and teacher.log_prior is None
    if softmax and (found := read_metadata(softmax, whole_classifier=False)).log_prior is not None:
        raise UserError(
            f"baseline ekd-softmax needs a teacher trained by plain cross-entropy, got {softmax} "
            f"with a learned prior of {found.log_prior:.3g}: name another softmax_teacher_weights."
        )
    if trained == "none" or is_softmax or (teacher and softmax and found.sha256 == teacher.sha256):
        raise UserError(
            f"baseline ekd-softmax is what this study does already, because its teacher "
            f"({given or 'to be trained by method none'}) is a softmax one: drop the baseline, or "
            "give an evidential teacher."
        )
    if teacher and not softmax:
        raise UserError(
            f"baseline ekd-softmax needs a softmax {base.teacher}: give --softmax-teacher-weights "
            f"FILE, or a --teacher-zoo with a folder {base.teacher}_vanilla."
        )
    return found.sha256 if softmax else None


def open_run(
    out: Path,
    config: StudyConfig,
    *,
    resume: bool,
    location: Location | None = None,
    accept_versions: bool = False,
) -> Study:
    """Create the study's folder, or join the one that is there with `resume`.

    Args:
        location: the URI that `out` is this machine's copy of, which the study's file then names.
        accept_versions: go on although results of other versions do not compare.

    Raises:
        UserError: the folder holds another study, or something else, or cannot be written; it
            was begun with versions that do not compare.
    """
    check_folder(out, config, resume=resume)
    check_writable(out)
    now = environment()
    before: int | None = None
    tested: list[int] = []
    if resume:
        there = Study.load(out)
        tested = there.header.get(TESTED_AT, [])
        before = there.header.get(EXTENDED_FROM)
        if before is None and there.config.trials < config.trials:
            before = there.config.trials
            tested = [*tested, *([before] if (out / CONFIRMED).exists() else [])]
        check_versions(out, there.header.get("environment"), now, accept=accept_versions)
        with contextlib.suppress(KeyError, TypeError):  # where nothing, or nonsense, is recorded
            warn_of_change(out, hardware(there.header["environment"]), hardware(now))
    header = {
        "format_version": FORMAT_VERSION,
        "fingerprint": config.fingerprint(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": now,
        **({} if before is None else {EXTENDED_FROM: before}),
        **({TESTED_AT: tested} if tested else {}),
        **({} if location is None else {PLACE: str(location)}),
        # Decoded once here: every trial of this node then maps the same pages.
        DATA: pin_data(config.distill, config.data_root),
        **asdict(count_pictures(config.distill, config.data_root)),
        "study": config.to_dict(),
    }
    write_sources(out, config.distill.plugins)
    write_study_file(out, header)
    return Study.load(out)


def check_folder(out: Path, config: StudyConfig, *, resume: bool) -> None:
    """Raise `UserError` if a folder holds another study, or something else; writes nothing."""
    if (out / STUDY_FILE).exists():
        study = Study.load(out)
        if not resume:
            raise UserError(f"{out} holds a study already: add --resume, or choose another --out.")
        check_unchanged(study.path, study.config, config)
        if changed := describe_other_settings(out / STUDY_FILE, study.header, study.config):
            raise UserError(f"{changed}: put them back, or begin anew with another --out.")
        _check_trials(study, config)
        _check_continues(study)
        pinned, cure = study.header.get(DATA), "begin anew with another --out"
        check_pinned(study.path, pinned, config.distill, config.data_root, cure=cure)
    elif missing := describe_missing(out):
        raise UserError(missing)
    elif out.exists() and (not out.is_dir() or not all(map(is_left_over, out.iterdir()))):
        raise UserError(f"{out} exists and holds no study: choose another --out.")
    elif resume:
        raise UserError(f"{out} holds no study to resume: check --out, or drop --resume.")
    else:
        _check_room(next(folder for folder in (out, *out.absolute().parents) if folder.exists()))


# Of each package, how many parts of its version must be equal for results to compare: a minor
# release of ekd_ray may move numbers, and torch's bits are told of by `warn_of_change`.
_COMPARED_PARTS = {"ekd_ray": 2, "torch": 1, "ray": 0, "optuna": 0}


def check_versions(
    folder: Path, there: object, here: Mapping[str, Any], *, accept: bool = False
) -> None:
    """Say that a study goes on under other versions than it was begun with.

    Args:
        there: the `environment` that it has recorded; nonsense is no reason to stop.
        here: that of now.
        accept: warn also where results do not compare.

    Raises:
        UserError: results of these versions do not compare.
    """
    packages = there.get("packages") if isinstance(there, Mapping) else None
    known = packages if isinstance(packages, Mapping) else {}
    told: list[str] = []
    refused: list[str] = []
    for name, parts in _COMPARED_PARTS.items():
        old, new = known.get(name), here["packages"].get(name)
        if not (isinstance(old, str) and isinstance(new, str)) or old == new:
            continue
        other = old.split(".")[:parts] != new.split(".")[:parts]
        text = f"{name} {new} instead of {old}"
        if other:
            refused.append(text)
        elif name != "torch":  # of which `warn_of_change` speaks
            told.append(text)
    if refused and not accept:
        raise UserError(
            f"{folder} would go on with {', '.join(refused)}, whose results need not compare with "
            "those that it has: install the version that it was begun with, or add "
            "--accept-versions."
        )
    if refused or told:
        warnings.warn(
            f"{folder} goes on with {', '.join(refused + told)}: each record has the versions "
            "that made it.",
            stacklevel=2,
        )


def is_left_over(path: Path) -> bool:
    """Left by a start that was killed, or made for a copy at a URI."""
    return is_temporary(path) or path.name in (MIRROR_STATE, LOCK, DRIVER_LOG)


def check_unchanged(
    folder: Path, there: Settings, here: Settings, *, given: Collection[str] = ()
) -> None:
    """Raise `UserError` unless `here` may resume the study or run in a folder, begun as `there`.

    Args:
        given: the settings that the user has named, which are the first to be blamed.
    """
    changed = {name.removeprefix("distill."): v for name, v in there.changes(here).items()}
    if not changed:
        return
    searched = there.space or {} if isinstance(there, StudyConfig) else {}

    causes = {"method": 0, "epochs": 1}  # others follow from them

    def derived(name: str) -> tuple[bool, int, bool, str]:
        mappings = any(isinstance(value, dict | list) for value in changed[name])
        return name not in given, causes.get(name, len(causes)), mappings, name

    def differ(name: str) -> str:
        old, new = ("searched" if name in searched else _value_text(name, changed[name][0]),
                    _value_text(name, changed[name][1]))  # fmt: skip
        return f"{name} is {old} there and {new} here"

    first, *others = sorted(changed, key=derived)
    more = ", ".join(others) if len(others) < MOST_NAMED else several(len(others), "other setting")
    also = f" ({more} differ{'s' if len(others) == 1 else ''} too)" if others else ""
    if isinstance(there, StudyConfig):
        command = resume_command(there, folder)
    else:
        alone = isinstance(there, DistillConfig) and there.teacher is None
        command = command_text("train-teacher" if alone else "distill", "--resume", "--out", folder)
    raise UserError(
        f"{folder} belongs to another configuration: {differ(first)}{also}: `{command}` continues "
        "it with its own settings; or choose another --out."
    )


def _value_text(name: str, value: object) -> str:
    if name == "optuna_storage" and value is None:
        return "the journal in the folder"
    return hide_secrets(str(value)) if isinstance(value, str) else shorten(value)


def _check_trials(study: Study, config: StudyConfig) -> None:
    """Refuse a number of trials that is less than those which the study has already."""
    if config.trials >= study.config.trials:
        return
    begun = sum(run.stage is RunStage.SEARCH and run.full_run_of is None for run in study.runs)
    if config.trials < begun:
        raise UserError(
            f"{study.path} has begun {several(begun, 'trial')} already, so that --trials must be "
            f">= {begun}, got {config.trials}.",
            keys=("trials",),
        )


def _check_continues(study: Study) -> None:
    """Refuse an older study whose further trials would not be of the kind that it has."""
    written = read_study_file(study.path / STUDY_FILE).values["study"]["distill"]
    searched = {"method", "temperature"} & {*(study.config.space or {})}
    second_order = study.config.distill.to_dict()["ekd_temperature"] is not None
    if "ekd_temperature" not in written and second_order and searched:
        raise UserError(
            f"{study.path} searches {' and '.join(sorted(searched))} and was begun by a release "
            "with another second order of EKD, so that further trials would not compare with its "
            "own: finish it with that release, or choose another --out."
        )


def check_writable(out: Path) -> None:
    """Create the folder if need be; raises `UserError` if it is read-only or full, or one would
    write through a link in it (`check_own_folder`)."""
    check_folder_place(out)
    check_own_folder(out, but=(JOURNAL_LOCKS,))
    _check_room(out)


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise UserError(
            f"{folder} has {free // 2**20} MiB free, a study needs >= {LEAST_FREE_BYTES // 2**20}: "
            "free some or choose another --out."
        )


def conduct_study(
    config: StudyConfig,
    out: Path,
    observer: Observer,
    *,
    location: Location | None = None,
    resume: bool = False,
    download: bool = False,
    accept_versions: bool = False,
    on_begin: Callable[[], None] = lambda: None,
) -> Bundle:
    """Begin or continue a checked study and bring it to its end.

    Args:
        config: what `prepare_study` returned.
        location: the URI that `out` is this machine's copy of.
        accept_versions: as of `open_run`.
        on_begin: called once the folder is this study's.

    Raises:
        UserError: the folder holds something else, or nothing came of the study. Interrupted:
            stopped by the user; `resume=True` continues.
    """
    if location and config.optuna_storage:
        raise UserError(
            "optuna_storage does not go together with a URI as --out, which a lost machine would "
            "leave behind the database: remove it, the journal is kept at the URI."
        )
    with mirrored(location, out, resume=resume, settle=drop_unknown_trials):
        if download:
            dataset, root = config.distill.dataset, config.data_root
            load_dataset(dataset, "train", data_root=root, download=True)
        if not (resume and (out / STUDY_FILE).exists()):  # before a folder and its lock are made
            check_folder(out, config, resume=resume)
        with lock_folder(out):
            study = open_run(
                out, config, resume=resume, location=location, accept_versions=accept_versions
            )
            on_begin()
            try:
                return run_study(study, observer)
            except UserError as error:
                given = config.distill.teacher_weights is not None
                weak = isinstance(error, WeakTeacher) and given
                if not (resume or location) and (weak or _is_untouched(out, error)):
                    _empty_folder(out)
                raise


def _is_untouched(out: Path, error: UserError) -> bool:
    """Whether nothing is there but the study's head, so that the same command may begin again."""
    begun = (out / teacher_figures.FILE, out / TEACHER.parent, out / SOFTMAX_TEACHER.parent)
    # After a full disk the sentence says how to go on.
    return not (
        isinstance(error, Halted) or trial_folders(out) or any(path.exists() for path in begun)
    )


def _empty_folder(out: Path) -> None:
    """Remove what a study that has just begun has written."""
    for path in out.iterdir():
        if not is_left_over(path):
            remove_path(path)


def run_study(study: Study, observer: Observer) -> Bundle:
    """Run or continue a study to its exported bundle in `<study>/best`, in its `lock_folder`.

    Args:
        study: opened by `open_run` from a configuration that `check_study` returned.

    Raises:
        UserError: refused before compute, or nothing came of it. Interrupted: stopped
            by the user; `resume=True` continues.
    """
    _sweep(study.path)
    try:
        bundle = _run_stages(study.config, study.path, observer)
    except NoWinner:  # only more trials help
        _end_extension(study.path)
        raise
    _sweep(study.path)
    _end_extension(study.path)
    return bundle


def _end_extension(out: Path) -> None:
    """From here on the same --extend adds trials again."""
    header = read_study_file(out / STUDY_FILE).values
    if header.pop(EXTENDED_FROM, None) is not None:
        write_study_file(out, header)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder and keep other processes out of it.

    Raises:
        UserError: another process is at work there, or it cannot be written.
    """
    check_writable(folder)
    lock = FileLock(folder / LOCK)  # released however this process ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being run by another process: wait for it or end it."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _sweep(out: Path) -> None:
    """Remove what was left by a driver that was killed, or by a worker under this one."""
    remove_temporaries(out)
    shutil.rmtree(out / SCRATCH, ignore_errors=True)


def _run_stages(config: StudyConfig, out: Path, observer: Observer) -> Bundle:
    tags = [metric_tag(name) for name in (*config.watched, "val_top1", "test_top1")]
    write_experiment(out, config.space or {}, dict.fromkeys(tags))
    with contextlib.ExitStack() as stack:
        # A cluster is joined before anything is computed; a Ray of our own would only be in the
        # way, but of several trainings of a teacher, and of those that are to run on a GPU.
        if on_cluster() or teaches_on_ray(config):
            stack.enter_context(connected(config, say=observer.note))
        nodes = known_nodes() or []
        if on_cluster():  # of which the plan knew nothing
            check_budget(config, nodes)
            slots, gpus = count_trials(config, nodes), describe_gpus(config.gpus_per_trial, nodes)
            observer.note(
                f"resources  {several(slots, 'trial')} at once on {several(len(nodes), 'node')}, "
                f"{gpus} each"
            )
        config = with_gpus(config)
        check_visible(out)
        if not config.gpus:
            stack.enter_context(share_of_gpu(0))
        base = _teacher_stage(out, config, observer)
        config = _softmax_teacher_stage(out, config, base, observer)
        if base.teacher_weights is not None:
            _measure_teacher(out, config, base, observer)
        with connected(config, say=observer.note):
            config = around_prior(config, base)
            search(out, config, base, observer)
            confirm(out, config, base, observer)
    observer.stage("export", 1, 0)
    study = Study.load(out)  # as its stages have left it
    bundle = export_bundle(study, out / BEST, force=True)
    _report(study)
    return bundle


def _report(study: Study) -> None:
    """Write the study's page; a failure there does not fail the study."""
    try:
        from ekd_ray.results.report import write_report  # slow to import, and needed last

        write_report(study)
    except Exception as error:
        warnings.warn(
            f"no report was made ({type(error).__name__}: {error}): try ekd-ray report.",
            stacklevel=2,
        )


def _teacher_stage(out: Path, config: StudyConfig, observer: Observer) -> DistillConfig:
    """The shared settings with a teacher that exists: given, or trained in `out/teacher`."""
    base = config.distill
    if not method_of(base).needs_teacher or base.teacher_weights is not None:
        return resolve(base, data_root=config.data_root)
    path = out / TEACHER
    teach(path, config, config.teacher_training or {}, observer)
    base = with_pairs_prior(config, base.replace(teacher_weights=str(path)))
    return resolve(base, data_root=config.data_root)


def _softmax_teacher_stage(
    out: Path, config: StudyConfig, base: DistillConfig, observer: Observer
) -> StudyConfig:
    """The study with the softmax teacher of its baseline, given or trained beside its own."""
    if config.softmax_teacher_weights or "ekd-softmax" not in baselines(config, base):
        return config
    # The settings of evidential training do not carry over.
    unused = {*REGISTRY} - {*METHODS["none"].setting_names}
    given = config.teacher_training or {}
    settings = {name: value for name, value in given.items() if name not in unused}
    path = out / SOFTMAX_TEACHER
    teach(path, config, {**settings, "method": "none"}, observer)
    return config.replace(softmax_teacher_weights=str(path))


def teach(path: Path, config: StudyConfig, settings: dict[str, Any], observer: Observer) -> None:
    """Train the study's teacher architecture to `path`, unless that is there already."""
    base = config.distill
    training = teacher_config(base, str(base.teacher), settings)
    candidates = teacher_candidates(base, settings)
    if len(candidates.seeds) > 1:
        check_visible(path.parent.parent)
        training = resolve(training, data_root=config.data_root)
        study = candidate_study(training, candidates, config)
        train_candidates(path, candidates, study, observer)
    elif not path.exists():
        note_continued(observer, path.parent.name, path.parent, training.epochs)
        observer.stage(path.parent.name, 1, training.epochs)
        observer.started(str(base.teacher), 0, training.to_dict())
        reported = epochs_reported(path.parent, functools.partial(observer.epoch, 0))
        with error_kept(path.parent), reported:
            compute_off_driver(
                config, _train_alone, training, path, config.data_root, _threads(config)
            )
        observer.ended(0, failure=None)
    forget_checkpoint(path.parent)  # a kill may have come before the training did


def teaches_on_ray(config: StudyConfig) -> bool:
    """Whether the study's own teacher is trained in processes of Ray."""
    return _count_candidates(config) > 1 or with_gpus(config).gpus > 0


def _train_alone(training: DistillConfig, path: Path, data_root: str | None, threads: int) -> None:
    session = Session(settings=())  # the tab of the search is not about it
    with refused_memory_reported(training):
        train_teacher(training, path, data_root=data_root, threads=threads, session=session)


def _threads(config: StudyConfig) -> int:
    """CPU threads of what runs before the trials: beside a GPU those of a trial."""
    return config.cpus_per_trial if config.gpus else local_cpus()


def _count_candidates(config: StudyConfig) -> int:
    """How many trainings of a teacher the study asks for; 0 for a given one, or none."""
    base = config.distill
    if not method_of(base).needs_teacher or base.teacher_weights is not None:
        return 0
    return len(teacher_candidates(base, config.teacher_training or {}).seeds)


def _measure_teacher(
    out: Path, config: StudyConfig, base: DistillConfig, observer: Observer
) -> None:
    """Write the teacher's own figures to `teacher.json`, once, and say them."""
    found = None
    with contextlib.suppress(Damaged):  # it is measured again
        found = TeacherFigures.read(out)
    if found is None or found.sha256 != base.teacher_sha256:
        measure = functools.partial(
            measure_teacher,
            base,
            candidates=_count_candidates(config),
            data_root=config.data_root,
            threads=_threads(config),
        )
        found = compute_off_driver(config, measure)
        found.write(out)
    for line in (describe_teacher(found), *warn_of_teacher(found)):
        observer.note(line)
    refuse_weak_teacher(base, found)
