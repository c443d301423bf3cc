"""Checks of a study's folder once it has ended, however often it was killed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ekd_ray.results import Bundle, Study
from ekd_ray.results.bundle_files import FILES
from ekd_ray.results.records import MANIFEST

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of each journal that is read
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
# Everything that an ended study holds; whatever else is there, a killed writer has left.
BELONGS = {
    "study.yaml", ".lock", "optuna.journal", "arrivals.jsonl", "teacher.json", "trials.parquet",
    "importance.json",
    "confirm.parquet",
    "config.yaml", "history.jsonl", "result.json", "teacher.safetensors", *FILES, MANIFEST,
    "cache.json", "predictions.safetensors", "gallery.safetensors", "index.html",
}  # fmt: skip


def ended(run: Path) -> dict[str, bytes]:
    """The records of the runs that have ended: path -> bytes."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in [*run.glob("trials/*/result.json"), *run.glob("confirm/*/result.json")]
    }


def journal(run: Path) -> list[FrozenTrial]:
    """The trials as Optuna reads them; of a study that has not begun, none."""
    path = run / "optuna.journal"
    if not path.exists() or not path.read_bytes().count(b"\n"):
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=None, storage=storage).get_trials()


def check_ended(run: Path) -> None:
    """Records, journal and tables agree, the bundle is sound and nothing else is left."""
    study = Study.load(run)
    check_search(study)
    check_confirm(study)
    assert Bundle.load(run / "best").verify().ok
    check_leftovers(run)


def check_search(study: Study) -> None:
    """Every number once, in the records as in the journal and in the table."""
    records, trials = study.records(), journal(study.path)
    in_full = [record for record in records if record.full_run_of is not None]
    numbers = list(range(study.config.trials + len(in_full)))
    assert len({record.full_run_of for record in in_full}) == len(in_full)
    if any(record.status == "pruned" for record in records) and not in_full:
        assert len(study.ranked()) >= study.config.confirm_top_k
    assert [record.number for record in records] == numbers
    assert [trial.number for trial in trials] == numbers
    assert len({json.dumps(record.params) for record in records}) == study.config.trials
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(study.path / "trials.parquet").to_pylist():
        rows.setdefault(row["trial"], []).append(row)
    assert sorted(rows) == numbers
    for record, trial in zip(records, trials, strict=True):
        epochs = [row["epoch"] for row in record.history]
        assert epochs == list(range(1, len(epochs) + 1)), f"trial {record.number}: {epochs}"
        assert trial.state == STATES[record.status]
        assert trial.params == record.params
        assert trial.intermediate_values == {r["epoch"]: r["val_top1"] for r in record.history}, (
            f"trial {record.number}: the journal's epochs are not those of the record"
        )
        last = rows[record.number][-1]
        assert (last["status"], last["epoch"]) == (record.status, epochs[-1])
        assert last["val_top1"] == record.history[-1]["val_top1"]


def check_confirm(study: Study) -> None:
    """A row for the winner under each seed of both steps, for each champion and finalist under two
    at least, for each champion and baseline under each seed of the last."""
    config, table = study.config, study.confirmed()
    assert table is not None
    rows = table.to_pylist()
    select, final = (
        Counter(r["name"] for r in rows if r["stage"] == stage) for stage in ("select", "final")
    )
    seeds = config.most_seeds
    champions = {r["name"] for r in rows if r["role"] == "champion"}
    winner = study.best().name
    assert {trial.number for trial in study.finalists()} <= {r["trial"] for r in rows}
    assert select[winner] == seeds
    assert min(select.values()) >= min(2, seeds)
    assert final == dict.fromkeys((winner, *champions, *config.baselines), seeds)
    assert len({(r["stage"], r["name"], r["seed"]) for r in rows}) == len(rows)
    for row in rows:
        result = json.loads((study.path / row["folder"] / "result.json").read_text())
        metric = "val_top1" if row["stage"] == "select" else "test_top1"
        assert row[metric] == result["metrics"][metric]


def check_leftovers(run: Path) -> None:
    """No temporary file, no checkpoint, no lock, no folder of Tune's; one events file a run."""
    files = [path for path in run.rglob("*") if path.is_file() or path.is_symlink()]
    every = [path for path in files if path.name.startswith("events.out.tfevents.")]
    strange = {path for path in files if path.name not in BELONGS} - set(every)
    assert not strange, sorted(str(path.relative_to(run)) for path in strange)
    events = [path for path in every if not path.name.endswith((".pictures", ".end"))]
    assert len({path.parent for path in events}) == len(events)
    folders = {path.name for path in run.iterdir() if path.is_dir()}
    assert folders <= {"teacher", "trials", "confirm", "best", "report"}, folders
