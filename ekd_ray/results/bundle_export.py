"""A study's confirmed winner, written as a bundle."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.phrases import joined
from ekd_ray.config.plugins import write_sources
from ekd_ray.engine.data_pin import check_pinned
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import temporary_folder, write_json, write_text
from ekd_ray.models import read_metadata
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.bundle_files import (
    CARD,
    FILES,
    find_unlisted,
    read_mapping,
    write_manifest,
)
from ekd_ray.results.bundle_metrics import bundle_metrics
from ekd_ray.results.card import UNKNOWN_LICENSE, check_license, model_card
from ekd_ray.results.exports import EXPORTS, check_exports, export_programs
from ekd_ray.results.records import CONFIRMED, DATA, MANIFEST, RESULT, RunRecord, read_record
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import resume_command


def export_bundle(
    study: StudyReader,
    out: Path,
    *,
    formats: Sequence[str] | None = None,
    normalized_input: bool = False,
    license: str = UNKNOWN_LICENSE,
    force: bool = False,
) -> Bundle:
    """Write the confirmed winner of a study to the folder `out`, all of it or nothing.

    The weights are those of the first confirm seed: choosing the best seed would choose
    on the test split. A bundle of this study that is there is replaced; any other content is
    refused.

    Args:
        formats: further forms of the model, of `EXPORTS`; None: those of the bundle of this study
            that is replaced, if any. normalized_input: they take normalised images instead of
            images in [0, 1]; license: of the weights, for the card,
            by its name on the hub ("mit", "cc-by-nc-4.0"); force: also replace the bundle of
            another study, and one that holds further files.

    Raises:
        UserError: the study has no confirmed winner yet, `out` holds something else, or a
            format is unknown, lacks its packages or fails.
    """
    if formats is None:
        formats, normalized_input = _programs_in(out, study)
    check_exports(formats)
    check_license(license)
    board = study.leaderboard()
    if not board or not board[0].test:
        raise UserError(
            f"{study.path} has no confirmed winner yet: finish it with "
            f"`{resume_command(study.config, study.place)}`, then export."
        )
    winner = board[0]
    if winner.failed:
        raise UserError(f"the winner of {study.path}, {winner.name}, failed: {winner.failed}")
    check_replaceable(out, study, force=force)
    check_pinned(
        study.path, study.header.get(DATA), study.config.distill, study.config.data_root,
        cure="begin another study with them",
    )  # fmt: skip
    final = [
        run for run in study.confirm_runs if run.stage is RunStage.FINAL and run.name == winner.name
    ]
    run = _read_finished(final[0], study)
    temporary = temporary_folder(out)
    try:
        config = _write_run(temporary, run)
        metrics = bundle_metrics(study, board, run, seeds=[run.seed for run in final])
        if formats:
            classifier = Bundle(path=temporary, config=config, metrics=metrics).classifier()
            metrics["exports"] = export_programs(
                temporary, formats, classifier, config, metrics["class_names"],
                normalized_input=normalized_input,
            )  # fmt: skip
        write_json(temporary / "metrics.json", metrics)
        weights = read_metadata(temporary / WEIGHTS)
        card = model_card(config, weights, metrics, board, license=license)
        write_text(temporary / CARD, card)
        sources = write_sources(temporary, config.plugins)
        names = (name for name in (*FILES, *EXPORTS.values()) if (temporary / name).exists())
        write_manifest(temporary, [*names, *sources])
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.load(out)


def _programs_in(out: Path, study: StudyReader) -> tuple[list[str], bool]:
    """The formats of the programs in a study's bundle, and whether they take normalised images."""
    there: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # no bundle, or a damaged one
        metrics = read_mapping(out / "metrics.json")
        if metrics.get("study") == study.config.fingerprint():
            there = metrics.get("exports") or {}
    found = []
    for name in (name for name, file in EXPORTS.items() if isinstance(there.get(file), dict)):
        try:
            check_exports([name])
            found.append(name)
        except UserError as error:  # no reason for a study to fail at its end
            warnings.warn(f"{out / EXPORTS[name]} is not made again: {error}", stacklevel=2)
    return found, any(bool(there[EXPORTS[name]].get("normalized_input")) for name in found)


def check_replaceable(out: Path, study: StudyReader, *, force: bool) -> None:
    """Raise `UserError` if a folder holds what an export of this study may not remove."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is not a bundle: choose another --out.")
    if force:
        return
    cure = "choose another --out, or give --force to replace it with all that it holds."
    metrics = out / "metrics.json"
    if not metrics.is_file() or read_mapping(metrics).get("study") != study.config.fingerprint():
        raise UserError(f"{out} holds the bundle of another study: {cure}")
    hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}  # such as .git
    if further := sorted({*find_unlisted(out), *hidden}):
        raise UserError(f"{out} holds {joined(further[:3])} beside its bundle: {cure}")


def _read_finished(run: RunRecord, study: StudyReader) -> RunRecord:
    """The full record of a final run; raises `UserError` if its files are not there."""
    folder = run.folder
    if not folder.resolve().is_relative_to(study.path.resolve()):
        raise UserError(
            f"{study.path / CONFIRMED} is damaged: it names {str(folder)!r}, which lies "
            f"outside of the study: run `{resume_command(study.config, study.place)}`."
        )
    lost = [name for name in (WEIGHTS, HISTORY, RESULT) if not (folder / name).is_file()]
    if lost:
        again = resume_command(study.config, study.place)
        raise UserError(f"{folder} lacks {', '.join(lost)}: run `{again}`.")
    found = read_record(folder, run)
    assert found is not None
    return found


def _write_run(folder: Path, run: RunRecord) -> DistillConfig:
    """Write to a bundle what its run is and has left; returns its complete configuration."""
    for name in (WEIGHTS, HISTORY):
        shutil.copyfile(run.folder / name, folder / name)
    config = DistillConfig.from_dict(run.config).replace(
        precision=run.precision,
        compile="on" if run.compiled else "off",
        data_fingerprint=run.data_fingerprint,
    )
    # The teacher is named by its hash, data by their fingerprint.
    config = config.without_places()
    write_text(folder / "distill.yaml", config.to_yaml())
    write_json(folder / "environment.json", run.environment)
    return config


def _swap(new: Path, out: Path) -> None:
    """Put `new` in the place of `out`; a rename cannot replace a folder that is not empty."""
    old = new.with_suffix(".old.tmp")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
