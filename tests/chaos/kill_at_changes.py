"""Run as a script: whole studies without Ray or training, killed at their changes of files.

    python kill_at_changes.py FOLDER SEED COUNT

Each study is killed before a chosen change of its folder (a file opened for writing, renamed,
removed, linked; a folder made), continued and killed at a random one, then continued to its
end. With COUNT 0 every change is the first kill's turn once, else so many of them, drawn by
SEED: first one of each kind, as far as COUNT goes. The studies stay in FOLDER for the test to
look at; `FOLDER/<change>.json` says what was seen on the way.

What is real: open_run, the pipeline's stages, the searcher, the confirm stage and the export,
with all of their files. What is not: Ray Tune (two jobs are begun, one after the other runs)
and the training (figures are made up from the configuration, files are written as it does).
Processes are forked, so that the imports are paid once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from agreement import ended
from ray.tune.schedulers import TrialScheduler

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import load_dataset
from ekd_ray.engine import train_teacher as teacher_module
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.distill import TrainedStudent
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.runlog import RunLog
from ekd_ray.files import write_json, write_text
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model
from ekd_ray.results import finish as finish_module
from ekd_ray.results import report as report_module
from ekd_ray.results.records import JOURNAL, STUDY_FILE, RunRecord
from ekd_ray.results.study import Study
from ekd_ray.scale import run_list
from ekd_ray.scale import search as search_module
from ekd_ray.scale import worker as worker_module
from ekd_ray.scale.worker import RUN, Train
from ekd_ray.studies import pipeline

EPOCHS = 4
CONFIG = StudyConfig(
    distill=with_method(
        DistillConfig(
            dataset="synthetic", student="resnet8", train_subset=80, validation_fraction=0.4,
            batch_size=16, precision="float32",
        ),
        "ekd", teacher="resnet8", teacher_cache="off", epochs=EPOCHS,
    ),
    teacher_training={"epochs": 1},
    space={"lr": {"low": 0.001, "high": 0.1, "log": True}},
    first_points=({"lr": 0.05}, {"lr": 0.02}),
    trials=5, confirm_top_k=2, confirm_seeds=1, baselines=("none",),
)  # fmt: skip


class Stopped(Exception):
    """The scheduler's word to a trial."""


def pretend(config: DistillConfig, *, out: Path, on_epoch: Any = None, **_: Any) -> TrainedStudent:
    """`distill` without the training; the third epoch leaves a checkpoint, and the last."""
    checkpoint = out / CHECKPOINT
    history = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    log = RunLog(out, hyperparameters={"lr": config.lr}, history=history)
    for epoch in range(len(history) + 1, config.epochs + 1):
        digest = hashlib.sha256(f"{config.lr} {config.seed} {epoch}".encode()).digest()
        row = {"epoch": epoch, "val_top1": digest[0] / 512 + epoch / 16, "seconds": time.time()}
        history.append(row)
        log.write(row)
        if epoch == 3 or epoch == config.epochs:
            write_json(checkpoint, history)
        if on_epoch:
            on_epoch(row)
    log.close()
    return TrainedStudent(
        config=config, metrics=history[-1], history=history, model=build_model("resnet8", 10),
        log_prior=0.0, precision="float32", data_fingerprint="0" * 16, seconds=0.0,
    )  # fmt: skip


def tune(
    run: Path, config: StudyConfig, train: Train, *, searcher: Any, scheduler: Any,
    observer: Any,
) -> None:  # fmt: skip
    """Tune's calls: two jobs have begun at any time, the older one runs until it ends.

    In a search that is continued the newer one does, so that a trial may find other results
    at its rungs than it did before the kill.
    """
    begun: deque[tuple[str, RunRecord]] = deque()
    take = begun.pop if (run / "trials").exists() else begun.popleft
    names = map(str, itertools.count())
    while True:
        while len(begun) < 2 and isinstance(found := searcher.suggest(name := next(names)), dict):
            begun.append((name, RunRecord.from_dict(found[RUN])))
        if not begun:
            return
        name, job = take()
        trial = SimpleNamespace(trial_id=name, config={RUN: job.to_dict()})
        scheduler.on_trial_add(None, trial)

        def report(row: dict[str, Any], name: str = name, trial: Any = trial) -> None:
            result = {**row, "training_iteration": row["epoch"]}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                raise Stopped

        with contextlib.suppress(Stopped):
            train(job, report)
        searcher.on_trial_complete(name, {})


def write_page(study: Study) -> None:
    """`write_report` without the figures, which would cost more than all the rest."""
    write_text(study.path / "report" / "index.html", "a page")


def study(out: Path) -> None:
    """Run or continue the study as a launcher does, in this process."""
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in (
            (worker_module, "distill", pretend),
            (teacher_module, "distill", pretend),
            (search_module, "run_tuner", tune),
            (run_list, "run_tuner", tune),
            (finish_module, "evaluate_test", lambda *_, **__: {"test_top1": 0.5}),
            (finish_module, "_draw", lambda *_: None),
            (report_module, "write_report", write_page),
            (pipeline, "connected", lambda *_, **__: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        config = pipeline.check_study(CONFIG)
        pipeline.conduct_study(config, out, mock.Mock(), resume=(out / STUDY_FILE).exists())


class Changes:
    """Counts what this process does to the files below a folder; kills it before one of them.

    With `tear` bytes, the append that has just been made there loses its end: a write that the
    kill had cut in two. An odd `tear` lets a file be opened first: it is there and empty.
    """

    def __init__(self, folder: Path, kill_at: int | None, tear: int) -> None:
        self.folder, self.kill_at, self.tear = folder, kill_at, tear
        self.kinds: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.symlink", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = arguments[1 if event == "os.symlink" else 0]
        else:
            return
        if not str(path).startswith(str(self.folder)):
            return
        # Numbers, fingerprints and what makes a temporary name unique.
        name = re.sub(
            r"(?<=\.lock)[\w-]+|\.\w{8}\.tmp|\d[\w-]*", "#", str(path)[len(str(self.folder)) :]
        )
        self.kinds.append(f"{event} {name}")
        if len(self.kinds) == self.kill_at:
            self._cut(event, Path(path))
            if event == "open" and self.tear % 2:
                os.open(path, flags)
            os.kill(os.getpid(), signal.SIGKILL)

    def _cut(self, event: str, path: Path) -> None:
        """Optuna gives its lock back after an append; a row is followed by a checkpoint."""
        if not self.tear:
            return
        if event == "os.rename" and path.name == f"{JOURNAL}.lock":
            appended = self.folder / JOURNAL
        elif event == "open" and CHECKPOINT in path.name:
            appended = path.with_name(HISTORY)
        else:
            return
        size = appended.stat().st_size
        line = len(appended.read_bytes().splitlines()[-1])
        os.truncate(appended, size - 1 - self.tear % line)


def in_child(out: Path, kill_at: int | None, tear: int = 0) -> list[str] | None:
    """The study in a process of its own: the kinds of its changes, or None if it was killed."""
    said = out.with_suffix(".changes")
    child = os.fork()
    if child == 0:
        try:
            changes = Changes(out, kill_at, tear)
            study(out)
            said.write_text("\n".join(changes.kinds))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise RuntimeError(f"{out.name}: the study ended with status {status}")
    return said.read_text().splitlines()


def draw_changes(folder: Path, draw: random.Random, count: int) -> tuple[list[str], list[int]]:
    """Run the study undisturbed in `folder/whole`, and draw so many of its changes (0: all).

    Returns:
        The kinds of all changes, in order; the drawn ones by their numbers from 1, ascending: first
        one of each kind, as far as `count` goes.
    """
    torch.set_num_threads(1)
    # Once here, and not in every child: decoding, and what torch imports late.
    load_dataset("synthetic", "train", data_root=None)
    pipeline.check_study(CONFIG)
    kinds = in_child(folder / "whole", None)
    assert kinds is not None
    turns = draw.sample(range(1, len(kinds) + 1), len(kinds))
    of_each_kind = {kinds[turn - 1]: turn for turn in turns}.values()
    turns.sort(key=lambda turn: turn not in of_each_kind)
    return kinds, sorted(turns[: count or len(turns)])


def main(folder: Path, seed: int, count: int) -> None:
    draw = random.Random(seed)
    kinds, turns = draw_changes(folder, draw, count)
    total = len(kinds)
    for turn in turns:
        out = folder / f"{turn:04d}"
        again, tears = draw.randint(1, total), [draw.randint(0, 99) for _ in range(2)]
        assert in_child(out, turn, tears[0]) is None
        seen = [ended(out)]
        came = in_child(out, again, tears[1]) is None
        seen.append(ended(out))
        in_child(out, None)
        records = [{path: text.decode() for path, text in found.items()} for found in seen]
        out.with_suffix(".json").write_text(json.dumps({"again": came, "records": records}))
    print(f"{total} changes of {len({*kinds})} kinds")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
