"""The disk fills up in mid-study: one sentence, no configuration blamed, and it goes on after."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from launchers_run import DIGITS
from optuna.trial import TrialState
from search_runs import study_of

from ekd_ray.config import DistillConfig
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.history import read_history
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import Halted, NoSpace, OtherData, continue_with, halting_error
from ekd_ray.results.records import FAILURE, RESULT, RunRecord, find_pin, single_run
from ekd_ray.results.study_file import write_study_file
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import HALTED, RUN, TrainOptions, check_halted, train_run

CONFIG = DistillConfig(
    dataset="digits", student="resnet8", method="none", epochs=2, batch_size=32, train_subset=120,
    precision="float32",
)  # fmt: skip


def fill(disk, left):
    """Leave so many bytes free, in a file that can be removed."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"\0" * (free - left))


def train_in(folder, report):
    options = TrainOptions(data_root=None, threads=1)
    return train_run(
        single_run(resolve(CONFIG), folder), report, options=options, checkpoint_seconds=0.0
    )


def test_a_trial_that_meets_a_full_disk_has_not_failed(small_disk):
    folder = small_disk / "trials" / "0000"
    folder.mkdir(parents=True)
    fill(small_disk, 200_000)  # the history fits, the checkpoint (0.6 MB) does not
    with pytest.raises(Exception, match=r"os error 28|No space left") as met:
        train_in(folder, lambda row: None)
    assert halting_error(met.value) is not None
    assert not (folder / FAILURE).exists()
    assert list(folder.glob(".*.tmp")) == [], "half a checkpoint is left"
    with pytest.raises(Halted, match=r"no space is left .* free some, then run the same command"):
        check_halted(folder)
    (small_disk / "filler").unlink()
    rows = []
    assert train_in(folder, rows.append) is not None
    assert [row["epoch"] for row in rows] == [1, 2]
    assert not (folder / HALTED).exists()
    check_halted(folder)
    fill(small_disk, 0)  # without room for a word, it is known by what is free
    with pytest.raises(NoSpace, match="with 0 MiB free"):
        check_halted(folder)


def test_a_trial_that_meets_other_images_has_not_failed_either(tmp_path):
    """Those that its study had pinned."""
    write_study_file(tmp_path, {"data": {"train": {"fingerprint": "0" * 16}}})
    folder = tmp_path / "trials" / "0000"
    options = TrainOptions(data_root=None, threads=1, pin=find_pin(tmp_path))
    folder.mkdir(parents=True)
    with pytest.raises(OtherData, match="0000000000000000"):
        train_run(single_run(resolve(CONFIG), folder), lambda row: None, options=options)
    assert not (folder / FAILURE).exists()
    with pytest.raises(Halted, match=r"other data.* then run the same command"):
        check_halted(folder)


def test_the_trial_goes_on_under_its_number_once_there_is_room(tmp_path):
    config = study_of("random", trials=3)
    searcher = OptunaSearcher(tmp_path, config, resolve(config.distill))
    job = RunRecord.from_dict(searcher.suggest("a")[RUN])
    with open(f"{job.folder}/{HALTED}", "w") as file:
        json.dump({"reason": "full"}, file)
    with pytest.raises(Halted, match="full"):
        searcher.on_trial_complete("a", error=True)
    assert searcher.study.get_trials()[0].state == TrialState.RUNNING
    assert not list(tmp_path.rglob(RESULT))
    again = OptunaSearcher(tmp_path, config, resolve(config.distill))
    assert RunRecord.from_dict(again.suggest("b")[RUN]).config == job.config


@pytest.mark.slow
def test_a_launcher_says_it_in_one_sentence_and_continues(small_disk, launch, monkeypatch):
    from ekd_ray.studies import pipeline

    monkeypatch.setattr(pipeline, "LEAST_FREE_BYTES", 0)
    out = small_disk / "run"
    small = (*DIGITS, "--method", "none", "--train-subset", "120", "--epochs", "2", "--quiet")
    fill(small_disk, 200_000)
    code, _, err = launch("distill", *small, "--out", out)
    assert code == 2
    assert err.count("\n") == 1 and "no space is left on the disk" in err, err
    assert not (out / CHECKPOINT).exists()
    (small_disk / "filler").unlink()
    code, _, err = launch("distill", *small, "--out", out, "--resume")
    assert code == 0, err
    assert len(read_history(out)) == 2


def test_no_thread_of_a_writer_tells_of_the_disk_as_well(small_disk):
    """TensorBoard's own thread meets a full disk first, where not even a history fits."""
    fill(small_disk, 100)
    script = (
        "import threading; from ekd_ray.cli.main import run; from ekd_ray.engine.runlog import "
        "RunLog; from pathlib import Path; run(lambda: [log.write({'epoch': n, 'loss': 0.5}) "
        f"for log in [RunLog(Path({str(small_disk / 'run')!r}), hyperparameters={{}}, history=[])] "
        "for n in range(9)])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "no space is left" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),  # than `ulimit -f` lets it be
        RuntimeError("I/O error: No space left on device (os error 28)"),
        NoSpace("full"),
    ],
)
def test_full_disks_are_known_through_any_wrapping(error):
    def wraps():
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("Tune failed") from inner

    with pytest.raises(RuntimeError, match="Tune failed") as outer:
        wraps()
    assert halting_error(outer.value) is not None
    assert "\n" not in str(halting_error(outer.value))

    assert halting_error(OSError(errno.EIO, "x")) is None


def test_what_begins_anew_keeps_nothing():
    full = OSError(errno.ENOSPC, "full")
    try:
        continue_with("ekd-ray tune --resume", keeps=True)
        assert "is kept" in str(halting_error(full))
        continue_with("ekd-ray predict best a.png", keeps=False)
        assert str(halting_error(full)).endswith("run `ekd-ray predict best a.png`.")
    finally:
        continue_with(None)
