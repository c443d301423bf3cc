"""The resolved plan of a study or run in words: what would run, on what, for how long."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ekd_ray.cli.study_text import describe_stage
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.phrases import joined, several, size_text
from ekd_ray.config.plugins import describe_plugins
from ekd_ray.config.study_config import FIRST_SEEDS, Gpus
from ekd_ray.config.targets import OF_CLASSES, PictureCounts
from ekd_ray.data import (
    DatasetInfo,
    dataset_info,
    num_test,
    steps_per_epoch,
    training_labels,
)
from ekd_ray.data.drawn_views import count_views
from ekd_ray.engine.compiling import wants_compilation
from ekd_ray.engine.control_groups import memory_limit
from ekd_ray.engine.decoding import measure_decoding
from ekd_ray.engine.measure.cost import BACKWARD, core_rate, model_cost
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.measure.teacher_pass import can_look, look_at_teacher
from ekd_ray.engine.precision import describe_slowness, planned_precision
from ekd_ray.engine.resolve import describe_images, left_out, read_start, split_sizes, student_size
from ekd_ray.engine.rundata import count_pictures
from ekd_ray.engine.teacher.source import table_bytes, table_settings, uses_cache
from ekd_ray.engine.teacher.table import tables_dir
from ekd_ray.engine.train_teacher import teacher_candidates, teacher_config
from ekd_ray.losses.methods import method_of
from ekd_ray.models import locate_weights, read_metadata
from ekd_ray.results.progress import progress
from ekd_ray.results.records import milestone_epochs, trial_folders
from ekd_ray.results.row_names import label
from ekd_ray.results.study_file import STUDY_FILE
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import (
    describe_few_pictures,
    describe_teacher,
    value_text,
    warn_of_teacher,
)
from ekd_ray.scale.assumed_nodes import assumed_nodes
from ekd_ray.scale.cluster import (
    ADDRESS,
    Node,
    cores_of_share,
    count_at_once,
    count_room,
    count_trials,
    describe_gpus,
    gpus_per_worker,
    known_nodes,
    local_cpus,
    local_nodes,
    on_cluster,
)
from ekd_ray.scale.confirm import baselines, champions
from ekd_ray.scale.space import (
    Space,
    around_prior,
    first_points,
    known_prior,
    point_config,
    with_pairs_prior,
)
from ekd_ray.scale.trainer import Workers
from ekd_ray.studies.pipeline import TEACHER

# Named in a plan where they are on.
TRAINING_AIDS = (
    *("auto_augment", "randaugment_ops", "randaugment_magnitude", "random_erasing"),
    *("mixup_alpha", "cutmix_alpha", "mix_share", "label_smoothing", "max_grad_norm", "ema_decay"),
)

# Sustained rates for the rough estimate: one CPU core in float32, where none is measured, and one
# GPU in bfloat16.
CPU_FLOPS = 25e9
GPU_FLOPS = 2e13
LONG = 8 * 3600  # seconds: a study that takes more is told what makes it shorter
SMALL = 64  # pixels a side, for less
ROW = 66  # signs, beside the heads of the rows
UNEVEN = 5  # between classes: by more, accuracy hides the small ones


def run_flops(config: DistillConfig, data_root: str | None, *, final: bool = False) -> float:
    """FLOPs of one full run, without the teacher: forward and backward, and evaluation.

    A final run holds nothing out and reads the test split at its end.
    """
    info = dataset_info(config.dataset, data_root=data_root)
    forward = model_cost(config.student, info.num_classes, student_size(config, data_root))[1]
    if final:
        tested = num_test(config.dataset, data_root=data_root) or 0
        evaluated = tested - len(left_out(config, "test", data_root))
    else:
        evaluated = config.epochs * split_sizes(config, data_root)[1]
    return forward * (BACKWARD * _views(config, data_root, final=final) + evaluated)


def teacher_flops(config: DistillConfig, data_root: str | None, *, final: bool = False) -> float:
    """FLOPs of the teacher for the views of one full run, 0 for a method without one."""
    if not (config.teacher and method_of(config).needs_teacher):
        return 0.0
    info = dataset_info(config.dataset, data_root=data_root)
    size = config.image_size or info.image_size
    cost = model_cost(config.teacher, info.num_classes, size)[1]
    return cost * _views(config, data_root, final=final)


def _views(config: DistillConfig, data_root: str | None, *, final: bool) -> int:
    """Views of images that a run shows its student."""
    if final:
        config = config.replace(validation_fraction=0.0)
    kept, _ = split_sizes(config, data_root)
    images = steps_per_epoch(kept, config.batch_size) * config.batch_size
    return (2 if method_of(config).strong_view else 1) * images * config.epochs


def run_plan(
    config: DistillConfig,
    out: Path,
    data_root: str | None,
    workers: Workers | None = None,
    candidates: Candidates | None = None,
    study: StudyConfig | None = None,
    teaching: StudyConfig | None = None,
    role: str = "student",
) -> str:
    """The plan of one run, in this process or on `workers`, or of several candidates.

    Args:
        study: of `candidate_study`, where there are candidates.
        teaching: the study whose teacher is trained first.
        role: what the network that is trained is called.
    """
    lines = [f"out        {out} ({_free(out)})"]
    flops = run_flops(config, data_root) + teacher_flops(config, data_root)
    trained, found = [], None
    if teaching:
        trained = [f"           {_teacher_training(teaching)}"]
        flops += _teaching_flops(teaching)
    elif method_of(config).needs_teacher:
        found, looked_at = _looked_at(config, data_root)
        trained = _indented(looked_at)
    setup = _setup(config, data_root, trained, role=role)
    few = _warnings(PictureCounts(validation_images=split_sizes(config, data_root)[1]))
    lines = [*_teacher_warnings(found), *few, *setup, *lines]
    if candidates and study:
        lines.append(f"candidates {candidates.describe_cost(config.epochs)}")
        flops *= len(candidates.seeds)
        lines.append(f"resources  {_at_once(study)}")
        cpus, gpus = _used(study, most=len(candidates.seeds))
        each = study.cpus_per_trial, study.gpus_per_trial
        nodes, group = known_nodes(), 1
    else:
        workers = workers or Workers(least=1, most=1, cpus=local_cpus(), gpus="auto")
        # One worker is this process.
        nodes = known_nodes() if workers.most > 1 else local_nodes()
        each = workers.cpus, workers.gpus
        share, group = _share(*each, nodes), workers.most
        count = several(group, "worker")
        running, gpus = group, gpus_per_worker(workers.gpus, nodes or ())
        if workers.elastic:
            count = f"{workers.least} to {count}"
            if nodes is not None:
                running = min(group, count_room(nodes, cpus=workers.cpus, gpus=gpus))
                count += f" ({running} fit now)"
        text = f"{count}, each with {share}" if group > 1 else f"{count} with {share}"
        lines.append(f"resources  {text}")
        cpus, gpus = running * workers.cpus, running * gpus
        if nodes is not None:  # the threads of this process may be more
            cpus = min(cpus, int(sum(node_cpus for node_cpus, _ in nodes)))
    lines.append(_arithmetic(config, data_root, each[1], nodes, workers=group, exported=True))
    lines += _decoding(config, data_root, *each, nodes)
    speed = _speed(config, data_root, cpus, gpus)
    lines.append(f"estimate   {_duration(flops, speed)}")
    return "\n".join(lines)


def fill_plan(config: StudyConfig, seeds: Sequence[int], *, processes: int, threads: int) -> str:
    """The plan of filling the teacher's table for runs of `config.distill` under `seeds`.

    Args:
        threads: CPU threads of each process.
    """
    base, root = config.distill, config.data_root
    info, strong = dataset_info(base.dataset, data_root=root), method_of(base).strong_view
    views = count_views(base, info.view_scheme) + base.view_pool * strong
    drawn = len(set(seeds)) * _views(base, root, final=False)
    rows = min(drawn, views * split_sizes(base, root)[0])
    share = _share(threads, config.gpus_per_trial, local_nodes())
    text = f"{processes} processes, each" if processes > 1 else "this process"
    lines = [
        *_setup(base, root),
        f"rows       at most {rows:,}, those that {several(len(seeds), 'seed')} will read and the "
        "table lacks",
        f"resources  {text} with {share}",
    ]
    return "\n".join(lines)


def study_plan(config: StudyConfig, out: Path, *, begins: bool = False) -> str:
    """The plan of a study: setup, space, trials, resources, disk, estimate.

    Args:
        begins: the study begins or goes on now, and so says itself how good its teacher is.
    """
    trained = out / TEACHER
    if config.distill.teacher_weights is None and trained.is_file():
        base = config.distill.replace(teacher_weights=str(trained))
        base = with_pairs_prior(config, base)
        config = around_prior(config.replace(distill=base), base)
    base, space = config.distill, Space(config.space)
    parameters = [f"{name} {item.describe()}" for name, item in space.parameters.items()]
    known, compared = champions(config, base), baselines(config, base)
    nodes = known_nodes()
    listed = len(first_points(config))
    first = f", after {several(listed, 'trial')} with known values" if listed else ""
    if config.authors and config.try_authors is False:
        first += " (without the authors')"
    seeds = several(config.most_seeds, "seed")
    if config.confirm_seeds == "auto":
        seeds = f"{FIRST_SEEDS} to {seeds}"
    elif config.confirm_elimination and config.most_seeds > FIRST_SEEDS:
        seeds += f" ({FIRST_SEEDS} where clearly worse)"
    finalists = min(config.confirm_top_k, config.trials)
    contenders = ", ".join((*known, *([f"best {finalists}"] if finalists else [])))
    final = ", ".join(("winner", *known, *map(label, compared)))
    found, teacher = _teacher_lines(config, out, judged=not begins)
    lines = [
        *_teacher_warnings(found),
        *_warnings(count_pictures(base, config.data_root), config.watched),
        *_search_warnings(config.trials, listed),
        *_table_warnings(base, space, config.data_root),
        *_setup(base, config.data_root, teacher, study=config),
        *_priors(config),
        *([f"recipe     {config.recipe_name}"] if config.recipe_name else []),
        f"space      {parameters[0]}",
        *(f"           {line}" for line in parameters[1:]),
        f"search     {config.trials} trials by {_aims(config)} on the validation split; "
        f"sampler {config.chosen_sampler}{first}{_budget(config)}",
        f"stopping   {_stopping(config)}",
        f"confirm    {contenders} over {seeds}; "
        f"then {final} on all training images, test read once",
        f"resources  {_at_once(config)}",
        _arithmetic(
            base,
            config.data_root,
            config.gpus_per_trial,
            nodes,
            workers=config.workers_per_trial,
            exported=False,
        ),
        *_decoding(base, config.data_root, config.cpus_per_trial, config.gpus_per_trial, nodes),
        f"out        {out} ({_disk(config)}; {_free(out)})",
        *([] if begins else _trials_there(out)),
        *_study_duration(config, continued=bool(trial_folders(out))),
    ]
    return "\n".join(lines)


def _trials_there(out: Path) -> list[str]:
    """The stage and trials of a study that is to be continued."""
    if not (out / STUDY_FILE).is_file():
        return []
    return [f"so far     {describe_stage(progress(StudyReader.load(out)))}"]


def _search_warnings(trials: int, listed: int) -> list[str]:
    """A warning where the trials end with the known values, or before them."""
    if listed < max(trials, 1):
        return []
    return [
        f"warning    {several(trials, 'trial')} for {several(listed, 'configuration')} with known "
        f"values, which come first: nothing else is tried; give --trials more than {listed}"
    ]


def _table_warnings(base: DistillConfig, space: Space, data_root: str | None) -> list[str]:
    """A warning for each range that gives every trial a teacher's table of its own."""
    lines = []
    for name, parameter in space.parameters.items():
        if parameter.choices is not None:
            continue
        point = {other: legal[0] for other, legal in parameter.when.items()}
        low, high = (
            point_config(base, {**point, name: parameter.nearest(value)})
            for value in (parameter.low, parameter.high)
        )
        if table_settings(low) != table_settings(high) and uses_cache(high, data_root):
            lines.append(
                f"warning    {name} is searched in a range: a trial with another value shares none "
                f"of the teacher's logits, and fills a cache of its own; give a few values (--set "
                f"{name}=choice:{parameter.low:g},{parameter.high:g})"
            )
    return lines


def _at_once(config: StudyConfig) -> str:
    """How many trials run at once, and what each is given."""
    nodes = known_nodes()
    slots = f"as many trials at once as fit on {os.environ.get(ADDRESS)}"  # it says, once joined
    if nodes is not None:
        fit = count_at_once(config, nodes)
        more = "room for " if fit > config.trials else ""
        slots = f"{more}{several(fit, 'trial')} at once {_where()}"
        if fit < count_trials(config, nodes):
            slots += f" (its memory, {size_text(memory_limit())}, has room for no more)"
    group, share = (
        config.workers_per_trial,
        _share(config.cpus_per_trial, config.gpus_per_trial, nodes),
    )
    return f"{slots}, each " + (f"on {group} workers, each " if group > 1 else "") + f"with {share}"


def _where() -> str:
    """The nodes of a plan: here, or those that are assumed."""
    nodes = assumed_nodes()
    if nodes is None:
        return "here"
    cpus, gpus = nodes[0]
    each = [several(cpus, "CPU"), *([several(gpus, "GPU")] if gpus else [])]
    return f"on {several(len(nodes), 'assumed node')} with {joined(each)}"


def _share(cpus: int, gpus: Gpus, nodes: list[Node] | None) -> str:
    """The CPUs and GPUs of a worker."""
    return f"{several(cpus, 'CPU')} and {describe_gpus(gpus, nodes)}"


def _arithmetic(
    config: DistillConfig,
    data_root: str | None,
    asked: Gpus,
    nodes: list[Node] | None,
    *,
    workers: int,
    exported: bool,
) -> str:
    """Precision, compilation and determinism of runs that are each on so many `workers`.

    Args:
        asked: GPUs of a worker.
        exported: the weights are for use; else the runs are those of a search.
    """
    on_gpu = gpus_per_worker(asked, nodes or ()) > 0
    precision, compiled = config.precision, config.compile
    if not on_cluster():  # of whose processors nothing is known here
        if precision == "auto":
            known = None if on_gpu and assumed_nodes() else planned_precision("auto", on_gpu=on_gpu)
            precision = f"{known or 'bfloat16 where the GPU has it, or else float16'} (auto)"
        elif reason := describe_slowness(precision, on_gpu=on_gpu):
            precision += f" (slower than auto: {reason})"
    if compiled == "auto" and nodes is not None:
        steps = steps_per_epoch(split_sizes(config, data_root)[0], config.batch_size)
        device = torch.device("cuda" if on_gpu else "cpu")
        pays = workers == 1 and wants_compilation(config, device, config.epochs * steps)
        compiled = f"{'on' if pays else 'off'} (auto)"
    where = {True: "everywhere", False: "nowhere", None: "in what is exported"}
    if exported:
        where = {True: "yes", False: "no", None: "yes (default)"}
    return (
        f"arithmetic {precision}, compile {compiled}, deterministic {where[config.deterministic]}"
    )


def _used(config: StudyConfig, most: int | None = None) -> tuple[int, float]:
    """CPUs and GPUs of the trials that run at once, of this machine if the cluster is unknown."""
    nodes = known_nodes() or local_nodes()
    slots = count_at_once(config, nodes)
    used = min(slots, most or slots) * config.workers_per_trial
    return used * config.cpus_per_trial, used * gpus_per_worker(config.gpus_per_trial, nodes)


def _stopping(config: StudyConfig) -> str:
    if config.scheduler == "median":
        return f"median rule from epoch {config.grace} on"
    if epochs := ", ".join(map(str, milestone_epochs(config)[:-1])):
        kept = f"{config.scheduler} keeps 1 in {config.reduction_factor} after epoch {epochs}"
        return f"{kept}; at least {min(config.confirm_top_k, config.trials)} run in full"
    return "none"


def _budget(config: StudyConfig) -> str:
    limits = {
        "epochs in all": config.budget_epochs,
        "hours": config.budget_hours,
        "GPU-hours in all": config.budget_gpu_hours,
    }
    given = [f"after {limit:g} {unit}" for unit, limit in limits.items() if limit is not None]
    if config.stop_below is not None:
        given.append(f"once a gain below {config.stop_below:g} is expected")
    return f"; no new one {' or '.join(given)}" if given else ""


def _aims(config: StudyConfig) -> str:
    """`val_top1`, `val_top1 and parameters (Pareto front)`, `val_top1 with val_ece<=0.05`."""
    text = " and ".join(config.all_objectives)
    text += " (Pareto front)" if config.objectives else ""
    return text + (f" with {', '.join(config.constraints)}" if config.constraints else "")


def _teacher_lines(
    config: StudyConfig, out: Path, *, judged: bool
) -> tuple[TeacherFigures | None, list[str]]:
    """A teacher's figures, if they are known, and lines: the trainings that it costs and, if it is
    to be `judged`, the figures; empty without a teacher."""
    base = config.distill
    if not method_of(base).needs_teacher:
        return None, []
    lines = []
    if base.teacher_weights is None and base.teacher:
        lines.append(_teacher_training(config))
    found = TeacherFigures.read(out)
    if found and base.teacher_sha256 in (None, found.sha256):
        lines += [describe_teacher(found)] * judged
    elif base.teacher_sha256 is not None:  # a given one
        found, looked_at = _looked_at(base, config.data_root, judged=judged)
        lines += looked_at
    else:
        found = None
        lines.append("its accuracy is measured once it is trained")
    return found, _indented(lines)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"           {line}" for line in lines]


def _rows(items: Iterable[str]) -> list[str]:
    """Items with commas between, as many in a row as a narrow terminal shows whole."""
    rows: list[str] = []
    for item in items:
        if rows and len(rows[-1]) + len(item) + 2 <= ROW:
            rows[-1] += f", {item}"
        else:
            rows.append(item)
    return [f"{row}," for row in rows[:-1]] + rows[-1:]


def _looked_at(
    config: DistillConfig, data_root: str | None, *, judged: bool = True
) -> tuple[TeacherFigures | None, list[str]]:
    """A given teacher's figures on the first images, and lines on these and on which of its weights
    are used; None where the data are still to be fetched, or nothing is held out."""
    facts = read_metadata(
        str(config.teacher_weights), whole_classifier=False, key=config.teacher_key
    )
    lines = []
    if facts.other_keys:
        lines.append(
            f"its file has several sets of weights: {facts.key} is used; --teacher-key takes "
            f"{' or '.join(facts.other_keys)}"
        )
    if not can_look(config, data_root):
        return None, lines
    found = look_at_teacher(config, data_root, local_cpus())
    return found, lines + [describe_teacher(found)] * judged


def _teacher_warnings(found: TeacherFigures | None) -> list[str]:
    return [f"warning    {text}" for text in warn_of_teacher(found)]


def _teacher_training(config: StudyConfig) -> str:
    """The trainings of a study's own teacher."""
    base, settings = config.distill, config.teacher_training or {}
    training = teacher_config(base, str(base.teacher), settings)
    epochs, start = training.epochs, training.student_weights
    candidates = teacher_candidates(base, settings)
    if len(candidates.seeds) > 1:
        return candidates.describe_cost(epochs)
    text = f"1 training of {several(epochs, 'epoch')}"
    text += f" from {locate_weights(str(base.teacher), start)}" if start else ""
    return f"{text} (--set 'teacher_training={{epochs: N}}' for another number)"


def _warnings(counts: PictureCounts, metrics: Iterable[str] = ()) -> list[str]:
    return [f"warning    {text}" for text in describe_few_pictures(counts, metrics)]


def _start(config: DistillConfig, info: DatasetInfo) -> list[str]:
    """The weights that the student starts from, where they are not drawn."""
    if config.student_weights is None:
        return []
    model, classes = config.student, info.num_classes
    path = locate_weights(model, config.student_weights)
    had = read_start(model, classes, path).num_classes
    head = (
        "and its classifier" if had in (0, classes) else f"a new classifier ({had} classes before)"
    )
    way = "as its weights were" if config.student_normalization else "as the data set"
    return [f"           starts from {path}, {head}; normalised {way}"]


def _setup(
    config: DistillConfig,
    data_root: str | None,
    teacher_lines: Iterable[str] = (),
    *,
    role: str = "student",
    study: StudyConfig | None = None,
) -> list[str]:
    info = dataset_info(config.dataset, data_root=data_root)
    kept, held = split_sizes(config, data_root)
    views = count_views(config, info.view_scheme)
    size = config.image_size or info.image_size
    lines = [
        f"data       {config.dataset}: {kept} training and {held} validation images of "
        f"{size} x {size}, {info.num_classes} classes, {several(views, 'view')} each",
        *_imbalance(config, data_root, study),
        *(f"pictures   {line}" for line in describe_images(config, data_root)),
        f"{role:<10} {_model(config.student, info, student_size(config, data_root))}",
        *_start(config, info),
    ]
    if method_of(config).needs_teacher:
        source = config.teacher_weights or "to be trained first"
        lines.append(f"teacher    {_model(str(config.teacher), info, size)}, {source}")
        student, teacher = (
            model_cost(str(name), info.num_classes, size)[0]
            for name in (config.student, config.teacher)
        )
        if student > teacher:
            lines.append("           the student is larger: --student takes a smaller one")
        lines += teacher_lines
        lines.append(f"cache      {_cache(config, data_root)}")
    if config.ood_dataset:
        lines.append(f"unknown    {config.ood_dataset}, for ood_auroc")
    solver = f"{config.optimizer} lr {config.lr:g} {config.schedule}, batch {config.batch_size}"
    if config.accumulation_steps > 1:
        solver += f" in {config.accumulation_steps} parts"
    lines.append(f"solver     {solver}, {several(config.epochs, 'epoch')}, seed {config.seed}")
    lines += [f"           {text}" for text in config.fitted]
    known = {field.name: field.default for field in config.fields()}
    aids = [name for name in TRAINING_AIDS if getattr(config, name) != known[name]]
    if aids:
        shown = ", ".join(f"{name} {value_text(getattr(config, name))}" for name in aids)
        lines.append(f"aids       {shown}")
    read = {name: getattr(config, name) for name in sorted(method_of(config).setting_names)}
    values = [f"{name} {value_text(v)}" for name, v in read.items() if v is not None]
    lines.append(f"method     {config.method}{':' if values else ''}")
    lines += _indented(_rows(values))
    return [*lines, *(f"plugin     {text}" for text in describe_plugins(config.plugins))]


def _imbalance(
    config: DistillConfig, data_root: str | None, study: StudyConfig | None
) -> list[str]:
    """The sizes of the least and the largest class, and what to do, where they differ much."""
    labels = training_labels(config.dataset, data_root=data_root)
    counts = [0] if labels is None else np.unique(labels, return_counts=True)[1]
    least, most = int(min(counts)), int(max(counts))
    alone = int(np.sum(counts == 1)) if config.validation_fraction else 0
    unseen = [
        f"           classes of one image: {alone}; that one trains, and nothing validates them"
    ] * (alone > 0)
    if most <= UNEVEN * least:
        return unseen
    text = (
        f"           the classes have {least} to {most} images ({most / least:.0f} times as many)"
    )
    if config.class_balance:
        return [
            *unseen,
            f"{text}; class_balance {config.class_balance:g} gives them more even shares",
        ]
    advice = []
    if study is None or "class_balance" not in (study.space or {}):
        advice.append("--set class_balance=1" + " (or choice:0,0.5,1)" * (study is not None))
    if study and not {*study.all_objectives} & {*OF_CLASSES}:
        advice.append("--set metric=val_balanced_top1")
    return [
        *unseen,
        f"{text}: accuracy counts the large ones",
        *([f"           consider {' and '.join(advice)}"] if advice else []),
    ]


def _priors(config: StudyConfig) -> list[str]:
    """Where the log prior of an evidential study comes from, and its softmax teacher, if any."""
    base = config.distill
    lines: list[str] = []
    settings: Any = base  # the settings of methods are found by name
    if not (method_of(base).evidential and method_of(base).needs_teacher):
        return lines
    known = known_prior(config, base)
    value = settings.teacher_log_prior if settings.learn_log_prior else settings.log_prior
    if value is None and known:
        value = known.value
    if value is None:
        lines.append("prior      the one that the teacher will have learned, else the recipe's")
    else:
        source = "as given"
        if known and value == known.value:
            source = "the teacher has learned it"
            if known.is_pairs:
                source = "the pair's, because the teacher's file has none"
        elif known is None and value == 0.0:
            source = "neither the teacher nor the pair has one"
        lines.append(f"prior      log_prior {value:g}: {source}")
    if "ekd-softmax" in baselines(config, base):
        weights = config.softmax_teacher_weights or "to be trained too"
        lines.append(f"           softmax teacher of ekd-softmax: {weights}")
    return lines


def _cache(config: DistillConfig, data_root: str | None) -> str:
    """Where the teacher's logits are kept and how large that can grow, known before it does."""
    if not uses_cache(config, data_root):
        return f"teacher_cache {config.teacher_cache}: the teacher runs in every step"
    size = table_bytes(config, data_root)
    return f"teacher logits on disk, at most {size_text(size)} in {tables_dir()}"


def _model(name: str, info: DatasetInfo, size: int) -> str:
    parameters, flops = model_cost(name, info.num_classes, size)
    return f"{name} ({parameters / 1e6:.2f} M parameters, {flops / 2e6:.0f} M multiply-adds)"


def _study_flops(config: StudyConfig) -> float:
    """Upper estimate: rungs as full as ASHA leaves them on average, every confirm run full."""
    base, root = config.distill, config.data_root
    rungs = milestone_epochs(config)
    share, total, before = 1.0, 0.0, 0
    for epoch in rungs:
        total += share * (epoch - before)
        share, before = share / config.reduction_factor, epoch
    trial_share = total / base.epochs
    known = champions(config, base)
    seeds, select = config.most_seeds, (config.confirm_top_k + len(known)) * config.most_seeds
    flops = (config.trials * trial_share + select) * run_flops(base, root)
    finals = (base, *known.values(), *baselines(config, base).values())
    flops += seeds * sum(run_flops(entry, root, final=True) for entry in finals)
    if uses_cache(base, root):  # once for the search, once for every seed of confirm
        flops += teacher_flops(base, root) + seeds * teacher_flops(base, root, final=True)
    else:
        flops += (config.trials * trial_share + select) * teacher_flops(base, root)
        flops += seeds * sum(teacher_flops(entry, root, final=True) for entry in finals)
    if base.teacher_weights is None and config.teacher_training and base.teacher:
        own = "ekd-softmax" in baselines(config, base) and config.softmax_teacher_weights is None
        flops += (2 if own else 1) * _teaching_flops(config)
    return flops


def _teaching_flops(config: StudyConfig) -> float:
    """FLOPs of the trainings of a study's own teacher."""
    base, settings = config.distill, config.teacher_training or {}
    training = teacher_config(base, str(base.teacher), settings)
    return len(teacher_candidates(base, settings).seeds) * run_flops(training, config.data_root)


def _decoding(
    config: DistillConfig, data_root: str | None, cpus: int, asked: Gpus, nodes: list[Node] | None
) -> list[str]:
    """Whether a worker's pictures are decoded as fast as its student takes them; empty where all
    were decoded before."""
    info = dataset_info(config.dataset, data_root=data_root)
    if not info.encoded:
        return []
    known = nodes is not None
    nodes = nodes or local_nodes()
    gpus, largest = gpus_per_worker(asked, nodes), max(nodes, key=lambda node: (node[1], node[0]))
    own = max(cpus, cores_of_share(largest, gpus) if gpus and largest[1] else 1)
    threads = own if config.decode_threads == "auto" else config.decode_threads
    # More threads than a worker has cores decode no faster.
    cores = min(threads, own, int(largest[0])) if known else threads
    here = min(cores, local_cpus())
    decoded = measure_decoding(config, data_root, here) * cores / here
    source = "measured" if cores == here else f"{here} measured here, times {cores / here:g}"
    step = (
        BACKWARD * model_cost(config.student, info.num_classes, student_size(config, data_root))[1]
    )
    taken = _speed(config, data_root, cpus, gpus).flops / step
    where = f" on {several(cores, 'core')}" if cores < threads else ""
    text = (
        f"reading    {several(threads, 'thread')} of a worker{where}: {decoded:,.0f} images/s "
        f"({source}); training takes about {taken:,.0f} images/s"
    )
    if decoded < taken:
        remedy = "raise --decode-threads" if threads < own else "give it more cores"
        text += f": it waits for pictures; {remedy}"
    return [text]


def _study_duration(config: StudyConfig, *, continued: bool) -> list[str]:
    """The estimate of a study, whatever part of it is there already, and what makes a long one
    shorter.

    More slots than runs do not help, and trials, choice and final runs come one after the other.
    """
    base, root = config.distill, config.data_root
    selected = (config.confirm_top_k + len(champions(config, base))) * config.most_seeds
    serial = 2 * run_flops(base, root) + run_flops(base, root, final=True)
    alone = _speed(base, root, *_used(config, most=1))
    together = _speed(base, root, *_used(config, most=max(config.trials, selected)))
    flops, least = _study_flops(config), serial / alone.flops
    duration = _duration(flops, together, least=least)
    lines = [f"estimate   {duration}{', all of it' * continued}"]
    if max(flops / together.flops, least) > LONG:
        side = ""
        if dataset_info(base.dataset, data_root=root).encoded and student_size(base, root) > SMALL:
            side = f"smaller images (--set image_size={SMALL}), "
        lines.append(
            f"           for less: {side}fewer --epochs, --trials and --seeds; --budget-hours ends "
            "the search"
        )
    return lines


@dataclass(frozen=True)
class _Speed:
    """FLOP/s of all that trains at once, and how that is made up."""

    flops: float
    text: str


def _speed(config: DistillConfig, data_root: str | None, cpus: int, gpus: float) -> _Speed:
    if gpus:
        each = " each" * (gpus > 1)
        text = f"{several(gpus, 'GPU')} at {GPU_FLOPS / 1e12:.0f} TFLOP/s{each}"
        return _Speed(gpus * GPU_FLOPS, text)
    core, source = None, ""
    if not (on_cluster() or assumed_nodes()):  # of whose processors nothing is known here
        classes = dataset_info(config.dataset, data_root=data_root).num_classes
        precision = planned_precision(config.precision, on_gpu=False) or "float32"
        size = student_size(config, data_root)
        core, source = core_rate(config.student, classes, size, precision), ", measured"
    if core is None:
        core, source = CPU_FLOPS, ""
    each = " each" * (cpus > 1)
    text = f"{several(cpus, 'CPU core')} at {core / 1e9:.0f} GFLOP/s{each}{source}"
    return _Speed(cpus * core, text)


def _duration(flops: float, speed: _Speed, least: float = 0.0) -> str:
    """The time in words; `least`: seconds that no further CPU or GPU would save."""
    minutes = max(flops / speed.flops, least) / 60
    time = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(1, round(minutes))} min"
    return f"{flops / 1e12:.1f} TFLOP, very roughly {time} on {speed.text}"


def _disk(config: StudyConfig) -> str:
    base, root = config.distill, config.data_root
    num_classes = dataset_info(base.dataset, data_root=root).num_classes
    parameters = model_cost(base.student, num_classes, student_size(base, root))[0]
    rows = 1 + len(champions(config, base)) + len(config.baselines)
    finals = rows * config.most_seeds
    running = 2 * count_at_once(config, known_nodes() or local_nodes())
    size = 4 * parameters * (finals + running + 1) + 100_000 * config.trials
    return f"about {max(1, round(size / 2**20))} MiB"


def _free(out: Path) -> str:
    folder = next(parent for parent in (out, *out.parents) if parent.exists())
    return f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
