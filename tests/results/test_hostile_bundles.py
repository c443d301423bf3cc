"""What a stranger may have put into a bundle: one sentence each, before memory or time is spent."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
import safetensors.torch
import yaml
from report_studies import predictions
from safetensors import safe_open

from ekd_ray.data import DATASETS
from ekd_ray.data.registry import folder_info
from ekd_ray.engine.measure.predictions import FILE, Predictions
from ekd_ray.errors import UserError
from ekd_ray.results import Bundle
from ekd_ray.results.reproduce import prepare

PICTURE = np.zeros((32, 32, 3), np.uint8)


def change_header(path, **values):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ekd_ray"])
    text = json.dumps({**header, **values})
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"ekd_ray": text})


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_settings(path, **values):
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def use(path):
    found = Bundle.load(path)
    found.environment()
    return found.predict(PICTURE)


def complaint(bundle):
    with pytest.raises(UserError) as found:
        use(bundle.path)
    assert str(found.value).isprintable()
    return str(found.value)


@pytest.mark.parametrize(
    "values",
    [
        {"log_prior": 1e308}, {"log_prior": -100}, {"log_prior": float("nan")},
        {"mean": [0.5] * 5}, {"mean": [1e6] * 3}, {"std": [0.0] * 3}, {"std": [1e-300] * 3},
        {"std": [-1.0] * 3}, {"std": None}, {"mean": [0.5, 0.5]}, {"num_classes": 9},
        {"num_classes": "many"}, {"model": "resnet110"},
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_nothing_could_use(bundle, values):
    change_header(bundle.path / "model.safetensors", **values)
    assert "weights" in complaint(bundle)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"test_top1": float("nan")}}, {"model": {"test_top1": 0.5, "x": float("inf")}},
        {"model": {"test_top1": 1.5}}, {"model": {"test_top1": True}}, {"model": []},
        {"model": {"test_top1": 0.5, "test_nll": 10**400}},
        {"test": {"test_nll": {"n": -(10**400)}}}, {"workers": True},
        {"test": {"test_top1": {"sd": "much"}}}, {"exports": {"a": 1}},
        {"seeds": 10**400}, {"class_names": ["a"]}, {"class_names": [1, 2]},
        {"format_version": 10**30},
        {"class_names": ["\x1b]0;owned\x07", *"bcdefghij"]}, {"class_names": ["a\nb", "c"]},
    ],
    ids=lambda values: str(values)[:60],
)  # fmt: skip
def test_figures_and_names_that_nothing_could_show(bundle, values):
    change_json(bundle.path / "metrics.json", **values)
    assert "metrics.json" in complaint(bundle)


def test_a_number_that_no_float_holds(bundle):
    path = bundle.path / "metrics.json"
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1e999, "was": ', 1))
    assert "metrics.json" in complaint(bundle)


@pytest.mark.parametrize(
    "values",
    [{"threads": 10**9}, {"threads": True}, {"gpus": [[]]}, {"gpus": 3}, {"deterministic": [1]}],
    ids=str,
)
def test_a_machine_that_is_none(bundle, values):
    change_json(bundle.path / "environment.json", **values)
    assert "environment.json" in complaint(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:vit_h_14",
        pytest.param("timm:vit_gigantic_patch14_224", marks=pytest.mark.slow),  # timm's import
    ],
)
def test_a_giant_takes_no_memory(bundle, name):
    """They have 0.6 and 1.8 billion parameters; the weights are those of a resnet8."""
    change_settings(bundle.path / "distill.yaml", student=name, student_image_size=224)
    change_header(bundle.path / "model.safetensors", model=name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "model.safetensors" in complaint(bundle)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    with pytest.raises(UserError, match=r"model\.safetensors|not as it was exported"):
        prepare(Bundle.load(bundle.path))


def test_many_classes_take_no_memory(bundle):
    names = [str(number) for number in range(300_000)]
    change_json(bundle.path / "metrics.json", class_names=names)
    assert "300000 classes" in complaint(bundle)


def test_images_that_the_student_does_not_take(bundle):
    change_settings(bundle.path / "distill.yaml", student="vgg8", image_size=8)
    change_header(bundle.path / "model.safetensors", model="vgg8")
    assert complaint(bundle)


@pytest.mark.parametrize("change", ["cut", "shape", "index", "nan", "names"])
def test_predictions_that_nothing_could_draw(tmp_path, change):
    path = tmp_path / FILE
    made = predictions(2.0, 0)
    made.save(path)
    assert Predictions.load(path).class_names == made.class_names
    tensors = safetensors.torch.load_file(path)
    if change == "shape":
        tensors["logits"] = tensors["logits"][:, 1:].contiguous()
    elif change == "index":
        tensors["predicted"][0] = 99
    elif change == "nan":
        tensors["confidence"][0] = float("nan")
    names = [] if change == "names" else list(made.class_names)
    safetensors.torch.save_file(tensors, path, {"class_names": json.dumps(names)})
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is damaged"):
        Predictions.load(path)


def test_a_data_set_has_no_such_names_either():
    with pytest.raises(UserError, match="control characters"):
        folder_info("folder:x", ("cat", "dog\x1b[2J"))
    assert DATASETS["cifar10"].class_names[0] == "airplane"
