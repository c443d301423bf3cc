"""The predictions of a bundle for any number of pictures, as a table on disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from ekd_ray.config import DistillConfig
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.engine.measure.uncertainty import dissonance, entropies, uncertainty
from ekd_ray.engine.precision import pick_device
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, check_file_place, check_name, expand_home
from ekd_ray.results.inference import BATCH, Classifier, name_sets, pictures_below, pixels

TABLES = (".parquet", ".csv")
# A spreadsheet takes a cell that begins so for a formula, and runs it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Rows that are written together: less makes Parquet files slow to read.
GROUP = 4096
MOST_READERS = 8
# Shares of the pictures that are kept, in steps of a hundredth: what a bundle has thresholds for.
COVERAGES = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class PredictedFiles:
    """A written table: its file, its rows, the pictures that were left out because they cannot be
    read (a sentence each), and how many rows abstain."""

    path: Path
    rows: int
    damaged: tuple[str, ...]
    abstained: int


def list_pictures(given: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Files as they are given, and of folders all pictures below them, in the order of names.

    Raises:
        UserError: one is not there, or a folder holds no picture.
    """
    found: list[str] = []
    for name in given:
        path = str(expand_home(name))
        if not os.path.lexists(path):
            raise UserError(f"there is no picture or folder {path}: name one that is there.")
        found += pictures_below(path) if os.path.isdir(path) else [path]
    return found


def check_table(out: str | os.PathLike[str]) -> Path:
    """The path of a table that can be written.

    Raises:
        UserError: its name ends otherwise, or it is a folder.
    """
    path = expand_home(check_name(out))
    if path.suffix not in TABLES:
        raise UserError(f"--out must end with {' or '.join(TABLES)}, got {str(out)!r}.")
    check_file_place(path)
    return path


def coverage_thresholds(scores: Tensor) -> list[float]:
    """The uncertainty [101] that the share 0, 0.01, ... 1 of the pictures does not exceed.

    Args:
        scores: `engine.measure.uncertainty.uncertainty` of pictures, [N].
    """
    return [float(value) for value in np.quantile(scores.double().numpy(), COVERAGES)]


def find_threshold(known: Sequence[float] | None, coverage: float) -> float:
    """The uncertainty (log-odds) above which a prediction abstains, by `coverage_thresholds`.

    Raises:
        UserError: a coverage that is none, or no thresholds, as in bundles of an older ekd_ray.
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage must be above 0 and at most 1 (0.9 is 90 %), got {coverage}.")
    if known is None:
        raise UserError(
            "the bundle has no thresholds by coverage: export it again, or leave coverage out."
        )
    return float(np.interp(coverage, COVERAGES, known))


@torch.no_grad()
def write_predictions(
    load: Callable[[], Classifier],
    config: DistillConfig,
    class_names: Sequence[str],
    pictures: Sequence[str],
    out: str | os.PathLike[str],
    *,
    coverage: float | None = None,
    thresholds: Sequence[float] | None = None,
    temperature: float = 1.0,
    set_threshold: float | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PredictedFiles:
    """Predict pictures and write a table, one row a picture; all of it or nothing.

    Columns: `path`, `predicted` (the class's name), `probability`, `uncertainty` as in
    `Prediction`, of an evidential student `dissonance`, `aleatoric_entropy` and
    `epistemic_entropy`, with `coverage` also `abstain`, with `set_threshold` `set_size` and `set`
    (the names of the classes as a JSON list), then `p_<class>` of every class. Parquet keeps in its
    metadata (`ekd_ray`) whose predictions they are.

    Args:
        load: gives the student. config: its run, by which pictures are cut.
        pictures: see `list_pictures`. out: a file that ends with `.parquet` or `.csv`.
        coverage: the share of pictures like those of the test split that is to be kept, in (0, 1];
            the more uncertain ones abstain. thresholds: see `coverage_thresholds`.
        temperature, set_threshold: see `classify`.
        about: what else the table's metadata say. progress: called with the pictures done and in
            all.

    Raises:
        UserError: `out` cannot be written, no picture can be read, or see `find_threshold`.
    """
    path = check_table(out)
    threshold = None if coverage is None else find_threshold(thresholds, coverage)
    told = {**(about or {}), "student": config.student, "coverage": coverage,
            "threshold": threshold, "temperature": temperature}  # fmt: skip
    damaged: list[str] = []
    rows = abstained = done = 0
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        device = pick_device()
        classifier = load().to(device)
        stack.enter_context(arithmetic(deterministic=False))
        write = stack.enter_context(_table_writer(temporary, path.suffix, told))
        for names, images in _read_batches(config, pictures, damaged):
            done += len(names)
            readable = [(n, i) for n, i in zip(names, images, strict=True) if i is not None]
            if readable:
                batch = torch.from_numpy(np.stack([image for _, image in readable])).to(device)
                found = (part.cpu() for part in classifier(batch.float() / 255))
                logits, probabilities, certainty = found
                sets = name_sets(logits, classifier.log_prior, class_names, set_threshold)
                labels = probabilities.argmax(dim=1)
                if temperature != 1.0:
                    prior = classifier.log_prior
                    probabilities = log_probabilities(logits, prior, temperature).exp()
                best = probabilities.gather(1, labels[:, None]).squeeze(1)
                columns: dict[str, Any] = {
                    "path": [_text(name) for name, _ in readable],
                    "predicted": [class_names[label] for label in labels.tolist()],
                    "probability": best.numpy(),
                    "uncertainty": certainty.numpy(),
                    **_evidential_columns(logits, classifier.log_prior),
                }
                if threshold is not None:
                    scores = uncertainty(logits, classifier.log_prior).numpy()
                    columns["abstain"] = scores > threshold
                    abstained += int(columns["abstain"].sum())
                if sets is not None:
                    columns["set_size"] = np.array([len(names) for names in sets])
                    columns["set"] = [json.dumps(names, ensure_ascii=False) for names in sets]
                write(columns | _class_columns(class_names, probabilities))
                rows += len(readable)
            if progress:
                progress(done, len(pictures))
        if not rows:
            first = damaged[0] if damaged else "none was given."
            many = f"none of {len(pictures)} pictures can be read; the first: "
            raise UserError(f"{many if len(pictures) > 1 else ''}{first}")
    return PredictedFiles(path=path, rows=rows, damaged=tuple(damaged), abstained=abstained)


def _evidential_columns(logits: Tensor, log_prior: float | None) -> dict[str, Any]:
    if log_prior is None:
        return {}
    aleatoric, epistemic = entropies(logits, log_prior)
    return {
        "dissonance": dissonance(logits, log_prior).float().numpy(),
        "aleatoric_entropy": aleatoric.float().numpy(),
        "epistemic_entropy": epistemic.float().numpy(),
    }


def _class_columns(names: Sequence[str], probabilities: Tensor) -> dict[str, Any]:
    return {
        f"p_{name}": column.numpy() for name, column in zip(names, probabilities.T, strict=True)
    }


def _text(path: str) -> str:
    """A path as UTF-8, whatever bytes it has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _read_batches(
    config: DistillConfig, pictures: Sequence[str], damaged: list[str]
) -> Iterator[tuple[list[str], list[np.ndarray | None]]]:
    """(paths, pixels uint8 [3, S, S] or None of a damaged one), at most `BATCH` each, the next
    ones read meanwhile."""

    def read(path: str) -> np.ndarray | str:
        try:
            return pixels(path, config)[0]
        except UserError as error:
            return str(error)

    waiting: deque[tuple[str, Future[np.ndarray | str]]] = deque()
    coming = iter(pictures)
    with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as readers:
        try:
            for _ in range(0, len(pictures), BATCH):
                for path in coming:
                    waiting.append((path, readers.submit(read, path)))
                    if len(waiting) == 2 * BATCH:
                        break
                batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
                found = [future.result() for _, future in batch]
                damaged += [problem for problem in found if isinstance(problem, str)]
                images = [None if isinstance(image, str) else image for image in found]
                yield [path for path, _ in batch], images
        finally:
            readers.shutdown(cancel_futures=True)


def _defuse(values: Any) -> Any:
    """A column of which no text is a formula to a spreadsheet: an apostrophe before makes it one
    that is shown as it is. Numbers stay."""
    if not isinstance(values, list):
        return values
    return [f"'{text}" if text.startswith(_FORMULA) else text for text in values]


@contextlib.contextmanager
def _table_writer(
    path: Path, suffix: str, about: dict[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds columns of equal length to a table; rows are written in groups."""
    waiting: list[pa.Table] = []
    with contextlib.ExitStack() as stack:
        writer: Any = None

        def flush() -> None:
            nonlocal writer
            if not waiting:
                return
            table = pa.concat_tables(waiting)
            waiting.clear()
            if writer is None:
                open_one = pa.csv.CSVWriter if suffix == ".csv" else pa.parquet.ParquetWriter
                writer = stack.enter_context(open_one(path, table.schema))
            writer.write_table(table)

        def write(columns: dict[str, Any]) -> None:
            if suffix == ".csv":
                columns = {name: _defuse(values) for name, values in columns.items()}
            table = pa.table(columns)
            waiting.append(table.replace_schema_metadata({"ekd_ray": json.dumps(about)}))
            if sum(len(part) for part in waiting) >= GROUP:
                flush()

        yield write
        flush()
