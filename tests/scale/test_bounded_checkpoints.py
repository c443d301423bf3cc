"""A study holds one checkpoint per running trial and the weights of its final runs; no more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from search_runs import FLOATS, study_of

from ekd_ray.config import DistillConfig
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.confirm import Entry, plan_runs
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import RUN, TrainOptions, train_run

SHARED = DistillConfig(
    dataset="digits", student="resnet8", method="none", epochs=2, batch_size=32, train_subset=120,
    precision="float32",
)  # fmt: skip

OPTIONS = TrainOptions(data_root=None, threads=1)


def large_files(run: Path) -> Counter[str]:
    """Files as large as a network's weights (0.3 MB here), by name."""
    found = (path for path in run.rglob("*") if path.is_file())
    return Counter(path.name for path in found if path.stat().st_size > 200_000)


def test_checkpoints_are_those_of_running_trials(tmp_path):
    """Every epoch leaves one, at the same place."""
    config = study_of("random", trials=2, distill=SHARED, space=FLOATS)
    searcher = OptunaSearcher(tmp_path, config, resolve(config.distill))
    seen = []

    def look(row):
        seen.append(large_files(tmp_path))

    jobs = [RunRecord.from_dict(searcher.suggest(f"t{index}")[RUN]) for index in range(2)]
    for ended, job in enumerate(jobs):
        assert train_run(job, look, options=OPTIONS, checkpoint_seconds=0.0) is not None
        assert large_files(tmp_path) == {CHECKPOINT: 1}, "one until the driver has its record"
        searcher.on_trial_complete(f"t{ended}")
        assert large_files(tmp_path) == {}
    assert seen == [{CHECKPOINT: 1}] * 4


def test_confirm_keeps_the_weights_of_final_runs_only(tmp_path):
    config, seen = resolve(SHARED), []
    for stage in (RunStage.SELECT, RunStage.FINAL):
        (run,) = plan_runs(tmp_path, stage, [Entry(name="x", config=config, role="champion")], [1])
        train_run(run, lambda row: seen.append(large_files(tmp_path)), options=OPTIONS)
        assert large_files(tmp_path) == ({} if stage is RunStage.SELECT else {WEIGHTS: 1})
    assert max(files.total() for files in seen) <= 1
