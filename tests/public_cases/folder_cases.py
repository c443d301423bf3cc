"""A study's folder that is damaged, shared, or of other releases."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cases import Answer, Case, Hands
from filelock import FileLock

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.results import Study
from ekd_ray.results.records import LOCK, RESULT, RunRecord
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import RUN
from ekd_ray.studies.pipeline import check_study, check_versions, open_run

KIND = "study's folder"
HISTORY = [{"epoch": epoch, "val_top1": 0.1 * epoch, "seconds": 1.0} for epoch in (1, 2)]


@functools.cache
def _template() -> Path:
    """A study of which two trials have ended and a third runs."""
    out = Path(tempfile.mkdtemp(prefix="ekd-cases-")) / "run"
    shared = DistillConfig(
        dataset="digits", student="resnet8", method="none", epochs=2, weight_decay=3e-4
    )
    given = StudyConfig(
        distill=shared, space={"lr": {"low": 0.01, "high": 0.1, "log": True}},
        first_points=({"lr": 0.05},), trials=4, confirm_top_k=1,
    )  # fmt: skip
    config = check_study(given)
    open_run(out, config, resume=False)
    searcher = OptunaSearcher(out, config, resolve(config.distill))
    for name in "abc":
        drawn = searcher.suggest(name)
        assert isinstance(drawn, dict)
        if name != "c":
            folder = RunRecord.from_dict(drawn[RUN]).folder
            (folder / "history.jsonl").write_text(
                "".join(f"{line}\n" for line in map(_json, HISTORY))
            )
            searcher.on_trial_complete(name, {})
    return out


def _json(row: dict[str, float]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}"


def study(hands: Hands) -> Path:
    """A copy of the study, of the row's own."""
    out = hands.folder / "run"
    shutil.copytree(_template(), out, symlinks=True)
    return out


def cut(share: float, *command: str) -> Callable[[Hands], Answer]:
    """Cut the study's file, and ask a command about it."""

    def hand_in(hands: Hands) -> Answer:
        out = study(hands)
        text = (out / "study.yaml").read_bytes()
        (out / "study.yaml").write_bytes(text[: int(len(text) * share)])
        before = _state(out)
        name, *flags = command
        answer = hands.launch(name, *flags, out)
        assert _state(out) == before
        return answer

    return hand_in


def _state(out: Path) -> dict[Path, bytes]:
    """What lies in a study's folder, but for the lock of who looks at it."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK]
    return {path: path.read_bytes() for path in files}


def changed_by_hand(hands: Hands) -> Answer:
    file = study(hands) / "study.yaml"
    file.write_text(file.read_text().replace("weight_decay: 0.0003", "weight_decay: 0.003"))
    return hands.launch("show", file.parent)


def repaired(prepare: Callable[[Path], None], same: bool = True) -> Callable[[Hands], None]:
    """Damage the study's file, repair it, and compare with what it was."""

    def hand_in(hands: Hands) -> None:
        from ekd_ray.studies.repair import repair_study

        out = study(hands)
        before = Study.load(out)
        prepare(out)
        damaged = (out / "study.yaml").read_bytes() if (out / "study.yaml").exists() else None
        said = repair_study(out)
        after = Study.load(out)
        assert after.config == before.config if same else after.config.distill.epochs == 2
        assert after.config.distill.fingerprint() == before.config.distill.fingerprint()
        assert [run.number for run in after.records()] == [0, 1]
        if damaged is not None:
            assert (out / "study.yaml.damaged").read_bytes() == damaged
        assert "rebuilt" in said

    return hand_in


def cut_to(share: float) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        text = (out / "study.yaml").read_bytes()
        (out / "study.yaml").write_bytes(text[: int(len(text) * share)])

    return damage


def zeros(out: Path) -> None:
    """What some file systems leave of a file when the power fails."""
    (out / "study.yaml").write_bytes(b"\0" * 4096)


def without_file(out: Path) -> None:
    (out / "study.yaml").unlink()


def without_journal(out: Path) -> None:
    """What lies behind the settings that all trials share is in the file's beginning."""
    cut_to(0.98)(out)
    (out / "optuna.journal").unlink()


def repaired_from_trials_alone(hands: Hands) -> None:
    """What no trial has recorded is not silently another value."""
    from ekd_ray.studies.repair import repair_study

    out = study(hands)
    (out / "study.yaml").unlink()
    (out / "optuna.journal").unlink()
    with pytest.warns(UserWarning, match="defaults") as said:
        done = repair_study(out)
    assert "damaged" not in done, "there was none to keep"
    text = " ".join(str(warning.message) for warning in said)
    assert "trials" in text and "fingerprints" in text


def repair_refused(damage: str, words: str) -> Callable[[Hands], None]:
    def hand_in(hands: Hands) -> None:
        from ekd_ray.studies.repair import repair_study

        out = study(hands)
        (out / "study.yaml").write_text("")
        (out / "optuna.journal").unlink()
        if damage == "no trials":
            shutil.rmtree(out / "trials")
        lock = FileLock(out / ".lock")
        if damage == "held":
            lock.acquire()
        try:
            with pytest.raises(UserError, match=words):
                repair_study(out)
        finally:
            lock.release()
        assert (out / "study.yaml").read_text() == ""

    return hand_in


def repair_of_a_whole_one(hands: Hands) -> None:
    from ekd_ray.studies.repair import repair_study

    out = study(hands)
    before = (out / "study.yaml").read_bytes()
    assert "nothing to repair" in repair_study(out)
    assert (out / "study.yaml").read_bytes() == before


def repair_without_resume(hands: Hands) -> Answer:
    return hands.launch("tune", "--repair", "--out", study(hands))


def repair_and_plan(hands: Hands) -> Answer:
    out = study(hands)
    cut_to(0.5)(out)
    return hands.launch("tune", "--resume", "--repair", "--dry-run", "--out", out)


def held(*command: str) -> Callable[[Hands], Answer]:
    """Another process runs the study: nothing in its folder changes."""

    def hand_in(hands: Hands) -> Answer:
        out = study(hands)
        with FileLock(out / ".lock"):
            before = _state(out)
            answer = hands.launch("tune", *command, "--out", out)
            assert _state(out) == before
        return answer

    return hand_in


def with_record(text: str) -> Callable[[Hands], Answer]:
    def hand_in(hands: Hands) -> Answer:
        out = study(hands)
        (out / "trials" / "0001" / RESULT).write_text(text)
        return hands.launch("show", out)

    return hand_in


def without_table(hands: Hands) -> Answer:
    out = study(hands)
    (out / "trials.parquet").unlink(missing_ok=True)
    Study.load(out).write_tables()
    assert (out / "trials.parquet").exists()
    (out / "trials.parquet").write_bytes(b"PAR1")
    return hands.launch("show", out)


def without_checksum(*command: str, **changed: object) -> Callable[[Hands], Answer]:
    """As an older release wrote it, or somebody who has changed a setting of it."""

    def hand_in(hands: Hands) -> Answer:
        out = study(hands)
        values = yaml.safe_load((out / "study.yaml").read_text())
        del values["checksum"]
        values["study"]["distill"] |= changed
        (out / "study.yaml").write_text(yaml.safe_dump(values))
        before = _state(out)
        name, *flags = command
        answer = hands.launch(name, *flags, out)
        assert _state(out) == before
        assert ("by hand" in answer.text) == ("weight_decay" in changed)
        return answer

    return hand_in


def trials_alone(*command: str) -> Callable[[Hands], Answer]:
    """The study's file is gone."""

    def hand_in(hands: Hands) -> Answer:
        out = study(hands)
        (out / "study.yaml").unlink()
        before = _state(out)
        name, *flags = command
        answer = hands.launch(name, *flags, out)
        assert _state(out) == before
        return answer

    return hand_in


def repaired_twice(hands: Hands) -> None:
    from ekd_ray.studies.repair import repair_study

    out, kept = study(hands), []
    for share in (0.9, 0.5, 0.0):
        cut_to(share)(out)
        kept.append((out / "study.yaml").read_bytes())
        repair_study(out)
    names = [f"study.yaml.damaged{end}" for end in ("", ".2", ".3")]
    assert [(out / name).read_bytes() for name in names] == kept


def records_have_versions(hands: Hands) -> None:
    import torch

    for run in Study.load(study(hands)).records():
        assert run.environment is not None
        packages = run.environment["packages"]
        assert packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert {"ray", "optuna", "ekd_ray"} <= packages.keys()


def versions(refused: bool, **there: str) -> Callable[[Hands], None]:
    def hand_in(hands: Hands) -> None:
        here = {"packages": {"ekd_ray": "0.3.1", "torch": "2.9.0", "ray": "2.50", "optuna": "5.0"}}
        found = {"packages": {**here["packages"], **there}}
        (old,) = there.values()
        if refused:
            with pytest.raises(UserError, match=f"instead of {old}.*--accept-versions"):
                check_versions(hands.folder, found, here)
        with pytest.warns(UserWarning, match=f"instead of {old}"):
            check_versions(hands.folder, found, here, accept=refused)

    return hand_in


def folder_in_a_file(hands: Hands) -> None:
    (hands.folder / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        open_run(hands.folder / "file" / "run", Study.load(_template()).config, resume=False)
    assert os.listdir(hands.folder) == ["file"]


def folder_is_a_fifo(hands: Hands) -> Answer:
    os.mkfifo(hands.folder / "fifo")
    return hands.launch("tune", "--dataset", "digits", "--pair", "resnet20-resnet8", "--dry-run",
                        "--out", hands.folder / "fifo")  # fmt: skip


CASES = [
    *(
        Case(KIND, f"study.yaml cut to {share:.0%}: {command[0]}", cut(share, *command), 2,
             ("study.yaml", "--repair", "lost"))
        for share, command in (
            (0.0, ("show",)), (0.02, ("show",)), (0.3, ("show",)), (0.6, ("show",)),
            (0.99, ("show",)), (0.6, ("report",)), (0.6, ("tune", "--resume", "--out")),
            (0.6, ("compare",)),
        )
    ),
    Case(KIND, "a value changed by hand", changed_by_hand, 2, ("checksum", "remove its line")),
    Case(KIND, "of an older release, without a checksum", without_checksum("show"), 0, ("trial",)),
    Case(KIND, "a value and the checksum changed by hand: show",
         without_checksum("show", weight_decay=0.003), 0, ("by hand", "fingerprint", "trial")),
    Case(KIND, "a value and the checksum changed by hand: --resume",
         without_checksum("tune", "--resume", "--out", weight_decay=0.003), 2,
         ("by hand", "fingerprint", "put them back")),
    Case(KIND, "a value that decides nothing, without checksum",
         without_checksum("show", decode_threads=3), 0, ("trial",)),
    *(
        Case(KIND, f"trials without a study.yaml: {' '.join(command)}", trials_alone(*command), 2,
             ("study.yaml is missing", "--repair"))
        for command in (("show",), ("report",), ("tune", "--resume", "--out"),
                        ("tune", "--dataset", "digits", "--student", "resnet8", "--method", "none",
                         "--out"))
    ),
    Case(KIND, "repair: again and again", repaired_twice, None),
    Case(KIND, "repair: cut at once", repaired(cut_to(0.0)), None),
    Case(KIND, "repair: cut in its middle", repaired(cut_to(0.5)), None),
    Case(KIND, "repair: zeros", repaired(zeros), None),
    Case(KIND, "repair: file and journal are missing", repaired_from_trials_alone, None),
    Case(KIND, "repair: the file is missing", repaired(without_file), None),
    Case(KIND, "repair: no journal either", repaired(without_journal, same=False), None),
    Case(KIND, "repair: no trial either", repair_refused("no trials", "no whole trial"), None),
    Case(KIND, "repair: another process runs it", repair_refused("held", "another process"), None),
    Case(KIND, "repair: it is whole", repair_of_a_whole_one, None),
    Case(KIND, "repair: without --resume", repair_without_resume, 2, ("--resume",)),
    Case(KIND, "repair: goes on at once", repair_and_plan, 0, ("rebuilt", "resnet8")),
    Case(KIND, "two processes: --resume", held("--resume"), 2, ("another process",)),
    Case(KIND, "two processes: no --resume", held("--dataset", "digits", "--student", "resnet8",
         "--method", "none"), 2, ("holds a study already",)),
    Case(KIND, "an empty result.json", with_record(""), 0, ("result.json", "damaged")),
    Case(KIND, "a cut result.json", with_record('{"status": "comp'), 0, ("result.json",)),
    Case(KIND, "trials.parquet is missing, or none", without_table, 0, ("trial",)),
    Case(KIND, "records have the versions that made them", records_have_versions, None),
    Case(KIND, "another ekd_ray", versions(True, ekd_ray="0.2.9"), None),
    Case(KIND, "another patch of ekd_ray", versions(False, ekd_ray="0.3.0"), None),
    Case(KIND, "another torch", versions(True, torch="1.13.1"), None),
    Case(KIND, "another Ray", versions(False, ray="2.40"), None),
    Case(KIND, "another Optuna", versions(False, optuna="4.1"), None),
    Case(KIND, "a FIFO where a folder belongs", folder_is_a_fifo, 2, ("holds no study",)),
    Case(KIND, "a folder below a file", folder_in_a_file, None),
]  # fmt: skip
