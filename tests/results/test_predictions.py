"""The files that the one reading of the test split and a confirm run leave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ekd_ray.config.normalization import parse_normalization
from ekd_ray.data import normalize
from ekd_ray.engine import final as evaluation
from ekd_ray.engine import rundata
from ekd_ray.engine.measure.gallery import FILE as GALLERY
from ekd_ray.engine.measure.gallery import MOST_SHOWN, SIDE, Gallery, shrink_images
from ekd_ray.engine.measure.predictions import LOGIT_VALUES, Predictions, kept_images
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.losses.dirichlet import log_expectation
from ekd_ray.models import build_model, load_weights
from ekd_ray.results import finish
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import RunRecord, read_record
from ekd_ray.scale.confirm import Entry, plan_runs
from ekd_ray.scale.worker import TrainOptions, train_run


@pytest.fixture(scope="module")
def kept(real_study, winner_config, tmp_path_factory):
    """(predictions, metrics, splits that were opened, gallery's path) of the winner's final
    evaluation."""
    path, opened = tmp_path_factory.mktemp("kept") / "p.safetensors", []
    load = rundata.load_dataset

    def counted(name, split, **options):
        opened.append(split)
        return load(name, split, **options)

    rundata.load_dataset = counted
    try:
        metrics = evaluation.evaluate_test(
            real_study[1], stage=RunStage.FINAL, data_root=None, keep=path
        )
    finally:
        rundata.load_dataset = load
    return Predictions.load(path), metrics, opened, path.with_name(GALLERY)


def test_the_test_split_is_read_once_for_figures_and_predictions(kept, real_study):
    found, metrics, opened, _ = kept
    assert opened == ["test"]
    assert metrics == evaluation.evaluate_test(real_study[1], stage=RunStage.FINAL, data_root=None)
    correct = (found.predicted == found.labels).double().mean()
    assert float(correct) == pytest.approx(metrics["test_top1"])


def test_logits_and_those_of_the_teacher_are_of_the_same_images(kept, real_study, winner_config):
    found, *_ = kept
    data = rundata.load_test_data(
        winner_config, stage=RunStage.FINAL, data_root=None, device=torch.device("cpu")
    )
    ((images, labels),) = data.images.evaluation(found.kept.numpy(), len(found.kept))
    assert torch.equal(labels, found.labels[found.kept])
    teacher = build_model("resnet8", 10)
    load_weights(teacher, winner_config.teacher_weights)
    scale = parse_normalization(winner_config.teacher_normalization)
    for model, logits, (mean, std) in (
        (teacher, found.teacher_logits, (scale.mean, scale.std)),
        (real_study[1].model, found.logits, (data.mean, data.std)),
    ):
        with torch.no_grad():
            expected = model.eval()(normalize(images, mean, std))
        assert torch.allclose(logits.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_surest_mistakes_and_the_largest_differences_are_kept(kept, real_study, winner_config):
    """Against a pass over the test split by hand."""
    found, _, _, path = kept
    shown = Gallery.load(path, count=len(found.labels), classes=10)
    wrong = [i for i in range(len(found.labels)) if found.predicted[i] != found.labels[i]]
    surest = sorted(wrong, key=lambda i: -float(found.confidence[i]))[:MOST_SHOWN]
    assert sorted(shown.images[: shown.mistakes].tolist()) == sorted(surest)
    prior = real_study[1].log_prior
    ours, theirs = (
        log_expectation(logits.float(), 1.0, prior).exp()
        for logits in (found.logits, found.teacher_logits)
    )
    distance = 0.5 * (ours - theirs).abs().sum(dim=1)
    others = distance[~torch.isin(found.kept, torch.tensor(surest))]
    most = others.sort(descending=True).values[:MOST_SHOWN]
    assert len(shown.images.unique()) == len(shown.images)
    torch.testing.assert_close(shown.distances[shown.mistakes :], most, rtol=0.02, atol=2e-3)
    data = rundata.load_test_data(
        winner_config, stage=RunStage.FINAL, data_root=None, device=torch.device("cpu")
    )
    ((images, _),) = data.images.evaluation(shown.images.numpy(), len(shown.images))
    assert torch.equal(shown.thumbnails, images)
    place = {int(image): row for row, image in enumerate(found.kept)}
    for image, taught in zip(shown.images.tolist(), shown.teacher.tolist(), strict=True):
        if image in place:
            assert taught == int(found.teacher_logits[place[image]].float().argmax())


def test_large_images_become_small():
    class Large:
        def evaluation(self, ids, batch):
            yield torch.full((len(ids), 3, 200, 200), 7, dtype=torch.uint8), None

    small = shrink_images(Large(), np.arange(3))
    assert small.shape == (3, 3, SIDE, SIDE) and small.unique().tolist() == [7]


@pytest.mark.parametrize(
    ("count", "classes"), [(7, 10), (10_000, 10), (10_000, 100), (50_000, 1000)]
)
def test_kept_logits_are_bounded_and_evenly_spaced(count, classes):
    kept = kept_images(count, classes)
    assert len(kept) == min(count, 2000, LOGIT_VALUES // classes)
    steps = kept.diff()
    assert kept[0] == 0 and kept[-1] < count and steps.max() - steps.min() <= 1


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e9, -1e9], [0.0, 1.0]])
    found = Predictions.of(logits, torch.tensor([0, 1]), log_prior=-1.0, class_names=("a", "b"))
    assert found.logits.isfinite().all() and found.confidence.isfinite().all()


def train(config, folder, stage):
    """Train a run; returns the record that it leaves."""
    run = RunRecord(folder=folder, stage=stage, name="x", config=config.to_dict())
    options = TrainOptions(data_root=None, threads=1, shown=("kd_weight",))
    train_run(run, lambda row: None, options=options)
    return read_record(folder, run)


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "test"), (0.4, "val")])
def test_a_confirm_run_leaves_its_images(winner_config, tmp_path, fraction, split):
    stage = RunStage.FINAL if split == "test" else RunStage.SELECT
    train(winner_config.replace(validation_fraction=fraction, seed=1), tmp_path, stage)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["images"]) == {f"{split}/reliability", f"{split}/confusion"}
    assert ("test/top1" in found.Tags()["scalars"]) == (split == "test")
    assert (tmp_path / "predictions.safetensors").exists() == (split == "test")


@pytest.mark.slow
def test_a_run_that_cannot_draw_is_as_good(winner_config, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(finish, "write_pictures", broken)
    config = winner_config.replace(validation_fraction=0.0, seed=1)
    with pytest.warns(UserWarning, match="no images for TensorBoard .disk full"):
        record = train(config, tmp_path, RunStage.FINAL)
    assert record.status == "complete" and "test_top1" in record.metrics


@pytest.mark.parametrize("stage", RunStage)
def test_only_final_and_single_runs_may_open_the_test_split(
    real_study, winner_config, tmp_path, monkeypatch, stage
):
    """Whatever they were trained on: without a validation split, too."""
    opened = []
    monkeypatch.setattr(rundata, "load_dataset", lambda _, split, **__: opened.append(split))
    may = stage in (RunStage.FINAL, RunStage.SINGLE)
    refused = pytest.raises(AttributeError if may else ValueError)  # of the data, which is None
    run = RunRecord(folder=tmp_path, stage=stage, name="x", config=winner_config.to_dict())
    with refused:
        finish_run(run, real_study[1], data_root=None, test=True)
    assert opened == (["test"] if may else [])


def test_a_final_step_without_held_out_images_is_no_reason_to_read_the_test_split(
    winner_config, tmp_path
):
    record = train(winner_config.replace(validation_fraction=0.0), tmp_path, RunStage.SINGLE)
    assert not [name for name in record.metrics if name.startswith("test_")]


def test_confirm_folders_are_readable_and_shared_by_equal_configurations(winner_config, tmp_path):
    entries = [
        Entry(name=name, config=config, role="champion")
        for name, config in (
            ("trial 3", winner_config), ("authors' values", winner_config),
            ("kd", winner_config.replace(kd_weight=9.0)),
        )
    ]  # fmt: skip
    runs = plan_runs(tmp_path, RunStage.FINAL, entries, [1, 2])
    names = {(run.name, run.seed): run.folder.name for run in runs}
    assert names["trial 3", 2].startswith("final-trial-3-seed-2-")
    assert names["trial 3", 2] == names["authors' values", 2] != names["trial 3", 1]
    assert names["kd", 1].startswith("final-kd-seed-1-")
    # The same run under another name, later, and a run of an earlier version, are found again.
    runs[0].folder.mkdir(parents=True)
    (later,) = plan_runs(tmp_path, RunStage.FINAL, [replace(entries[0], name="trial 9")], [1])
    assert later.folder == runs[0].folder
    old = tmp_path / "confirm" / f"final-{entries[2].config.replace(seed=1).fingerprint()}"
    old.mkdir()
    assert plan_runs(tmp_path, RunStage.FINAL, entries, [1])[2].folder == old
