"""The confirm stage: champions and finalists over fresh seeds, then the winner, the champions and
the baselines on all training data, with one reading of the test split.

1. *select*: the champions and the best `confirm_top_k` trials run again under fresh seeds on the
   training split; `wanted_seeds` says who is given how many. The best mean validation score of
   those with the most seeds is the winner, so that it is never worse there than a champion that
   was not clearly worse before.
2. *final*: the winner, the champions and the baselines train on train + validation over the same
   seeds; each final model reads the test split once. No decision follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.phrases import joined
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.engine.resolve import resolve, with_teacher, without_teacher
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import file_name
from ekd_ray.losses.methods import method_of, with_method
from ekd_ray.results.leaderboard import Row, leaderboard_rows, rank_contenders
from ekd_ray.results.records import CONFIRMED, RESULT, RunRecord, confirm_table
from ekd_ray.results.row_names import noun_of
from ekd_ray.results.study_reader import StudyReader, write_parquet
from ekd_ray.scale.fill_tasks import fill_cache
from ekd_ray.scale.run_list import run_all
from ekd_ray.scale.selection import wanted_seeds
from ekd_ray.scale.space import point_config, with_pairs_prior
from ekd_ray.scale.tracking import Observer


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration of the confirm stage; `role`, `number` and `equals` as of `RunRecord`."""

    name: str
    config: DistillConfig
    role: str
    number: int | None = None
    equals: tuple[str, ...] = ()


def confirm(run: Path, config: StudyConfig, base: DistillConfig, observer: Observer) -> None:
    """Run (or continue) both steps; writes `confirm.parquet`.

    What fails under one of the seeds cannot win; a baseline that fails is reported as failed.

    Raises:
        UserError: everything failed, or a run's process died twice.
        Interrupted: stopped by the user.
    """
    study = StudyReader.load(run)
    entries = list_entries(config, base, study)
    before = {run.number for run in study.confirm_runs if run.role == "finalist"}
    if EXTENDED_FROM in study.header and {trial.number for trial in study.finalists()} <= before:
        observer.note("no further trial is a finalist: the study's model expects less of them")
    select = _select(run, config, base, entries, observer)
    rows = {row.name: row for row in leaderboard_rows(select, config)}
    ranked = rank_contenders(list(rows.values()), config)
    if not ranked:
        failed = {name: row.failed for name, row in rows.items()}
        raise UserError(f"every configuration of {run} failed under a fresh seed: {failed}.")
    winner = ranked[0]
    finals = [
        entry
        for entry in entries
        if entry.name == winner.name or (entry.role == "champion" and not rows[entry.name].failed)
    ]
    finals.sort(key=lambda entry: entry.name != winner.name)
    # Compared with others of its own architecture, where that was searched.
    compared = base.replace(student=winner.config.student)
    finals += [
        Entry(name=name, config=baseline, role="baseline")
        for name, baseline in baselines(config, compared).items()
    ]
    seeds = fresh_seeds(config, base)[: len(winner.val)]
    planned = plan_runs(run, RunStage.FINAL, [_on_all_images(e, config) for e in finals], seeds)
    ended = [*select, *run_all(run, config, planned, observer)]
    write_parquet(run / CONFIRMED, confirm_table(ended, run))


def _on_all_images(entry: Entry, config: StudyConfig) -> Entry:
    settings = entry.config.replace(validation_fraction=0.0)
    return replace(entry, config=resolve(settings, data_root=config.data_root))


def fresh_seeds(config: StudyConfig, base: DistillConfig) -> list[int]:
    """The seeds of the confirm stage, in order: none of them is the one that all trials had."""
    return [base.seed + 1 + index for index in range(config.most_seeds)]


def list_entries(config: StudyConfig, base: DistillConfig, study: StudyReader) -> list[Entry]:
    """The champions, then the finalists; equal configurations once, under the first one's name.

    The finalists of an extended study are also those that it had before: their runs are there, and
    one of them may still be the best. A champion that is a trial's configuration, confirmed or
    not, has its number; that of the full run, where a trial was stopped and run again.
    """
    known = {
        name: resolve(champion, data_root=config.data_root)
        for name, champion in champions(config, base).items()
    }
    found = [Entry(name=n, config=c, role="champion") for n, c in known.items()]
    before = {run.number for run in study.confirm_runs if run.role == "finalist"}
    finalists = study.finalists()
    chosen = {trial.number for trial in finalists}
    for trial in [*finalists, *(t for t in study.ranked() if t.number in before - chosen)]:
        settings = DistillConfig.from_dict(trial.config)
        if settings.teacher_weights is not None:  # the study may come from another machine
            settings = settings.replace(teacher_weights=base.teacher_weights)
        if settings.student_weights is not None:
            settings = settings.replace(student_weights=base.student_weights)
        found.append(Entry(name=trial.name, config=settings, role="finalist", number=trial.number))
    numbers: dict[str, int | None] = {}
    for trial in sorted(study.records(), key=lambda trial: trial.status != "complete"):
        if trial.config:
            key = DistillConfig.from_dict(trial.config).fingerprint()
            numbers.setdefault(key, trial.number)
    entries: dict[str, Entry] = {}
    for entry in found:
        key = entry.config.fingerprint()
        if key not in entries:
            entries[key] = replace(entry, number=numbers.get(key, entry.number))
        elif entry.role == "champion":
            equals = (*entries[key].equals, entry.name)
            entries[key] = replace(entries[key], equals=equals)
    return list(entries.values())


def _select(
    run: Path, config: StudyConfig, base: DistillConfig, entries: list[Entry], observer: Observer
) -> list[RunRecord]:
    """The runs of champions and finalists, round by round as `wanted_seeds` asks for them."""
    seeds = fresh_seeds(config, base)
    # The views of a sample do not depend on the split: those of all images serve both steps.
    everything = base.replace(validation_fraction=0.0)
    filled = 0 if not (run / CONFIRMED).exists() else len(seeds)
    ended: list[RunRecord] = []
    rows = [Row(name=e.name, config=e.config, entered_as=e.role) for e in entries]
    while wanted := wanted_seeds(rows, config):
        most = max(wanted.values()) if config.confirm_seeds == "auto" else len(seeds)
        if filled < most:
            fill_cache(config, everything, seeds[filled:most], observer, run=run)
            filled = most
        done = {row.name: len(row.val) for row in rows}
        planned = [
            planned
            for entry in entries
            if entry.name in wanted
            for planned in plan_runs(
                run, RunStage.SELECT, [entry], seeds[done[entry.name] : wanted[entry.name]]
            )
        ]
        if ended and not all((new.folder / RESULT).exists() for new in planned):
            names = joined([noun_of(name) for name in wanted])
            observer.note(f"further seeds for what can still win: {names}")
        ended += run_all(run, config, planned, observer)
        rows = leaderboard_rows(ended, config)
    return ended


def champions(config: StudyConfig, base: DistillConfig) -> dict[str, DistillConfig]:
    """The known configurations that finalists have to beat, by their names for people.

    `authors' values` for the pair, where the recipe knows them; the points of a warm start by
    their studies; `defaults`, those of the base's method. What needs a teacher is left out where
    there is none.
    """
    kinds = {
        "authors": {"authors' values": config.authors} if config.authors else {},
        "warm-start": config.warm_points or {},
    }
    found = {
        name: point_config(base, point)
        for kind, points in kinds.items()
        if kind in config.champions
        for name, point in points.items()
    }
    if "defaults" in config.champions:
        found["defaults"] = with_pairs_prior(config, with_method(base, base.method))
    return {n: c for n, c in found.items() if base.teacher or not method_of(c).needs_teacher}


def baselines(config: StudyConfig, base: DistillConfig) -> dict[str, DistillConfig]:
    """The rows that a winner is compared with, under the same budget and solver.

    `none`: the student alone; `kd`: KD with its defaults; `ekd-softmax`, of an evidential method:
    the authors' values, or else the study's shared settings, under the softmax teacher. All but
    `none` need a teacher.
    """
    rows = {}
    for name in config.baselines:
        if name == "none":
            rows["none"] = without_teacher(with_method(base, "none"))
        elif name == "kd" and base.teacher:
            rows["kd"] = with_method(base, "kd")
        elif name == "ekd-softmax" and base.teacher and method_of(base).evidential:
            entry = point_config(base, config.authors or {})
            rows["ekd-softmax"] = with_teacher(entry, config.softmax_teacher_weights)
    return rows


def plan_runs(
    study: Path, stage: RunStage, entries: Iterable[Entry], seeds: Sequence[int]
) -> list[RunRecord]:
    """A run for each entry and seed.

    Equal configurations share a folder, and so are run once. It is known by the fingerprint at
    the end of its name; what stands before is for people, and may be of another row, or of an
    earlier round of an extended study.
    """
    folders: dict[str, Path] = {}
    runs = []
    for entry in entries:
        for seed in seeds:
            config = entry.config.replace(seed=seed)
            key = config.fingerprint()
            if key not in folders:
                there = sorted((study / "confirm").glob(f"{stage}-*{key}"))
                label = f"{stage}-{file_name(entry.name)}-seed-{seed}-{key}"
                folders[key] = there[0] if there else study / "confirm" / label
            runs.append(
                RunRecord(
                    folder=folders[key], stage=stage, name=entry.name, number=entry.number,
                    role=entry.role, equals=list(entry.equals), config=config.to_dict(),
                )
            )  # fmt: skip
    return runs
