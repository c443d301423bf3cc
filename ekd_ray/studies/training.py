"""Training one configuration without a search, as `distill` and `train_teacher` ask for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.study_config import Gpus
from ekd_ray.data import load_dataset
from ekd_ray.data.scan import Say
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.data_pin import check_pinned, pin_data
from ekd_ray.engine.determinism import decide_determinism
from ekd_ray.engine.distill import Diverged, distill
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.engine.measure.teacher_pass import check_teacher
from ekd_ray.engine.out_of_memory import refused_memory_reported
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.engine.resolve import check_images, check_teacher_settings, check_workers, resolve
from ekd_ray.engine.train_teacher import check_candidates
from ekd_ray.errors import UserError
from ekd_ray.files import remove_temporaries, write_json
from ekd_ray.losses.methods import method_of
from ekd_ray.models import checkpoints_kept
from ekd_ray.remote.location import Location
from ekd_ray.remote.session import mirrored
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import PIN, RESULT, find_pin, single_run
from ekd_ray.results.run_result import RunResult
from ekd_ray.scale.cluster import (
    check_fits,
    check_visible,
    connected,
    known_nodes,
    local_nodes,
    with_gpus,
)
from ekd_ray.scale.one_run import check_workers_fit, note_continued, parse_workers, run_on_workers
from ekd_ray.scale.teacher_candidates import (
    candidate_study,
    check_candidate_folder,
    train_candidates,
)
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.trainer import Workers
from ekd_ray.studies.pipeline import (
    TEACHER,
    check_teaching,
    check_unchanged,
    check_writable,
    is_left_over,
    lock_folder,
    teach,
    teaches_on_ray,
)
from ekd_ray.studies.places import default_folder


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that `planned` has checked.

    Attributes:
        config: of the run, resolved; of the first of several candidates.
        workers: data-parallel, of a single run.
        study: of `candidate_study`, where there are candidates.
        teaching: the study whose teacher is trained first, in the run's folder; None where that is
            given, or not needed.
        location: the URI that `out` is this machine's copy of.
        test: read the test split once, after the last epoch.
    """

    config: DistillConfig
    out: Path
    workers: Workers
    candidates: Candidates | None = None
    study: StudyConfig | None = None
    teaching: StudyConfig | None = None
    location: Location | None = None
    data_root: str | None = None
    test: bool = False
    download: bool = False
    resume: bool = False


@contextlib.contextmanager
def planned(
    run: DistillConfig,
    *,
    out: Path | None = None,
    location: Location | None = None,
    candidates: Candidates | None = None,
    teacher_training: Mapping[str, Any] | None = None,
    workers: str = "1",
    cpus_per_trial: int | None = None,
    gpus_per_trial: Gpus | None = None,
    data_root: str | None = None,
    test: bool = False,
    download: bool = False,
    resume: bool = False,
    say: Say = lambda done, total: None,
) -> Iterator[Training]:
    """The training of a configuration, checked before compute; nothing is written.

    GPUs are hidden inside where none is asked for.

    Args:
        out: None for a folder below `runs/`.
        teacher_training: settings to train the teacher with, where no weights are given.
        workers: `N` or `MIN:MAX`.
        say: told how many pictures have been looked at, and how many there are.
        cpus_per_trial, gpus_per_trial: of each worker; None for what there is.

    Raises:
        UserError: what can be refused before compute.
    """
    gpus = "auto" if gpus_per_trial is None else gpus_per_trial
    resources = StudyConfig(
        data_root=data_root, cpus_per_trial=cpus_per_trial or 1, gpus_per_trial=gpus
    )
    group = parse_workers(workers, cpus=cpus_per_trial, gpus=resources.gpus_per_trial)
    if candidates:
        for flag, given in (("--test", test), ("--workers", group.most > 1)):
            if given:
                raise UserError(
                    f"{flag} is for one training, got {len(candidates.seeds)} candidates: drop one "
                    "of the two flags."
                )
    # Before anything asks for a GPU.
    with share_of_gpu(0) if group.gpus == 0 else contextlib.nullcontext():
        if out is None:
            out = default_folder(run, run.student, run.method, f"seed{run.seed}")
        teaching = None
        check_teacher_settings(run)
        with checkpoints_kept():
            if method_of(run).needs_teacher and run.teacher_weights is None and teacher_training:
                teaching = resources.replace(distill=run, teacher_training=dict(teacher_training))
                teaching = check_teaching(teaching, download=download)
                config = teaching.distill
            else:
                config = resolve(run, data_root=data_root, download=download)
            check_images(config, data_root, say)
            if teaching is None:
                check_teacher(config, data_root)
        check_workers(config, group.most)
        study = None
        if candidates:
            check_candidates(config, candidates)
            study = candidate_study(config, candidates, resources)
            if cpus_per_trial:
                study = study.replace(cpus_per_trial=cpus_per_trial)
            check_fits(study)
        elif group.most == 1:  # in this process
            nodes = local_nodes()
            check_workers_fit(replace(group.on(nodes), cpus=1), nodes)
        elif (there := known_nodes()) is not None:
            check_workers_fit(group.on(there), there)
        yield Training(
            config=config, out=out.absolute(), workers=group, candidates=candidates, study=study,
            teaching=teaching, location=location, data_root=data_root, test=test,
            download=download, resume=resume,
        )  # fmt: skip


def run_training(
    training: Training, observer: Observer, *, on_begin: Callable[[], None] = lambda: None
) -> RunResult:
    """Train into `training.out`: history, events, weights, result.json.

    Args:
        on_begin: called once the folder is this process's; not for a run that has ended before.

    Raises:
        UserError: the folder holds something else, the run diverges or gets no memory, or its
            workers died again and again.
    """
    out = training.out
    with mirrored(training.location, out, resume=training.resume), lock_folder(out):
        if (out / TEACHER).exists():
            training = _taught(training, observer)
        check_run_folder(out, training.config, resume=training.resume)
        check_candidate_folder(out, training.candidates)
        remove_temporaries(out)  # a command that was killed has left them
        if not (out / RESULT).exists():  # else it has ended before
            name, root = training.config.dataset, training.data_root
            if training.download:
                load_dataset(name, "train", data_root=root, download=True)
            cure = "begin anew with another --out"
            check_pinned(out, find_pin(out), training.config, root, cure=cure)
            if training.teaching is None:
                single_run(training.config, out).write_config()
            else:  # which comes before its student is known
                (out / TEACHER).parent.mkdir(exist_ok=True)
            if not (out / PIN).exists():
                write_json(out / PIN, pin_data(training.config, root))
            on_begin()
            with failures_in_sentences(training.config):
                if training.teaching is not None:
                    training = _taught(training, observer)
                    single_run(training.config, out).write_config()
                _train(training, observer)
        return RunResult.load(out)


def _taught(training: Training, observer: Observer) -> Training:
    """The training with its teacher, which is trained in `out/teacher` unless it is there."""
    path, study = training.out / TEACHER, training.teaching
    if study is not None:
        needs_ray = teaches_on_ray(study) and not path.exists()
        with connected(study) if needs_ray else contextlib.nullcontext():
            teach(path, with_gpus(study), study.teacher_training or {}, observer)
        given = study.distill.replace(teacher_weights=str(path))
        config = resolve(given, data_root=training.data_root)
        training = replace(training, config=config, teaching=None)
    return training


def _train(training: Training, observer: Observer) -> None:
    config, out, data_root = training.config, training.out, training.data_root
    if training.candidates and training.study:
        joined = connected(training.study, say=observer.note)
        with contextlib.nullcontext() if (out / WEIGHTS).exists() else joined:
            check_visible(out)
            train_candidates(out / WEIGHTS, training.candidates, training.study, observer)
        return
    run, workers = single_run(config, out), training.workers
    note_continued(observer, config.student, out, config.epochs)
    observer.stage("training", 1, config.epochs)
    observer.started(config.student, 0, config.to_dict())
    on_epoch = functools.partial(observer.epoch, 0)
    if workers.most > 1:
        observer.note("starting the workers, whose first epoch follows ...")
        run_on_workers(run, workers, data_root=data_root, test=training.test, on_epoch=on_epoch)
        observer.ended(0, failure=None)
        return
    gpus = workers.on(local_nodes()).known_gpus
    with cpu_threads(workers.cpus), share_of_gpu(gpus):
        train = functools.partial(distill, data_root=data_root, out=out, on_epoch=on_epoch)
        result = decide_determinism(config, train, wanted=run.stage.exports)
        observer.ended(0, failure=None)
        if training.test:
            observer.stage("test split", 1, 0)
        finish_run(run, result, data_root=data_root, test=training.test)
    forget_checkpoint(out)


@contextlib.contextmanager
def failures_in_sentences(config: DistillConfig) -> Iterator[None]:
    """If a run inside diverges or gets no memory, that is a `UserError`."""
    try:
        with refused_memory_reported(config):
            yield
    except Diverged as error:
        raise UserError(str(error)) from None


def check_run_folder(out: Path, config: DistillConfig, *, resume: bool) -> None:
    """Refuse to mix runs: another configuration's folder, or this one's without --resume."""
    check_writable(out)
    # Of a run that was interrupted before its student began.
    own = ((out / TEACHER).parent, out / PIN)
    if (out / "config.yaml").exists():
        check_unchanged(out, DistillConfig.from_yaml(out / "config.yaml"), config)
        if not resume:
            raise UserError(f"{out} holds this run already: add --resume, or choose another --out.")
    elif not all(is_left_over(p) or (resume and p in own) for p in out.iterdir()):
        raise UserError(f"{out} holds something else: choose another --out.")
    elif resume and not own[0].exists():
        raise UserError(f"{out} holds no run to resume: check --out, or drop --resume.")
