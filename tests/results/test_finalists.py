"""Which trials of a search are confirmed."""

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import RunRecord, trial_folder, trial_name
from ekd_ray.results.study import Study


@pytest.mark.parametrize(("top_k", "chosen"), [(2, [1, 3]), (4, [1, 3, 0])])
def test_the_best_trials_that_keep_the_constraints_are_confirmed(tmp_path, top_k, chosen):
    for number, (top1, ece) in enumerate([(0.5, 0.1), (0.7, 0.1), (0.9, 0.4), (0.6, 0.1)]):
        folder = trial_folder(tmp_path, number)
        folder.mkdir(parents=True)
        RunRecord(
            folder=folder, stage=RunStage.SEARCH, name=trial_name(number), number=number,
            status="complete", history=[{"epoch": 1, "val_top1": top1, "val_ece": ece}],
        ).write()  # fmt: skip
    config = StudyConfig(
        distill=DistillConfig(method="none"), confirm_top_k=top_k, constraints=["val_ece<=0.2"]
    )
    found = Study(path=tmp_path, config=config, header={}).finalists()
    assert [trial.number for trial in found] == chosen
