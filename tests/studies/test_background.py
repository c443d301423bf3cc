"""A study in a child process: it ends with its parent, is stopped, goes on, or says why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos_marks import IN_CHAOS

import ekd_ray as ekd
from ekd_ray.results.records import STUDY_FILE
from ekd_ray.results.study import DRIVER_LOG

pytestmark = pytest.mark.timeout(900)
# Long in its teacher, which is trained before there is a Ray.
STUDY = {
    "pair": "resnet20-resnet8", "dataset": "digits", "train_subset": 120, "epochs": 2,
    "trials": 2, "confirm_seeds": 1, "confirm_top_k": 1, "max_concurrent": 2,
    "baselines": ["none"], "champions": ["authors"], "teacher": "resnet8",
    "teacher_training": {"epochs": 100_000},
}  # fmt: skip
# As people write scripts: without `if __name__ == "__main__"`.
SCRIPT = """
import json, sys, time
import ekd_ray as ekd
study = ekd.tune(**json.loads(sys.argv[1]), wait=False)
print(study.process.pid, flush=True)
time.sleep(600)
"""


def start(out: Path, **changes: object) -> tuple[subprocess.Popen[str], int]:
    """A script that begins a study in its background: (the script, the pid of the study)."""
    given = json.dumps({**STUDY, "out": str(out), **changes})
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, given], stdout=subprocess.PIPE, text=True
    )
    assert script.stdout
    return script, int(script.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of a container's first process may stay as a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not is_alive(pid)


@pytest.mark.slow
def test_it_ends_with_its_parent_unless_it_is_detached(tmp_path: Path) -> None:
    bound, bound_pid = start(tmp_path / "bound")
    free, free_pid = start(tmp_path / "free", detach=True)
    for script in (bound, free):
        script.send_signal(signal.SIGKILL)
        script.wait()
    assert ends(bound_pid, 120)
    assert is_alive(free_pid)
    os.kill(free_pid, signal.SIGTERM)
    assert ends(free_pid, 120)
    for name in ("bound", "free"):
        assert "Traceback" not in (tmp_path / name / DRIVER_LOG).read_text()
        assert (tmp_path / name / STUDY_FILE).exists()


def test_it_is_followed_stopped_and_refused(tmp_path: Path) -> None:
    study = ekd.tune(**STUDY, out=tmp_path / "run", wait=False)
    assert study.process and study.process.poll() is None
    assert study.status().stage == "teacher"
    with pytest.raises(TimeoutError, match="still at work"):
        study.wait(timeout=0.1)
    with pytest.raises(ekd.UserError, match="holds a study already: add resume=True"):
        ekd.tune(**STUDY, out=tmp_path / "run", wait=False)
    with pytest.raises(ekd.UserError, match="is being run by another process"):
        ekd.tune(out=tmp_path / "run", resume=True, wait=False)
    stopped = study.stop()
    assert study.process.returncode == 130
    assert stopped.wait().path == tmp_path / "run"
    with pytest.raises(ekd.UserError, match="was not begun here"):
        stopped.stop()


WHOLE = """
import json, os, signal, sys
import ray
import ekd_ray as ekd

ekd.tune, ekd.Study  # what their modules set when they are loaded stays
ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False)
mine, handlers = ray.get_runtime_context().get_job_id(), signal.getsignal(signal.SIGINT)
told = []

def ours():  # libraries set some of their own
    return {k: v for k, v in os.environ.items() if k.startswith(("RAY_", "TUNE_", "CUDA_"))}

environment = ours()

class Log(ekd.Callback):
    def stage(self, title, total, epochs):
        told.append(title)
    def ended(self, number, *, failure):
        assert failure is None

study = ekd.tune(**json.loads(sys.argv[1]), callbacks=[Log()], space={"temperature": ekd.log(1, 4)})
assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == mine
assert signal.getsignal(signal.SIGINT) == handlers
assert ours() == environment
trials = len(study.records())  # files are read when they are first asked for
background = ekd.tune(out=str(study.path), resume=True, extend=1, wait=False)
done = background.wait()
assert ray.get(ray.remote(lambda: 3).remote()) == 3
print(json.dumps({"told": told, "trials": trials, "more": len(done.records()),
                  "stage": done.status().stage, "html": study._repr_html_(),
                  "axes": type(study.plot.learning_curves()).__name__}))
"""


@pytest.mark.slow
@pytest.mark.ray
@IN_CHAOS
def test_a_script_searches_on_its_own_ray_and_keeps_it(tmp_path: Path) -> None:
    # Without early stops, which full runs would make up for: trials of their own.
    given = {**STUDY, "out": str(tmp_path / "run"), "teacher_training": {"epochs": 1}}
    given["scheduler"] = "none"
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, json.dumps(given)], capture_output=True, text=True,
        timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["told"][:2] == ["teacher", "search"] and found["told"][-1] == "export"
    assert (found["trials"], found["more"], found["stage"]) == (2, 3, "finished")
    assert "winner" in found["html"] or "test accuracy" in found["html"]
    assert found["axes"] == "Figure"
    assert "search: 100%" in done.stderr
