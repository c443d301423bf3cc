"""Points at which a process waits to be killed: for the chaos tests alone, which put this folder
on PYTHONPATH, so that Python runs it at the start of a driver and of each of its Ray processes.

`EKD_HOLDS` names a folder. A file `*.armed` in it asks that a process stop at a point; the first
that comes there takes the file, by renaming it to `*.held`, says in it who it is and where, and
stands still until the file is gone (or it is killed, or HOLD_SECONDS have passed).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("EKD_HOLDS", "")
HOLD_SECONDS = 600.0
_current = ""  # the folder of the run that this process is at


def stand_still(point: str, label: object = "") -> None:
    """Wait here, if this point is armed for what the label names."""
    here = f"{_current} {label}"
    for armed in sorted(Path(FOLDER).glob(f"{point}.*.armed")):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            asked = json.loads(armed.read_text())
            if not all(word in here for word in asked["words"]):
                continue
            if asked["once"]:  # a run loses one process only
                (Path(FOLDER) / f"{Path(_current).name}.struck").touch(exist_ok=False)
            held = armed.with_suffix(".held")
            armed.rename(held)
            said = held.with_suffix(".said")
            said.write_text(json.dumps({"pid": os.getpid(), "label": here}))
            said.replace(held)
            until = time.monotonic() + HOLD_SECONDS
            while held.exists() and time.monotonic() < until:
                time.sleep(0.01)
            return


def _before(name: str, label: Callable[..., object]) -> Callable[[Any], Any]:
    """Stand still before a function is called."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            stand_still(name, label(*arguments, **options))
            return function(*arguments, **options)

        return wrapped

    return wrap


def _around_file(atomic_path: Any) -> Any:
    """Stand still before a file is begun, and when it is whole but has not got its name."""

    @contextlib.contextmanager
    @functools.wraps(atomic_path)
    def wrapped(path: Any, *arguments: Any, **options: Any) -> Iterator[Path]:
        stand_still("begin", path)
        with atomic_path(path, *arguments, **options) as temporary:
            yield temporary
            stand_still("rename", path)

    return wrapped


def _in_run(train_run: Any) -> Any:
    """Know which run this process is at; let it have a checkpoint after every epoch."""
    train_run.__kwdefaults__["checkpoint_seconds"] = 0.0

    @functools.wraps(train_run)
    def wrapped(run: Any, *arguments: Any, **options: Any) -> Any:
        global _current
        _current = str(run.folder)
        stand_still("run", "")
        return train_run(run, *arguments, **options)

    return wrapped


def _with_checkpoints(distill: Any) -> Any:
    distill.__kwdefaults__["checkpoint_seconds"] = 0.0
    return distill


# Module -> name in it -> what takes its place. `tests/test_holds.py` sees that all are there.
POINTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "ekd_ray.files": {
        "atomic_path": _around_file,
        "remove_temporaries": _before("sweep", lambda folder: folder),
    },
    "ekd_ray.engine.distill": {
        "distill": _with_checkpoints,
        "Run.end_epoch": _before("epoch", lambda run, row: f"epoch {row['epoch']}."),
    },
    "ekd_ray.engine.checkpoint": {
        "load_checkpoint": _before("restore", lambda path, **_: path),
    },
    "ekd_ray.engine.teacher.fill": {
        "fill_tables": _before(
            "fill", lambda *_, seeds, part, **__: f"part {part.index}. seed {seeds[0]}."
        ),
    },
    "ekd_ray.results.finish": {"finish_run": _before("finish", lambda *_, **__: "")},
    "ekd_ray.results.bundle_export": {"_swap": _before("swap", lambda new, out: out)},
    "ekd_ray.results.report": {"write_report": _before("report", lambda *_, **__: "")},
    "ekd_ray.scale.worker": {"train_run": _in_run},
    "ekd_ray.scale.searcher": {
        "OptunaSearcher._settle_trials": _before("settle", lambda searcher: searcher.run),
        "OptunaSearcher._end_trial": _before("tell", lambda searcher, record: record.folder),
        "OptunaSearcher.suggest": _before("suggest", lambda *_: ""),
    },
    "ekd_ray.scale.storage": {"_JournalFile.append_logs": _before("journal", lambda *_: "")},
    "ekd_ray.studies.pipeline": {"check_study": _before("check", lambda *_, **__: "")},
}


def _replace(module: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    *classes, last = name.split(".")
    owner = functools.reduce(getattr, classes, module)
    setattr(owner, last, wrap(getattr(owner, last)))


class _Finder:
    """Finds the modules that have points, and puts these in once a module has run."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path, target) if name in POINTS else None
        if spec is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                for point, wrap in POINTS[name].items():
                    _replace(module, point, wrap)

            loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
