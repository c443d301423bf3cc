"""A second data set beside the validation: how well a student's uncertainty tells it apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_runs import CPU, by_hand, same_weights, state, untimed, watch_student
from miniature import write_miniature
from PIL import Image
from sklearn.metrics import roc_auc_score

import ekd_ray.engine.rundata as rundata
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.final import evaluate_test
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import load_run_data, split_ids
from ekd_ray.errors import UserError


@pytest.fixture
def opened(monkeypatch):
    """(data set, split) of all that is opened from here on."""
    seen = []

    def recorded(name, split, **kwargs):
        seen.append((name, split))
        return load_dataset(name, split, **kwargs)

    monkeypatch.setattr(rundata, "load_dataset", recorded)
    return seen


@pytest.fixture(scope="module")
def result(tiny):
    return distill(tiny(ood_dataset="digits"), threads=1)


def auroc(result, inside, outside):
    """By scikit-learn, of 1 - max p: images as the students of `inside` see them."""
    info, scores = dataset_info("synthetic"), []
    for images in (inside, outside):
        with torch.no_grad():
            logits = result.model(by_hand(torch.from_numpy(images), info.mean, info.std))
        scores.append(1 - logits.double().softmax(1).amax(1))
    foreign = np.repeat([0, 1], [len(inside), len(outside)])
    return roc_auc_score(foreign, torch.cat(scores).numpy())


def test_the_column_of_the_validation(result):
    assert all(0 <= row["val_ood_auroc"] <= 1 for row in result.history)
    inside, outside = load_dataset("synthetic", "train"), load_dataset("digits", "train")
    _, ids = split_ids(result.config, inside.labels)
    drawn = load_run_data(result.config, data_root=None, device=CPU).ood_ids
    assert len(set(drawn.tolist())) == len(ids)
    expected = auroc(result, inside.images[ids], outside.images[drawn])
    assert result.metrics["val_ood_auroc"] == pytest.approx(expected, abs=0.01)


def test_the_column_of_the_test(result):
    found = evaluate_test(result, stage=RunStage.FINAL, data_root=None)
    inside, outside = load_dataset("synthetic", "test"), load_dataset("digits", "test")
    assert len(inside) > len(outside)  # all 359 digits then
    expected = auroc(result, inside.images, outside.images)
    assert found["test_ood_auroc"] == pytest.approx(expected, abs=0.01)


def test_training_does_not_see_it(result, tiny):
    without = distill(tiny(), threads=1)
    assert same_weights(state(without), state(result))
    rows = untimed(result.history)
    for row in rows:
        del row["val_ood_auroc"]
    assert rows == untimed(without.history)
    assert "ood_auroc" not in "".join(evaluate_test(without, stage=RunStage.FINAL, data_root=None))


def test_only_its_training_split_is_opened_before_the_end(tiny, opened):
    ended = distill(tiny(ood_dataset="digits", epochs=1), threads=1)
    assert opened == [("synthetic", "train"), ("digits", "train")]
    opened.clear()
    evaluate_test(ended, stage=RunStage.FINAL, data_root=None)
    assert opened == [("synthetic", "test"), ("digits", "test")]


def test_as_many_images_as_validate_drawn_by_the_split_seed(tiny):
    one, again, other = (
        load_run_data(tiny(ood_dataset="digits", **v), data_root=None, device=torch.device("cpu"))
        for v in ({}, {"seed": 3}, {"split_seed": 3})
    )
    assert len(one.ood_ids) == len(one.validation_ids) == 32
    assert (one.ood_ids == again.ood_ids).all()
    assert (one.ood_ids != other.ood_ids).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("synthetic", ["ood_dataset", "another data set", "'synthetic' twice"]),
        ("digit", ["'digit'", "digits"]),
        ("cifar10", ["cifar10"]),
    ],
)
def test_a_second_data_set_that_cannot_serve_is_refused_in_the_plan(name, words, tiny, tmp_path):
    with pytest.raises(UserError) as refused:
        resolve(tiny(ood_dataset=name), data_root=str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_a_second_data_set_of_the_same_classes_is_refused_in_the_plan(tiny, tmp_path):
    for split in ("train", "test"):
        for kind in ("birds", "Pattern3"):
            place = tmp_path / "pets" / split / kind
            place.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(place / "a.png")
    with pytest.raises(UserError, match=r"shares classes .*\(Pattern3\)") as refused:
        resolve(tiny(ood_dataset=f"folder:{tmp_path / 'pets'}"))
    assert "\n" not in str(refused.value)


def test_pictures_of_any_size_are_brought_to_the_students(tiny, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("birds", "cats"):
            folder = tmp_path / "pets" / split / kind
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = draw.integers(0, 256, (40 + 9 * i, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    seen = watch_student(monkeypatch)
    config = tiny(ood_dataset=f"folder:{tmp_path / 'pets'}", epochs=1)
    metrics = distill(config, threads=1).metrics
    assert 0 <= metrics["val_ood_auroc"] <= 1
    assert [tuple(inputs.shape) for inputs in seen[-2:]] == [(32, 3, 32, 32), (6, 3, 32, 32)]


def test_a_second_data_set_with_more_classes_than_images_to_draw(tiny, tmp_path):
    write_miniature(tmp_path / "many", classes=40, train_per_class=1, test_per_class=1, size=32)
    config = resolve(tiny(ood_dataset=f"folder:{tmp_path / 'many'}"))
    data = load_run_data(config, data_root=None, device=CPU)
    assert len(set(data.ood_ids.tolist())) == len(data.validation_ids) < 40
