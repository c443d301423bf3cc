"""How far a running study has come, read from its files alone."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import yaml

from ekd_ray.engine.runlog import HISTORY, read_history
from ekd_ray.results.records import RESULT, TrialRecord
from ekd_ray.results.study import Study


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`stage` is teacher, search, confirm or finished; `trials` the number of trials by status,
    `asked` how many the study is to have; `quiet_seconds` since an epoch was last recorded, None
    before the first."""

    stage: str
    trials: dict[str, int]
    asked: int
    quiet_seconds: float | None


def running_trials(study: Study) -> list[TrialRecord]:
    """Trials that have begun and not ended, with their epochs so far."""
    found = []
    for folder in sorted((study.path / "trials").glob("[0-9]*")):
        path = folder / "config.yaml"
        if (folder / RESULT).exists() or not path.exists():
            continue
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = {k: config[k] for k in study.config.space or {} if config.get(k) is not None}
        found.append(
            TrialRecord(
                number=int(folder.name), params=params, config=config,
                history=read_history(folder),
            )
        )  # fmt: skip
    return found


def progress(study: Study) -> Progress:
    """See `Progress`. A study whose driver was killed looks like one that is quiet for long."""
    counts = Counter(record.status for record in study.records())
    running = len(running_trials(study))
    if running:
        counts["running"] = running
    stage = "teacher"
    if (study.path / "best" / "MANIFEST").exists():
        stage = "finished"
    elif any((study.path / "confirm").glob("*")):
        stage = "confirm"
    elif any((study.path / "trials").glob("*")):
        stage = "search"
    written = [path.stat().st_mtime for path in study.path.glob(f"*/*/{HISTORY}")]
    written += [path.stat().st_mtime for path in study.path.glob(f"teacher/{HISTORY}")]
    return Progress(
        stage=stage,
        trials=dict(counts),
        asked=study.config.trials,
        quiet_seconds=max(0.0, time.time() - max(written)) if written else None,
    )
