"""What is handed on (weights, bundle, card, report, programs) names no folder of this machine."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import write_miniature
from report_studies import BASE, final, select

from ekd_ray.config import DistillConfig
from ekd_ray.config.phrases import hide_folders
from ekd_ray.engine.distill import TrainedStudent, distill
from ekd_ray.engine.final import save_student
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, save_weights
from ekd_ray.results import Bundle, Study, export_bundle
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import RunRecord
from ekd_ray.results.report import write_report

HOME = "canary-home"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user, with pictures and a teacher's weights."""
    folder = tmp_path_factory.mktemp("root") / HOME
    write_miniature(folder / "data" / "pets", classes=2, train_per_class=12, test_per_class=4,
                    size=32)  # fmt: skip
    torch.manual_seed(0)
    save_weights(
        build_model("resnet8", 2), folder / "teacher.safetensors", model_name="resnet8",
        num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3, log_prior=-0.75,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained(home: Path, make_study: Any) -> tuple[Study, TrainedStudent]:
    """A study of that user with a winner and a failed trial, and what its final run gave."""
    maker = make_study(home / "runs" / "pets-study")
    base = BASE.replace(
        dataset=f"folder:{home / 'data' / 'pets'}", ood_dataset="synthetic",
        train_subset=None, image_size=32, epochs=1, teacher_cache="off", decode_threads=1,
        validation_fraction=0.25,
    )  # fmt: skip
    teacher = str(home / "teacher.safetensors")
    run = resolve(with_method(base, "ekd", teacher="resnet8", teacher_weights=teacher, seed=1))
    study = maker.study(distill=run, data_root=str(home / "data"), confirm_seeds=1)
    maker.trial(0, [0.5], lr=0.1)
    maker.trial(1, [0.4], lr=0.2, status="failed", reason=f"cannot read {home}/data/pets: gone.")
    whole = run.replace(validation_fraction=0.0)
    folder = maker.path / "confirm" / f"final-{whole.fingerprint()}"
    result = distill(whole, out=folder, threads=1)
    record = RunRecord(folder=folder, stage=RunStage.FINAL, name="trial 0", config=whole.to_dict())
    metrics = finish_run(record, result, data_root=None).metrics
    relative = str(folder.relative_to(maker.path))
    maker.confirm([
        select("trial 0", 1, 0.5, run), select("none", 1, 0.4, base.replace(seed=1)),
        final("trial 0", 1, metrics["test_top1"], whole, relative),
        final("none", 1, 0.1, base.replace(seed=1, validation_fraction=0.0)),
    ])  # fmt: skip
    return study, result


def contents(path: Path) -> bytes:
    """The bytes of a file, of an archive (model.pt2) those of its members."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(name.encode() + archive.read(name) for name in archive.namelist())


def check_no_paths(folder: Path, home: Path) -> list[str]:
    """The names of a folder's files, none of which says where anything lies here."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    package = str(Path(save_student.__code__.co_filename).parents[2])
    for path in files:
        found = contents(path)
        for word in (HOME, str(home.parent), str(Path.home()), package):
            assert word.encode() not in found, f"{path.name} names {word}"
    return sorted(path.name for path in files)


def test_nothing_that_is_handed_on_names_a_folder(trained, home, tmp_path, monkeypatch) -> None:
    study, _ = trained
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "handed on"
    bundle = export_bundle(study, out / "best")
    page = write_report(Study.load(study.path), out / "index.html").read_text()
    assert "gone" in page, "the reason of the failed trial is there"
    names = check_no_paths(out, home)
    assert {"model.safetensors", "distill.yaml", "README.md", "MANIFEST", "index.html"} < {*names}
    assert bundle.config.dataset == "folder:pets" and bundle.config.teacher_weights is None


@pytest.mark.slow  # the exporters take long
def test_neither_do_programs(trained, home, tmp_path) -> None:
    export_bundle(trained[0], tmp_path / "best", formats=("pt2", "onnx"))
    assert {"model.pt2", "model.onnx"} < {*check_no_paths(tmp_path / "best", home)}


def test_equal_tensors_have_equal_checksums(trained, home, tmp_path) -> None:
    """Whoever trained them, from wherever."""
    _, result = trained
    moved = tmp_path / "elsewhere" / "pets"
    moved.parent.mkdir()
    moved.symlink_to(home / "data" / "pets")
    other = result.config.replace(
        dataset=f"folder:{moved}", teacher_weights="/other/teacher", decode_threads=2,
        teacher_cache="on",
    )  # fmt: skip
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, config in zip(files, (result.config, other), strict=True):
        save_student(replace(result, config=config), path, data_root=None)
    assert sha256_file(files[0]) == sha256_file(files[1])


def test_a_bundle_finds_its_pictures_again(trained, home, tmp_path) -> None:
    study, _ = trained
    inside = export_bundle(study, study.path / "best")
    found = inside.evaluate()
    assert found["test_top1"] == inside.metrics["model"]["test_top1"], "by the study around it"
    moved = inside.path.rename(tmp_path / "best")
    bundle = Bundle.load(moved)
    with pytest.raises(UserError, match="--dataset folder:PATH"):
        bundle.evaluate()
    own = f"folder:{home / 'data' / 'pets'}"
    assert bundle.evaluate(dataset=own) == found
    assert bundle.verify(evaluate=True, dataset=own).ok


@pytest.mark.parametrize(
    ("text", "shown"),
    [("cannot read /home/me/data/pets: gone", "cannot read .../pets: gone"),
     ("'/home/me/x.py' and folder:/home/me/pets", "'.../x.py' and folder:.../pets"),
     ("https://there.example/a/b, 1/2 of a/b/c", "https://there.example/a/b, 1/2 of a/b/c")],
)  # fmt: skip
def test_of_a_path_the_last_part_is_shown(text: str, shown: str) -> None:
    assert hide_folders(text) == shown


def test_places_are_left_out_of_a_run() -> None:
    run = DistillConfig(dataset="folder:/home/me/pets/", ood_dataset="hf:/home/me/other",
                        teacher_weights="/home/me/t.pt", lr=0.1)  # fmt: skip
    public = run.without_places()
    assert "/" not in public.to_yaml() and public.lr == 0.1
    assert (public.dataset, public.ood_dataset) == ("folder:pets", "hf:other")
    assert DistillConfig().without_places() == DistillConfig()
