"""The end of a training run: its weights, its figures on the test split, and its record."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from ekd_ray.engine import ranks
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.distill import TrainedStudent
from ekd_ray.engine.environment import environment
from ekd_ray.engine.final import WEIGHTS, evaluate_test, save_student
from ekd_ray.engine.measure.predictions import FILE as PREDICTIONS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.pictures import validation_predictions, write_pictures
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import RunRecord


def finish_run(
    run: RunRecord, result: TrainedStudent, *, data_root: str | None, test: bool = False
) -> RunRecord:
    """Write what a trained run is to leave; returns its record, which is written last.

    A run of the confirm stage leaves pictures for TensorBoard, one whose model counts its
    weights. All ranks must call, where there are several; the first one writes.

    Args:
        test: read the test split, once; a run of the final stage always does.

    Raises:
        ValueError: a run of this stage must not open the test split.
    """
    final = run.stage is RunStage.FINAL
    deterministic = bool(result.config.deterministic)
    if ranks.is_first() and run.stage is not RunStage.SELECT:
        save_student(result, run.folder / WEIGHTS, data_root=data_root)
    tested: dict[str, float] = {}
    with arithmetic(deterministic=deterministic):
        if final or test:  # each rank looks at its share
            keep = run.folder / PREDICTIONS if final else None
            tested = evaluate_test(result, stage=run.stage, data_root=data_root, keep=keep)
        if final or run.stage is RunStage.SELECT:
            _draw(result, run.folder, tested, data_root)
    record = replace(
        run,
        status="complete",
        history=result.history,
        metrics={**result.metrics, **tested},
        seconds=result.seconds,
        log_prior=result.log_prior,
        precision=result.precision,
        compiled=result.compiled,
        fingerprint=result.config.fingerprint(),
        data_fingerprint=result.data_fingerprint,
        environment={**environment(), "deterministic": deterministic},
    )
    if ranks.is_first():
        record.write()
    return record


def _draw(
    result: TrainedStudent, folder: Path, tested: dict[str, float], data_root: str | None
) -> None:
    """Reliability and confusion for TensorBoard, and of a run that has held images out the
    calibration for its configuration; a run that cannot draw them is as good."""
    try:
        found = None
        if not tested:  # all ranks look at the validation images, each at its share
            found, calibration = validation_predictions(result, data_root=data_root)
            if ranks.is_first():
                calibration.save(folder)
        if ranks.is_first():
            found = found or Predictions.load(folder / PREDICTIONS)
            split, step = "test" if tested else "val", result.metrics["epoch"]
            write_pictures(folder, found, split=split, scalars=tested, step=step)
    except Exception as error:
        warnings.warn(f"{folder.name}: no images for TensorBoard ({error}).", stacklevel=2)
