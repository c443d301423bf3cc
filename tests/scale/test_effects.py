"""Each setting does what its `effect` says: tried by running it, and by resuming with it."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import search_runs
import yaml
from chaos_marks import IN_CHAOS
from miniature import write_miniature
from safetensors.torch import load_file

from ekd_ray.cli.main import command_parser
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.settings import Settings
from ekd_ray.engine.distill import TrainedStudent, distill
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.gpu_share import share_of_gpu
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.teacher.fill import fill_tables
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.losses.methods import with_method
from ekd_ray.results import Study
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study_file import read_study_file, write_study_file
from ekd_ray.results.words import describe_choice
from ekd_ray.scale.worker import TrainOptions, train_run
from ekd_ray.studies import pipeline
from ekd_ray.studies.overlay import count_extended
from ekd_ray.studies.pipeline import check_study, check_unchanged, open_run, run_study
from ekd_ray.studies.training import check_run_folder

TINY = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", train_subset=80, batch_size=16,
    validation_fraction=0.4, epochs=2, precision="float32",
)  # fmt: skip
SPACE = {"lr": {"low": 0.01, "high": 0.1}}
# Other values of what is free.
FREE_IN_STUDY: dict[str, Any] = {
    "trials": 9, "budget_epochs": 10**6, "budget_hours": 1e3, "budget_gpu_hours": 1e3,
    "stop_below": 1e-9,
    "teacher_fill": "lazy", "track": "mlflow", "data_root": "/nowhere", "max_concurrent": 3,
    "limit_gpu_memory": False, "recipe_name": "mine",
}  # fmt: skip
FREE_IN_RUN = (
    "teacher_weights", "student_weights", "teacher_cache", "decode_threads", "fitted",
    "check_images", "min_teacher_accuracy",
)  # fmt: skip


def names_of(kind: type[Settings], effect: str) -> set[str]:
    return {field.name for field in kind.fields() if field.metadata["effect"] == effect}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    train_teacher(teacher_config(TINY.replace(epochs=1), "resnet8", {}), path, threads=1)
    return path


def taught(teacher: Path, **changes: Any) -> DistillConfig:
    values = {"teacher": "resnet8", "teacher_weights": str(teacher), **changes}
    return with_method(TINY, "ekd", **values)


def bits(result: TrainedStudent) -> tuple[Any, Any]:
    """The rows of its epochs without their times, and its weights and buffers."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    return rows, {name: value.tolist() for name, value in result.model.state_dict().items()}


# What is free changes no result.


def test_the_free_settings_are_those_that_are_tried() -> None:
    assert names_of(StudyConfig, "free") == {*FREE_IN_STUDY}
    assert names_of(DistillConfig, "free") == {*FREE_IN_RUN}


@pytest.mark.quick_ids("decode_threads", "teacher_cache", "fitted")
@pytest.mark.parametrize("name", FREE_IN_RUN)
def test_a_free_setting_of_a_run_changes_no_bit(
    name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    config, values = taught(teacher).replace(epochs=1), ("auto", 3)
    if name in ("teacher_weights", "student_weights"):
        values = (str(teacher), str(shutil.copy(teacher, tmp_path / "elsewhere.safetensors")))
    elif name == "teacher_cache":
        values = ("off", "on")
    elif name == "min_teacher_accuracy":
        values = (None, 0.5)
    elif name == "fitted":
        values = ((), ("lr 0.1",))
    elif name == "check_images":
        values = (False, True)
    else:
        write_miniature(tmp_path, classes=4, train_per_class=12, test_per_class=1, size=32)
        (tmp_path / "val").rename(tmp_path / "test")
        places = {"dataset": f"folder:{tmp_path}", "train_subset": None}
        config = TINY.replace(**places, image_size=32, augment="resized_crop", epochs=1)
    runs = [resolve(config.replace(**{name: value})) for value in values]
    first, *others = (bits(distill(run, threads=1)) for run in runs)
    assert all(other == first for other in others)
    assert len({run.fingerprint() for run in runs}) == 1


def test_the_free_settings_of_a_study_change_no_run_and_no_suggestion(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    base = resolve(taught(teacher, teacher_cache="on"))
    found = []
    for number, changes in enumerate(({}, FREE_IN_STUDY)):
        config = search_runs.study_of("tpe", trials=4, gpus_per_trial=0.0).replace(**changes)
        monkeypatch.setattr("ekd_ray.engine.teacher.source._tables", {})
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        if config.teacher_fill == "eager":
            assert fill_tables(base, data_root=None, seeds=[0], threads=1)
        run = RunRecord(folder=tmp_path / f"{number}" / "trials" / "0000", name="trial 0",
                        stage=RunStage.SEARCH, number=0, config=base.to_dict())  # fmt: skip
        options = TrainOptions.of_study(config, tmp_path)
        with share_of_gpu(0.0, limited=config.limit_gpu_memory):
            result = train_run(run, lambda row: None, options=options)
        assert result is not None
        (search := tmp_path / f"search {number}").mkdir()
        ran = search_runs.run(search, config, 4, at_once=1)
        found.append((bits(result), ran))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@IN_CHAOS
def test_a_study_with_all_free_settings_changed_has_the_same_runs(
    teacher: Path, tmp_path: Path
) -> None:
    """On Ray: other processes, another order, one trial more."""
    elsewhere = shutil.copy(teacher, tmp_path / "elsewhere.safetensors")
    runs = {
        "as it is": {"trials": 2, "max_concurrent": 1},
        "changed": {
            **FREE_IN_STUDY,
            "trials": 3,
            "max_concurrent": 2,
            "track": None,
            "budget_gpu_hours": None,
        },  # there is no GPU
    }
    shared = {"as it is": taught(teacher), "changed": taught(elsewhere, teacher_cache="off",
                                                             decode_threads=3)}  # fmt: skip
    for name, changes in runs.items():
        config = StudyConfig(
            distill=shared[name], space=SPACE, sampler="random", scheduler="none", confirm_top_k=1,
            confirm_seeds=1, baselines=["none"], champions=["defaults"], **changes,
        )  # fmt: skip
        run_study(open_run(tmp_path / name, check_study(config), resume=False), Mock())
    first, second = (Study.load(tmp_path / name) for name in runs)
    for one, other in zip(first.records(), second.records(), strict=False):
        assert (one.params, one.status, one.number) == (other.params, other.status, other.number)
        rows = [[{**row, "seconds": 0} for row in run.history] for run in (one, other)]
        assert rows[0] == rows[1]
    assert len(first.records()) == 2 and len(second.records()) == 3
    finals = [{run.name: run for run in study.confirm_runs if run.stage is RunStage.FINAL}
              for study in (first, second)]  # fmt: skip
    for name in ("none", "defaults"):
        ours, theirs = (load_file(found[name].folder / WEIGHTS) for found in finals)
        assert all(ours[key].equal(theirs[key]) for key in ours), name


# What is identity or pinned is refused where a study or a run is resumed.


def another(value: Any, field: dataclasses.Field[Any]) -> Any:
    """A value of another sort, as good as any: what compares settings does not check them."""
    return 0.0 if field.name == "gpus_per_trial" else "another" if value != "another" else "third"


@pytest.mark.parametrize("kind", [DistillConfig, StudyConfig])
def test_every_setting_that_is_not_free_is_compared_with_both_values(kind: type[Settings]) -> None:
    for field in kind.fields():
        if field.name == "distill":
            continue
        there, here = kind(), kind()
        value = getattr(there, field.name)
        if field.metadata["neutral"] == value and field.metadata["effect"] == "pinned":
            value = "known"  # at its neutral value it pins nothing
            object.__setattr__(there, field.name, value)
        object.__setattr__(here, field.name, another(value, field))
        changed = there.changes(here)
        assert (field.name in changed) == (field.metadata["effect"] != "free"), field.name
        if changed:
            old, new = changed[field.name]
            assert old != new == another(value, field)


PINNED = {
    "cpus_per_trial": (1, 2), "optuna_storage": (None, "sqlite:///other.db"),
    "gpus_per_trial": (0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
@pytest.mark.parametrize("turned", [False, True])
def test_a_study_is_not_resumed_under_another_pinned_setting(
    name: str, turned: bool, tmp_path: Path
) -> None:
    old, new = reversed(PINNED[name]) if turned else PINNED[name]
    begun = StudyConfig(distill=TINY, space=SPACE, **{name: old})
    open_run(tmp_path / "run", begun, resume=False)
    before = (tmp_path / "run" / "study.yaml").read_bytes()
    texts = ["the journal in the folder" if value is None else value for value in (old, new)]
    with pytest.raises(UserError, match="{} is {} there and {} here".format(name, *texts)):
        open_run(tmp_path / "run", begun.replace(**{name: new}), resume=True)
    assert (tmp_path / "run" / "study.yaml").read_bytes() == before
    open_run(tmp_path / "run", begun.replace(trials=99), resume=True)


def test_a_journal_study_is_not_continued_in_a_database_by_the_command(launch, tmp_path) -> None:
    begun = check_study(StudyConfig(distill=TINY, space=SPACE))
    open_run(tmp_path / "run", begun, resume=False)
    url = f"sqlite:///{tmp_path / 'other.db'}"
    code, _, err = launch("tune", "--resume", "--out", "run", "--optuna-storage", url)
    assert code == 2 and "the journal in the folder there" in err and "Traceback" not in err


def test_another_share_of_a_gpu_is_no_other_study(tmp_path: Path) -> None:
    begun = StudyConfig(distill=TINY, space=SPACE)
    for share in (0.25, 1.0, "auto"):
        check_unchanged(tmp_path, begun, begun.replace(gpus_per_trial=share))


def test_the_softmax_teacher_of_a_study_stays_the_same_file(teacher: Path, tmp_path: Path) -> None:
    paths = [
        tmp_path / name for name in ("one.safetensors", "moved.safetensors", "two.safetensors")
    ]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        plain = teacher_config(TINY.replace(epochs=1), "resnet8", {"method": "none", "seed": seed})
        train_teacher(plain, path, threads=1)
    studies = [
        check_study(
            StudyConfig(
                distill=taught(teacher), space=SPACE, baselines=["ekd-softmax"],
                softmax_teacher_weights=str(path),
            )
        )
        for path in paths
    ]  # fmt: skip
    one, moved, two = studies
    assert one.softmax_teacher_sha256 == sha256_file(paths[0])
    open_run(tmp_path / "run", one, resume=False)
    open_run(tmp_path / "run", moved, resume=True)
    with pytest.raises(UserError, match="softmax_teacher_sha256 is "):
        open_run(tmp_path / "run", two, resume=True)
    header = yaml.safe_load((tmp_path / "run" / "study.yaml").read_text())
    del header["checksum"], header["study"]["softmax_teacher_sha256"]  # as older releases wrote it
    (tmp_path / "run" / "study.yaml").write_text(yaml.safe_dump(header))
    open_run(tmp_path / "run", one, resume=True)


def test_a_single_run_keeps_its_pinned_settings_too(tmp_path: Path) -> None:
    config = TINY.replace(deterministic=False)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    check_run_folder(tmp_path, config.replace(decode_threads=3), resume=True)
    with pytest.raises(UserError, match="deterministic is False there and True here"):
        check_run_folder(tmp_path, config.replace(deterministic=True), resume=True)


def test_an_extension_that_was_killed_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, with --resume --extend 3 in it, goes on with the same trials."""
    config, header = StudyConfig(distill=TINY, space=SPACE, trials=4), tmp_path / "study.yaml"
    open_run(tmp_path, config, resume=False)
    assert count_extended(header, 3) == 7
    for _ in range(3):  # killed, and killed again
        open_run(tmp_path, config.replace(trials=7), resume=True)
        assert count_extended(header, 3) == 7
    with pytest.warns(UserWarning, match="from 4 to 7 .*--trials 9"):
        assert count_extended(header, 2) == 7, "what is recorded is the target"
    open_run(tmp_path, config.replace(trials=9), resume=True)  # --trials 9
    assert yaml.safe_load(header.read_text())["extended_from"] == 4
    assert count_extended(header, 5) == 9
    open_run(tmp_path, config.replace(trials=7), resume=True)
    monkeypatch.setattr("ekd_ray.studies.pipeline._run_stages", Mock())
    run_study(Study.load(tmp_path), Mock())
    assert count_extended(header, 3) == 10, "it has come to its end"


def test_an_extension_after_test_figures_were_shown_is_told_for_good(tmp_path: Path) -> None:
    config = StudyConfig(distill=TINY, space=SPACE, trials=4)
    open_run(tmp_path, config, resume=False)
    open_run(tmp_path, config.replace(trials=5), resume=True)
    assert "tested_at" not in Study.load(tmp_path).header, "none were shown"
    pipeline._end_extension(tmp_path)
    (tmp_path / "confirm.parquet").touch()
    for _ in range(2):
        open_run(tmp_path, config.replace(trials=7), resume=True)
    pipeline._end_extension(tmp_path)
    open_run(tmp_path, config.replace(trials=7), resume=True)
    tested = Study.load(tmp_path).header["tested_at"]
    assert tested == [5]
    assert "once" in describe_choice(()) and "winner of 5 trials" in describe_choice(tested)


# What changes with the machine is said.


def test_another_machine_is_said(tmp_path: Path) -> None:
    config = StudyConfig(distill=TINY, space=SPACE)
    open_run(tmp_path, config, resume=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(tmp_path, config, resume=True)
    header = yaml.safe_load((tmp_path / "study.yaml").read_text())
    header["environment"]["packages"] |= {"torch": "2.0.9", "ray": "2.0", "optuna": "3.0"}
    write_study_file(tmp_path, header)
    with pytest.warns(UserWarning, match="goes on with") as said:
        open_run(tmp_path, config, resume=True)
    told = " ".join(str(one.message) for one in said)
    assert all(f"instead of {old}" in told for old in ("2.0.9", "2.0", "3.0"))


@pytest.mark.parametrize("name", ["ekd_ray", "torch"])
def test_versions_that_do_not_compare_are_refused_unless_accepted(
    tmp_path: Path, name: str
) -> None:
    config = StudyConfig(distill=TINY, space=SPACE)
    open_run(tmp_path, config, resume=False)
    header = read_study_file(tmp_path / "study.yaml").values
    header["environment"]["packages"][name] = "99.1"
    write_study_file(tmp_path, header)
    before = (tmp_path / "study.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"{name} .*99\.1.*--accept-versions"):
        open_run(tmp_path, config, resume=True)
    assert (tmp_path / "study.yaml").read_bytes() == before
    with pytest.warns(UserWarning, match=rf"{name} .* instead of 99\.1"):
        open_run(tmp_path, config, resume=True, accept_versions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(tmp_path, config, resume=True)  # from here on it is of these versions


@pytest.mark.slow
def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        distill(TINY, out=tmp_path, threads=1, checkpoint_seconds=0, on_epoch=stop)
    with pytest.warns(UserWarning, match="threads 2 instead of 1"):
        distill(TINY, out=tmp_path, threads=2)


# Flags that reach a run and are no settings of it: each acts through settings, or is free.
THROUGH_SETTINGS = {
    *("pair", "pairs", "methods", "recipe", "set", "teacher_zoo", "extend", "warm_start"),
    *("model", "evidential", "seeds", "candidates", "candidate_count", "choose_by", "config"),
}
FREE_FLAGS = {"address", "download", "keep_ray_logs", "plugin", "trust_plugins", "out", "resume",
              "test", "repair", "accept_versions"}  # fmt: skip
SAID = {"workers"}  # of a single run, which may have MIN:MAX of them: see the conditions above
SHOWING = {
    "assume",
    "dry_run",
    "quiet",
    "json",
    "help",
    "help_all",
    "list_settings",
    "require_gain",
}


@pytest.mark.parametrize("command", ["tune", "distill", "train-teacher"])
def test_every_flag_is_a_setting_or_known_to_change_no_run(command: str) -> None:
    flags = {action.dest for action in command_parser(command)._actions}
    settings = {*StudyConfig.names(), *DistillConfig.names()}
    assert flags - settings <= THROUGH_SETTINGS | FREE_FLAGS | SAID | SHOWING
