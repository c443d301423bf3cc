"""A bundle's run trained again: the verdict, and where the two parted first."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from filelock import FileLock
from safetensors import safe_open

from ekd_ray.engine.data_pin import pin_data
from ekd_ray.engine.environment import same_arithmetic
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.errors import UserError
from ekd_ray.models import build_model, save_weights
from ekd_ray.results import Bundle, Study, export_bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.report import list_commands, write_report
from ekd_ray.results.reproduce import (
    _elsewhere,
    default_tolerance,
    first_difference,
    prepare,
    promise,
    reproduce,
)
from ekd_ray.studies.pipeline import check_study


@pytest.fixture(scope="module")
def teacher(winner_config):
    return winner_config.teacher_weights


def again(bundle, teacher, out, **options):
    bundle = Bundle.load(bundle.path)
    config = prepare(bundle, teacher_weights=teacher)
    return reproduce(bundle, config, out, **options)


def forge(bundle, name, change):
    """Change a file's text as a forger would, who makes the manifest agree."""
    path = bundle.path / name
    path.write_text(change(path.read_text()))
    write_manifest(bundle.path, FILES)


def change_lr(bundle, lr):
    forge(bundle, "distill.yaml", lambda text: yaml.safe_dump({**yaml.safe_load(text), "lr": lr}))


def test_the_same_machine_gives_the_same_bits(exported, teacher, tmp_path):
    seen = []
    with cpu_threads(exported.environment()["threads"] + 1):  # of which the run takes no notice
        found = again(exported, teacher, tmp_path / "run", on_epoch=seen.append)
    assert (found.verdict, found.first) == ("bit-identical", None)
    assert found.test_top1 == found.stated == exported.metrics["model"]["test_top1"]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() != b""
    with safe_open(tmp_path / "run" / WEIGHTS, "pt") as own, \
            safe_open(exported.path / WEIGHTS, "pt") as there:  # fmt: skip
        assert all(torch.equal(own.get_tensor(k), there.get_tensor(k)) for k in there.keys())  # noqa: SIM118
    assert [row["epoch"] for row in seen] == [1]
    assert not [line for line in found.elsewhere if not line.startswith("git")]
    assert found.promised == ("within-tolerance" if found.elsewhere else "bit-identical")


# name: (what the bundle recorded, what is not so here, what is promised)
PROMISES = {
    "a CPU": ({"gpus": [], "deterministic": True}, (), "bit-identical"),
    "a CPU, told not to": ({"gpus": [], "deterministic": False}, (), "bit-identical"),
    "a CPU, by an earlier release": ({"gpus": []}, (), "bit-identical"),
    "a GPU": ({"gpus": ["T4"], "deterministic": True}, (), "bit-identical"),
    "a GPU, told not to": ({"gpus": ["T4"], "deterministic": False}, (), "within-tolerance"),
    "a GPU, by an earlier release": ({"gpus": ["T4"]}, (), "within-tolerance"),
    "another machine": ({"gpus": [], "deterministic": True}, ("x: 1, 2",), "within-tolerance"),
}


@pytest.mark.parametrize("name", PROMISES)
def test_bits_are_promised_where_they_repeat(name):
    recorded, elsewhere, expected = PROMISES[name]
    assert promise(recorded, elsewhere) == expected


def test_what_of_a_gpu_is_not_as_it_was(bundle, monkeypatch):
    """How many of a kind there are changes nothing; how float32 is computed does."""
    recorded = bundle.environment()
    gpu = {"gpus": ["T4"], "float32": "ieee"}
    for there, here, expected in (
        (gpu, {**gpu, "gpus": ["T4", "T4"]}, set()),
        (gpu, {**gpu, "gpus": ["A100"]}, {"gpus"}),
        ({"gpus": ["T4"], "float32": None}, gpu, {"float32"}),  # of an earlier release
        ({"gpus": [], "float32": None}, {"gpus": [], "float32": "ieee"}, set()),
    ):
        old, new = {**recorded, **there}, {**recorded, **here}
        monkeypatch.setattr("ekd_ray.results.reproduce.environment", lambda new=new: new)
        found = {line.partition(":")[0] for line in _elsewhere(bundle, old)}
        assert found == expected
        assert same_arithmetic(old, new) == (not expected)


@pytest.mark.parametrize("recorded", [True, False])
def test_it_is_trained_as_deterministically_as_before(
    bundle, teacher, tmp_path, monkeypatch, recorded
):
    """Where it could not be, it need not be tried again."""

    class Asked(Exception):
        pass

    def spy(config, **options):
        raise Asked(config.deterministic)

    monkeypatch.setattr("ekd_ray.results.reproduce.distill", spy)
    text = json.loads((bundle.path / "environment.json").read_text())
    changed = json.dumps({**text, "deterministic": recorded})
    forge(bundle, "environment.json", lambda _: changed)
    with pytest.raises(Asked) as asked:
        again(bundle, teacher, tmp_path / "run")
    assert asked.value.args == (recorded,)


@pytest.mark.parametrize(("deviation", "tolerance"), [(0.0, 0.005), (0.001, 0.005), (0.01, 0.0277)])
def test_two_runs_may_differ_by_what_two_seeds_do(deviation, tolerance):
    """1.96 standard deviations of a difference, and half a point where seeds differ by less."""
    bundle = SimpleNamespace(metrics={"test": {"test_top1": {"sd": deviation}}})
    assert default_tolerance(bundle) == pytest.approx(tolerance, abs=1e-4)


def test_the_recorded_threads_and_seed_are_used(bundle, teacher, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def spy(config, **options):
        raise Asked(
            torch.get_num_threads(), config.seed, config.precision, config.validation_fraction
        )

    monkeypatch.setattr("ekd_ray.results.reproduce.distill", spy)
    text = json.loads((bundle.path / "environment.json").read_text())
    forge(bundle, "environment.json", lambda _: json.dumps({**text, "threads": 7}))
    for options, threads in (({}, 7), ({"threads": 3}, 3)):
        with pytest.raises(Asked) as caught:
            again(bundle, teacher, tmp_path / "run", **options)
        assert caught.value.args == (threads, 1, "float32", 0.0)


def test_what_the_student_starts_from_is_found_by_its_hash(bundle, teacher, tmp_path):
    start = tmp_path / "start.safetensors"
    student, classes = bundle.config.student, len(bundle.class_names)
    save_weights(
        build_model(student, classes), start, model_name=student, num_classes=classes,
        mean=None, std=None,
    )  # fmt: skip
    known = hashlib.sha256(start.read_bytes()).hexdigest()
    forge(bundle, "distill.yaml", lambda text: yaml.safe_dump(
        {**yaml.safe_load(text), "student_sha256": known}))  # fmt: skip
    bundle = Bundle.load(bundle.path)
    with pytest.raises(UserError, match=r"starts from .* is not beside it: give --student-weights"):
        prepare(bundle, teacher_weights=teacher)
    found = prepare(bundle, teacher_weights=teacher, student_weights=str(start))
    assert (found.student_weights, found.student_sha256) == (str(start), known)
    with pytest.raises(UserError, match=f"must be {known}"):
        prepare(bundle, teacher_weights=teacher, student_weights=teacher)


def test_weights_a_rounding_away_are_within_tolerance(bundle, teacher, tmp_path):
    """Every epoch agrees, so that the tensor is where they part first."""
    path = bundle.path / WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = sorted(tensors)[3]
    tensors[name] += 1e-6
    safetensors.torch.save_file(tensors, path, header)
    write_manifest(bundle.path, FILES)
    found = again(bundle, teacher, tmp_path / "run", tolerance=0.0)
    assert found.verdict == "within-tolerance"
    assert found.first is not None and found.first.startswith(f"tensor {name}: largest difference")
    assert 5e-7 < float(found.first.split()[-1]) < 2e-6


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ([{"epoch": 1, "a": 1.0, "b": 2.0, "seconds": 9.0}], None),
        ([{"epoch": 1, "a": 1.0, "b": 2.5}], "epoch 1, b: 2.0 there, 2.5 here"),
        ([{"epoch": 1, "a": 1.0}], "epoch 1, b: 2.0 there, None here"),
        ([], "the number of epochs: 1 there, 0 here"),
    ],
)
def test_histories_are_compared_epoch_by_epoch_but_for_their_time(here, said):
    assert first_difference([{"epoch": 1, "a": 1.0, "b": 2.0, "seconds": 1.0}], here) == said


# What is refused before anything is trained


def test_a_changed_bundle_is_refused(bundle, teacher):
    (bundle.path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"is not as it was exported: README\.md was changed"):
        prepare(Bundle.load(bundle.path), teacher_weights=teacher)


def test_other_test_images_are_refused(bundle, teacher):
    pinned = pin_data(bundle.config, None)
    same = dataclasses.replace(bundle, metrics={**bundle.metrics, "data": pinned})
    prepare(same, teacher_weights=teacher)
    other = {**pinned, "test": {**pinned["test"], "fingerprint": "0" * 16, "images": 9}}
    changed = dataclasses.replace(bundle, metrics={**bundle.metrics, "data": other})
    with pytest.raises(UserError, match=r"test images .*0000' there .*\(9 images there and "):
        prepare(changed, teacher_weights="of other classes.pth")  # which is not to blame


def test_the_teacher_is_found_by_its_hash(bundle, teacher, tmp_path):
    with pytest.raises(UserError, match=r"beside it: give --teacher-weights .*teacher_weights"):
        prepare(bundle)
    own = {**bundle.metrics, "teacher": {"candidates": 1}}
    with pytest.raises(UserError, match=r"it is teacher/teacher\.safetensors"):
        prepare(dataclasses.replace(bundle, metrics=own))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "other.safetensors").write_bytes(b"another teacher")
    with pytest.raises(UserError, match="is not beside it"):
        prepare(bundle)
    shutil.copyfile(teacher, tmp_path / "teacher" / "teacher.safetensors")
    assert prepare(bundle).teacher_weights == str(tmp_path / "teacher" / "teacher.safetensors")


def test_the_teacher_that_the_study_was_given_is_found(exported, real_study, winner_config):
    """The bundle in its study's folder, whose study.yaml names the teacher's file."""
    study = real_study[0].path
    shutil.copytree(exported.path, study / "best")
    header = yaml.safe_load((study / "study.yaml").read_text())
    before = json.dumps(header)
    try:
        header.pop("checksum", None)
        header["study"]["distill"]["teacher_weights"] = winner_config.teacher_weights
        (study / "study.yaml").write_text(yaml.safe_dump(header))
        found = prepare(Bundle.load(study / "best"))
        assert found.teacher_weights == winner_config.teacher_weights
    finally:
        shutil.rmtree(study / "best")
        (study / "study.yaml").write_text(yaml.safe_dump(json.loads(before)))


def test_another_teacher_is_refused(bundle, teacher, tmp_path):
    with open(teacher, "rb") as file:
        content = bytearray(file.read())
    content[-1] ^= 1
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not the teacher of this configuration"):
        prepare(bundle, teacher_weights=str(tmp_path / "t.safetensors"))


# The launcher


@pytest.mark.slow
def test_the_commands_of_the_report_can_be_pasted(launch, copied_study, winner_config, monkeypatch):
    """In the study's folder, as the page says; what would compute for long as far as its plan."""
    file = copied_study.path / "study.yaml"
    written = yaml.safe_load(file.read_text())
    (copied_study.path / "teacher").mkdir()
    shutil.copy(winner_config.teacher_weights, copied_study.path / "teacher" / "a.safetensors")
    searched = copied_study.config.replace(space={"lr": {"low": 0.01, "high": 0.1}})
    written["study"] = check_study(searched).to_dict()
    file.write_text(yaml.safe_dump(written))
    copied_study = Study.load(copied_study.path)
    export_bundle(copied_study, copied_study.path / "best")
    page = write_report(copied_study).read_text(encoding="utf-8")
    monkeypatch.chdir(copied_study.path)
    commands = list_commands(copied_study)
    assert {shlex.split(line)[1] for _, line in commands} == {"show", "tune", "export", "reproduce"}
    for purpose, line in commands:
        assert f"# {html.escape(purpose)}\n{html.escape(line)}\n" in page.replace("&#39;", "&#x27;")
        _, name, *arguments = shlex.split(line)
        dry = [] if name == "show" else ["--dry-run"]
        code, out, err = launch(name, *arguments, *dry)
        assert code == 0 and out, f"{line}: {err}"
        if "--extend" in arguments:
            assert f"{copied_study.config.trials + copied_study.config.half_more} trials" in out


def test_the_launcher_says_the_verdict_and_its_exit_code(launch, bundle, teacher, tmp_path):
    given = (bundle.path, "--teacher-weights", teacher)
    code, out, _ = launch("reproduce", *given, "--json", "--out", tmp_path / "a")
    assert code == 0
    assert json.loads(out)["verdict"] == "bit-identical"
    assert json.loads((tmp_path / "a" / "reproduction.json").read_text())["first"] is None
    code, _, err = launch("reproduce", *given, "--out", tmp_path / "a")
    assert code == 2 and "holds this run already: add --resume" in err
    change_lr(bundle, 0.05 * (1 + 1e-6))
    code, out, _ = launch("reproduce", *given, "--exact", "--quiet", "--out", tmp_path / "b")
    assert (code, out) == (1, "within-tolerance\n")
    change_lr(bundle, 1e-5)
    code, out, _ = launch(
        "reproduce", *given, "--tolerance", "0.001", "--threads", 1, "--out", tmp_path / "c"
    )
    assert code == 1
    assert out.startswith("different\nfirst difference: epoch 1, lr: 0.05 there, 1e-05 here\n")
    code, out, err = launch("reproduce", tmp_path / "nothing")
    assert code == 2 and "there is no folder" in err
    with FileLock(tmp_path / "a" / ".lock"):
        code, out, err = launch("reproduce", *given, "--resume", "--out", tmp_path / "a")
    assert code == 2 and "is being run by another process" in err
    code, out, err = launch("reproduce", bundle.path, "--tolerance", 5)
    assert code == 2 and "--tolerance must be >= 0 and < 1, a fraction, got 5." in err


def test_export_launcher_takes_formats(launch, real_study, tmp_path):
    study = real_study[0].path
    code, out, err = launch("export_best", study, "--out", tmp_path / "b", "--normalized-input")
    assert code == 2 and "add --format pt2,onnx" in err
    code, out, _ = launch(
        "export_best", study, "--out", tmp_path / "b", "--format", "pt2", "--json"
    )
    assert code == 0
    assert (tmp_path / "b" / "model.pt2").is_file()
    assert json.loads(out)["ok"] is True
