"""Members of a population between the searcher and a run's files, killed and continued."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from population_studies import EPOCHS, study_of
from ray.tune.experiment import Trial

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import CHECKPOINT
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.runlog import HISTORY, read_history
from ekd_ray.results.records import TrialRecord
from ekd_ray.scale import members as members_module
from ekd_ray.scale.members import Members, run_member
from ekd_ray.scale.searcher import OptunaSearcher, open_study
from ekd_ray.scale.worker import Job


def make(run: Path, config: StudyConfig) -> OptunaSearcher:
    return OptunaSearcher(run, config, resolve(config.distill))


def as_trial(job: dict[str, Any]) -> Trial:
    return Trial("member", config={"job": job}, stub=True)


def write_history(job: dict[str, Any], epochs: int) -> None:
    rows = [{"epoch": e, "val_top1": e / 100, "seconds": 1.0} for e in range(1, epochs + 1)]
    Path(job["folder"], HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_killed_population_goes_on_under_its_numbers_and_with_its_lineages(tmp_path):
    config = study_of("pbt", trials=4, first_points=({"lr": 0.05, "weight_decay": 0.001},))
    first = Members(make(tmp_path, config))
    assert [job["number"] for job in first.jobs] == [0, 1, 2, 3]
    assert first.jobs[0]["settings"]["lr"] == 0.05, "the first points come first"
    for job in first.jobs:
        first.on_trial_start(0, [], as_trial(job))
    # 1 takes over from 0 and ends, 2 takes over from 0 and is killed, as are 0 and 3.
    lineage = {**first.jobs[0]["settings"], "changes": [{"epoch": 4, "lr": 0.06}]}
    for number in (1, 2):
        first.on_trial_start(0, [], as_trial({**first.jobs[number], "settings": lineage}))
    write_history(first.jobs[1], EPOCHS)
    first.on_trial_complete(0, [], as_trial({**first.jobs[1], "settings": lineage}))
    record = TrialRecord.read(Path(first.jobs[1]["folder"]))
    assert record is not None and record.status == "complete"
    assert (record.config, record.params["lr"]) == (lineage, 0.05)
    done = open_study(tmp_path, config).get_trials()[1]
    assert done.state == TrialState.COMPLETE and done.value == EPOCHS / 100
    assert len(done.intermediate_values) == EPOCHS
    assert done.user_attrs["lineage"]["changes"] == lineage["changes"]

    searcher = make(tmp_path, config)
    assert searcher.remaining == 3
    second = Members(searcher)
    assert [job["number"] for job in second.jobs] == [0, 2, 3]
    settings = {job["number"]: job["settings"] for job in second.jobs}
    assert settings == {
        0: first.jobs[0]["settings"], 2: lineage, 3: first.jobs[3]["settings"],
    }  # fmt: skip
    second.on_trial_error(0, [], as_trial(second.jobs[2]))
    second.on_trial_start(0, [], as_trial(second.jobs[1]))
    write_history(second.jobs[1], EPOCHS)
    second.on_trial_complete(0, [], as_trial(second.jobs[1]))
    heir = TrialRecord.read(Path(second.jobs[1]["folder"]))
    assert heir is not None and (heir.config, heir.params["lr"]) == (lineage, 0.05)
    states = [trial.state for trial in open_study(tmp_path, config).get_trials()]
    R, C, F = TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL
    assert states == [R, C, C, F]


class Tune:
    """What a member sees of Tune: the checkpoint it is handed, and its reports."""

    class Checkpoint:
        def __init__(self, folder: Any) -> None:
            self.folder = Path(folder)
            self.data = (self.folder / CHECKPOINT).read_bytes()

        from_directory = classmethod(lambda cls, folder: cls(folder))

    def __init__(self) -> None:
        self.given: Any = None
        self.left: dict[int, bytes] = {}

    def get_checkpoint(self) -> Any:
        return self.given

    def report(self, row: dict[str, Any], checkpoint: Any = None) -> None:
        if checkpoint is not None:
            self.left[row["epoch"]] = checkpoint.data


class Stop(Exception):
    """Stands for SIGKILL."""


def test_a_member_takes_over_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    """A member with a better one's checkpoint, killed and continued, against a straight run."""
    fake = Tune()
    monkeypatch.setattr(members_module, "tune", fake)
    shared = resolve(
        DistillConfig(
            dataset="synthetic", student="resnet8", method="none", train_subset=80,
            validation_fraction=0.4, batch_size=16, epochs=5, precision="float32",
        )
    )  # fmt: skip

    def job(name: str, settings: DistillConfig) -> Job:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Job(
            name=name, number=0, folder=str(folder), settings=settings.to_dict(), data_root=None,
            threads=1,
        )  # fmt: skip

    def stop_at(epoch: int) -> Any:
        def report(row: dict[str, Any]) -> None:
            if row["epoch"] == epoch:
                raise Stop

        return report

    def history(run: Job) -> list[dict[str, Any]]:
        rows = read_history(Path(run.folder))
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    better = job("better", shared)
    run_member(better, fake.report, every=2)
    assert sorted(fake.left) == [2, 4], "none after the last epoch"

    heir = job("heir", shared.replace(changes=[{"epoch": 3, "lr": 0.01}]))
    donated = tmp_path / "donated"
    donated.mkdir()
    (donated / CHECKPOINT).write_bytes(fake.left[2])

    class Given:
        def as_directory(self) -> Any:
            return contextlib.nullcontext(str(donated))

    fake.given = Given()
    with pytest.raises(Stop):
        run_member(heir, stop_at(3), every=2)
    fake.given = None
    reported: list[int] = []
    run_member(heir, lambda row: reported.append(row["epoch"]), every=2)
    assert reported == [5], "epoch 4 went to Tune with its checkpoint"
    straight = job("straight", shared.replace(changes=[{"epoch": 3, "lr": 0.01}]))
    run_member(straight, fake.report, every=2)
    assert history(heir) == history(straight)
    assert history(heir)[:2] == history(better)[:2]

    # Killed after its lineage had been written down, before it had the checkpoint.
    lost = job("heir", shared.replace(changes=[{"epoch": 2, "lr": 0.2}]))
    run_member(lost, fake.report, every=2)
    assert [row["epoch"] for row in history(lost)] == [1, 2, 3, 4, 5]
    assert history(lost)[0] == history(straight)[0]
    assert history(lost)[1] != history(straight)[1]


optuna.logging.set_verbosity(optuna.logging.ERROR)
