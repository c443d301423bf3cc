"""Commands that are killed while they train a teacher or a student, export or draw a report:
`make chaos`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from agreement import ended
from chaos_run import nothing_left, without_seconds
from holding import ROOT, Holds
from kill_tally import TALLY, WITHOUT_RAY

from ekd_ray.results import Bundle

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("EKD_CHAOS_KILLS"), reason="minutes: make chaos"),
]
QUICK = (
    "--dataset", "digits", "--epochs", "4", "--train-subset", "120", "--set", "precision=float32",
    "--quiet",
)  # fmt: skip
TEACHER = ("train-teacher", *QUICK, "--model", "resnet8", "--evidential")
STUDENT = ("distill", *QUICK, "--student", "resnet8", "--method", "none", "--test")
POINTS = (
    ("begin", ("history.jsonl",)),
    ("epoch", ("epoch 2.",)),
    ("restore", ()),
    ("rename", ("checkpoint.pt",)),
    ("epoch", ("epoch 4.",)),
    ("rename", (".safetensors",)),
)
MADE_UP = """
import sys
from pathlib import Path
from kill_at_changes import study
study(Path(sys.argv[1]))
"""


class Command:
    """A command that minds holds, and the log of its last start."""

    def __init__(
        self, kind: str, folder: Path, *words: str, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.kind, self.words, self.log = kind, words, folder / "log"
        self.holds = Holds(folder / "holds")
        self.environment = self.holds.environment(environment)

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ekd_ray", *self.words, *more]
        with open(self.log, "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=self.environment)

    def kill_at(self, point: str, *words: str, more: tuple[str, ...] = ()) -> None:
        self.holds.arm(point, *words)
        process = self.start(*more)
        held = self.holds.wait(process)
        assert held, f"nobody came to {point} {words}: {self.log.read_text()}"
        held.kill(process.pid)
        process.wait()
        TALLY.add(self.kind, kills=1)
        print(f"kill: {self.kind}, at {point} {' '.join(words)}", flush=True)

    def finish(self, *more: str) -> None:
        assert self.start(*more).wait(timeout=600) == 0, self.log.read_text()

    def check(self, right: object) -> None:
        TALLY.add(self.kind, wrong=int(not right))
        assert right, self.kind


def history(out: Path) -> list[dict[str, float]]:
    return [without_seconds(json.loads(r)) for r in (out / "history.jsonl").open()]


@pytest.mark.parametrize("words", [TEACHER, STUDENT], ids=["train-teacher", "distill"])
def test_a_killed_training_ends_as_an_undisturbed_one(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    Command(words[0], tmp_path / "other", *words).finish("--out", str(alone))
    command = Command(WITHOUT_RAY + words[0], tmp_path, *words, "--out", str(out))
    for point, label in POINTS:
        command.kill_at(point, *label, more=("--resume",) if begun(out) else ())
    command.finish("--resume")
    command.check(history(out) == history(alone))
    for path in alone.glob("*.safetensors"):
        command.check((out / path.name).read_bytes() == path.read_bytes())
    names = [sorted(p.name.split(".out.")[0] for p in f.iterdir()) for f in (out, alone)]
    command.check(names[0] == names[1])


def begun(out: Path) -> bool:
    return (out / "config.yaml").exists()


@pytest.mark.ray
def test_killed_candidates_of_a_teacher_are_chosen_from_as_ever(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = Command(
        "train-teacher, candidates", tmp_path, *TEACHER, "--candidates", "2",
        environment=environment,
    )  # fmt: skip
    records: dict[str, bytes] = {}
    with nothing_left(environment):
        for point, words in (
            ("epoch", ("epoch 2.",)),
            ("rename", ("result.json",)),
            ("rename", (f"{out}/", ".safetensors")),
        ):
            more = ("--resume",) if begun(out) else ()
            command.kill_at(point, *words, more=("--out", str(out), *more))
            now = {str(p): p.read_bytes() for p in out.rglob("result.json")}
            command.check(records.items() <= now.items())
            records = now
        command.finish("--out", str(out), "--resume")
    chosen = json.loads((out / "candidates.json").read_text())
    command.check([c["status"] for c in chosen["candidates"]] == ["complete"] * 2)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with all of its files and made-up figures."""
    folder = tmp_path_factory.mktemp("study")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    subprocess.run(
        [sys.executable, "-c", MADE_UP, str(folder / "run")], env=environment, check=True
    )
    return folder / "run"


@pytest.mark.parametrize(("command", "points", "is_whole"), [
    ("export", (
        ("begin", ("distill.yaml",)), ("rename", ("metrics.json",)), ("swap", ()),
    ), lambda out: Bundle.load(out).verify().ok),
    ("report", (("report", ()), ("rename", ("page",))), lambda out: "</html>" in out.read_text()),
])  # fmt: skip
def test_what_is_written_again_is_whole_or_what_it_was(
    command: str, points: tuple[tuple[str, tuple[str, ...]], ...],
    is_whole: Callable[[Path], bool], study: Path, tmp_path: Path,
) -> None:  # fmt: skip
    out, before = tmp_path / "page", ended(study)
    run = Command(
        WITHOUT_RAY + command, tmp_path, command, str(study), "--out", str(out), "--quiet"
    )
    for there in (False, True):
        for point, words in points:
            run.kill_at(point, *words)
            run.check(out.exists() == there and (not there or is_whole(out)))
        run.finish()
        run.check(is_whole(out))
    run.check(ended(study) == before)
