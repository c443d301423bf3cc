"""A driver on a cluster with nodes that claim GPUs: where its processes run, and what they see.

Prints JSON: for each `gpus_per_trial` that is asked for the places of trials and of the fill, and
what `compute_off_driver` did.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import ray
from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord
from ekd_ray.scale import fill_tasks
from ekd_ray.scale.cluster import check_fits, connected, with_gpus
from ekd_ray.scale.schedulers import NoStopping
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.tasks import compute_off_driver
from ekd_ray.scale.worker import RUN, Report

TRIALS = 4


def place() -> dict[str, Any]:
    return {
        "node": ray.get_runtime_context().get_node_id(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pid": os.getpid(),
    }


def tell_place(run: RunRecord, report: Report) -> None:
    time.sleep(3)  # so that all processes get some
    (run.folder / f"{run.number}.json").write_text(json.dumps(place()))
    report({"epoch": 1, "train_loss": 0.0})


def fill_nothing(*_: Any) -> dict[str, float]:
    time.sleep(0.2)
    with open(FILLS, "a") as file:
        file.write(json.dumps(place()) + "\n")
    return {"rows": 1}


def refuse() -> None:
    raise UserError("no")


class Given(Searcher):
    def __init__(self, runs: list[RunRecord]) -> None:
        super().__init__(metric="train_loss", mode="min")
        self.runs = runs

    def suggest(self, trial_id: str) -> Any:
        return {RUN: self.runs.pop(0).to_dict()} if self.runs else Searcher.FINISHED

    def on_trial_complete(self, *args: Any, **options: Any) -> None: ...


def places_of(config: StudyConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    check_fits(config)
    runs = [
        RunRecord(folder=folder, stage=RunStage.SEARCH, name=f"{n}", number=n, config={})
        for n in range(TRIALS)
    ]
    run_tuner(
        folder, config, tell_place, searcher=Given(runs), scheduler=NoStopping(), observer=Mock()
    )
    FILLS.unlink(missing_ok=True)
    fill_tasks.fill_cache(config, config.distill, [0], Mock())
    return {
        "trials": [json.loads(path.read_text()) for path in folder.glob("?.json")],
        "fills": [json.loads(line) for line in FILLS.read_text().splitlines()],
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    FILLS = out / "fills"
    fill_tasks.uses_cache = lambda *_: True  # type: ignore[assignment]
    fill_tasks._fill_part = fill_nothing  # type: ignore[assignment]
    study = StudyConfig(distill=DistillConfig(dataset="digits", teacher="resnet8"))
    with connected(study):
        found = {
            str(asked): places_of(study.replace(gpus_per_trial=asked), out / f"{asked}")
            for asked in ("auto", 0.0)
        }
        config = with_gpus(study)
        off: dict[str, Any] = {"driver": os.getpid(), "place": compute_off_driver(config, place)}
        try:
            compute_off_driver(config, refuse)
        except UserError as error:
            off["refused"] = str(error)
        cpus = config.replace(gpus_per_trial=0.0)
        off["without a GPU"] = compute_off_driver(cpus, os.getpid)
    print(json.dumps({**found, "off": off}))
