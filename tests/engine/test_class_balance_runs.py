"""Runs that even their classes out: resumed, with a filled table, and on uneven classes."""

from __future__ import annotations

import numpy as np
import pytest
from engine_runs import Killed, assert_same_run, kill_at_step, state, watch_steps

from ekd_ray.cli import plan_text
from ekd_ray.cli.plan_text import UNEVEN, run_plan
from ekd_ray.config import StudyConfig
from ekd_ray.data import DATASETS, load_dataset, register_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.fill import fill_tables
from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, save_weights

COUNTS = (40, 12, 4)


def load_uneven(split):
    labels = np.repeat(np.arange(3), COUNTS)
    return load_dataset("synthetic", "train").images[: len(labels)].transpose(0, 2, 3, 1), labels


@pytest.fixture
def uneven(tiny, monkeypatch):
    """A configuration on 28 training pictures, 20, 6 and 2 of its classes."""
    monkeypatch.setitem(DATASETS, "uneven", None)
    del DATASETS["uneven"]
    register_dataset("uneven", load_uneven)
    return resolve(
        tiny(dataset="uneven", train_subset=None, validation_fraction=0.5, class_balance=1.0)
    )


def test_every_class_is_seen_as_often(uneven, monkeypatch):
    seen = []
    watch_steps(monkeypatch, lambda count, run, part: seen.append(part.sample_ids))
    result = distill(uneven.replace(batch_size=28), threads=1)
    labels = load_dataset("uneven", "train").labels
    for samples in seen:  # one step an epoch
        assert sorted(np.bincount(labels[samples])) == [9, 9, 10]
    assert result.metrics["val_worst_recall"] <= result.metrics["val_balanced_top1"]


def test_it_resumes_to_the_bit_and_reads_a_table_that_was_filled_before(
    uneven, own_cache, monkeypatch, tmp_path
):
    path = tmp_path / "teacher.safetensors"
    save_weights(
        build_model("resnet8", 3), path, model_name="resnet8", num_classes=3,
        mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    settings = {"teacher": "resnet8", "teacher_weights": str(path), "teacher_cache": "on"}
    config = with_method(uneven.replace(batch_size=7), "kd", **settings)
    fill_tables(config, data_root=None, seeds=[config.seed], threads=1)
    (filled,) = [table.filled for table in list_tables()]
    straight = distill(config, threads=1)
    assert [table.filled for table in list_tables()] == [filled]  # no row was missing
    weights, out = state(straight), tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at_step(patch, 6)  # the second of epoch 2
        with pytest.raises(Killed):
            distill(config, out=out, threads=1, checkpoint_steps=1)
    assert_same_run(distill(config, out=out, threads=1), straight, weights)


@pytest.mark.parametrize(("balance", "said"), [(0.0, "class_balance=1"), (1.0, "more even shares")])
def test_the_plan_says_how_uneven_the_classes_are(uneven, tmp_path, balance, said):
    plan = run_plan(uneven.replace(class_balance=balance), tmp_path, None)
    assert "4 to 40 images (10 times" in plan and said in plan and COUNTS[0] > UNEVEN * COUNTS[2]
    assert "times as many" not in run_plan(
        resolve(uneven.replace(dataset="synthetic", data_fingerprint=None)), tmp_path, None
    )


def test_a_plan_advises_what_is_not_done_yet(uneven, tmp_path):
    def advised(**settings):
        study = StudyConfig(distill=uneven.replace(class_balance=0.0), **settings)
        plan = "\n".join(plan_text._imbalance(study.distill, None, study))
        return [word in plan for word in ("class_balance", "val_balanced_top1")]

    searched = {"class_balance": {"choices": [0.0, 1.0]}}
    assert advised() == [True, True]
    assert advised(space=searched) == [False, True]
    assert advised(metric="val_worst_recall") == [True, False]
    assert advised(metric="val_balanced_top1", space=searched) == [False, False]


def test_the_plan_names_classes_that_nothing_validates(uneven, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_text, "training_labels", lambda *_, **__: np.array([0, 0, 0, 1, 2]))
    assert "one image: 2;" in run_plan(uneven.replace(validation_fraction=0.2), tmp_path, None)
    whole = run_plan(uneven.replace(validation_fraction=0.0), tmp_path, None)
    assert "one image" not in whole
