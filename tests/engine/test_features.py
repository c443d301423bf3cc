"""Methods that compare layers: what they are given, what they refuse, and that runs repeat."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from engine_runs import (
    Killed,
    assert_same_run,
    by_hand,
    kill_at_step,
    one_step,
    slow_view,
    state,
    untimed,
    watch_steps,
)
from rank_groups import group, start
from torch import nn

import ekd_ray.engine.resolve as resolving
from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.features import record_features
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.losses import METHODS, register_method
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, load_weights

PLUGIN = Path(__file__).parents[2] / "docs" / "guide" / "attention_transfer.py"
# A pair; a layer behind whose norm a folded teacher would look; one name for both.
LAYERS = (("layer1", "layer2.0.conv1"), "layer2.0.conv2", "layer3")


def register(layers=LAYERS, **changes):
    """The guide's method, of other layers, as `at`."""
    METHODS.pop("at", None)
    at = runpy.run_path(str(PLUGIN))["AT"]
    del METHODS["at"]
    return register_method("at", dataclasses.replace(at, features=layers, **changes))


@pytest.fixture
def at():
    """Registers the method for one test."""
    yield register
    METHODS.pop("at", None)


@pytest.fixture
def config(at, tiny, with_teacher):
    at()
    return with_method(tiny(lr=0.01), "at", **with_teacher)


def plain_loss(student, teacher):
    """Of two [B, C, H, W] by its words: squared activations, rows of norm 1, mean square."""
    side = min(student.shape[-1], teacher.shape[-1])
    maps = []
    for features in (student, teacher):
        pooled = nn.functional.adaptive_avg_pool2d(features, side)
        rows = (pooled**2).mean(1).flatten(1)
        maps.append(rows / rows.norm(dim=1, keepdim=True))
    return float(((maps[0] - maps[1]) ** 2).mean())


@pytest.mark.parametrize("strong", [False, True])
def test_the_loss_is_that_of_the_layers_of_plain_networks(strong, config, at, monkeypatch):
    """On the weak view also where there is a strong one, and with what a fold would change."""
    at(strong_view=strong)
    batches = []
    watch_steps(monkeypatch, lambda _, run, batch: batches.append(batch))
    result = distill(one_step(config), threads=1)
    (batch,) = batches
    arrays, info = load_dataset("synthetic", "train"), dataset_info("synthetic")
    pictures = [torch.from_numpy(arrays.images[i].copy()) for i in batch.sample_ids]
    views = [slow_view(p, int(v)) for p, v in zip(pictures, batch.view_ids, strict=True)]
    images = by_hand(torch.stack(views), info.mean, info.std)
    torch.manual_seed(config.seed)
    student = build_model(config.student, 10).train()
    teacher = build_model(config.teacher, 10).eval()
    load_weights(teacher, config.teacher_weights)
    found = []
    for model, names in (
        (student, ["layer1", "layer2.0.conv2", "layer3"]),
        (teacher, ["layer2.0.conv1", "layer2.0.conv2", "layer3"]),
    ):
        outputs = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name, outputs=outputs: outputs.update({name: output})
            )
        with torch.no_grad():
            model(images)
        found.append([outputs[name] for name in names])
    expected = sum(plain_loss(s, t) for s, t in zip(*found, strict=True))
    assert result.metrics["loss_at"] == pytest.approx(expected, rel=1e-3)
    assert result.metrics["loss_ce"] > 0


def test_nothing_is_left_in_the_model_or_on_the_disk(config, own_cache):
    result = distill(config, threads=1)
    assert not any(module._forward_hooks for module in result.model.modules())
    assert not own_cache.exists()


def test_a_table_that_is_there_is_not_read(config, own_cache, monkeypatch):
    distill(with_method(config, "kd"), threads=1)
    assert own_cache.exists()
    runs = []
    watch_steps(monkeypatch, lambda _, run, batch: runs.append(run))
    distill(config, threads=1)
    assert runs[-1].teachers[0].table is None


def test_only_the_students_weights_get_a_gradient(config, monkeypatch):
    runs = []
    watch_steps(monkeypatch, lambda _, run, batch: runs.append(run))
    distill(one_step(config.replace(ce_weight=0.0)), threads=1)
    grown = {n: p.grad for n, p in runs[0].learner.named_parameters()}
    assert all(gradient is not None for gradient in grown.values())
    assert grown["student.layer3.0.conv1.weight"].abs().max() > 0
    assert grown["student.fc.weight"].abs().max() == 0
    network = runs[0].teachers[0]._network().model
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulation_steps": 2, "precision": "bfloat16"}, {"optimizer": "adamw"}],
    ids=str,
)
def test_it_resumes_inside_an_epoch_bit_for_bit(settings, config, tmp_path, monkeypatch):
    """Killed at step 5 (of 3 an epoch), or in the middle of one, resumed after the last."""
    config = config.replace(**settings)
    straight = distill(config, threads=1)
    weights = state(straight)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5 * config.accumulation_steps)
        with pytest.raises(Killed):
            distill(config, out=tmp_path, threads=1, checkpoint_steps=1)
    assert_same_run(distill(config, out=tmp_path, threads=1), straight, weights)


# ---------------------------------------------------------------- several workers


def worker(rank: int, runs: list[dict], folder: str) -> None:
    register()
    with group(rank, 2, Path(folder)):
        found = [distill(DistillConfig.from_dict(settings), threads=1) for settings in runs]
        record = [(untimed(result.history), state(result)) for result in found]
        torch.save(record, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_workers_train_as_one(config, tmp_path):
    """The classifier of a student that gets no label has to take part as well."""
    configs = [config.replace(ce_weight=weight, lr=0.001) for weight in (0.0, 1.0)]
    start(worker, 2, [one.to_dict() for one in configs], str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    for one, (history, weights), (other, _) in zip(configs, first, second, strict=True):
        assert history == other
        alone = distill(one, threads=1)
        for found, expected in zip(history, untimed(alone.history), strict=True):
            assert found["loss_at"] == pytest.approx(expected["loss_at"], rel=1e-3)
            assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
        for name, value in state(alone).items():
            torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4, msg=name)


# ---------------------------------------------------------------- refused before compute


@pytest.mark.parametrize("setting", ["teacher_cache", "compile"])
def test_what_it_does_not_go_with_is_refused(setting, config):
    with pytest.raises(UserError, match=f"{setting}=on is not for method 'at'.*set {setting}=auto"):
        resolve(config.replace(**{setting: "on"}))
    assert getattr(resolve(config), setting) == "auto"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("layr3",), "the layer 'layr3', which resnet8 does not have. Did you mean 'layer3'"),
        ((("layer3", "layer4"),), "the layer 'layer4', which resnet8 does not have"),
        (("layer1.0.bn3",), "Did you mean 'layer1.0.bn"),
    ],
)
def test_layers_that_are_not_there_are_refused_with_the_nearest(layers, message, config, at):
    at(layers)
    with pytest.raises(UserError) as refused:
        resolve(config)
    assert message in str(refused.value)


class Odd(nn.Module):
    """Layers that give no one tensor with a row for each image."""

    def __init__(self):
        super().__init__()
        self.unused, self.relu, self.pair, self.turned = (nn.Identity() for _ in range(4))

    def forward(self, images):
        values = self.relu(self.relu(images)).mean((2, 3))
        self.pair((values, values))
        self.turned(values.T)
        return values.new_zeros(len(images), 10)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("unused", "must give one tensor in a forward pass, got nothing"),
        ("relu", "must give one tensor in a forward pass, got Tensor, Tensor"),
        ("pair", "must give one tensor in a forward pass, got tuple"),
        ("turned", r"must give \[B, ...\], a row for each image, got \(3, 2\) for 2"),
    ],
)
def test_layers_without_one_tensor_are_refused(layer, message, monkeypatch):
    monkeypatch.setattr(resolving, "build_model", lambda name, num_classes: Odd())
    with pytest.raises(UserError, match=message):
        resolving.check_model.__wrapped__("resnet8", 10, 8, "image_size", (layer,))


def test_a_forward_pass_that_fails_leaves_no_hook():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), record_features(model, ["0"]):
        model(torch.zeros(1, 3))
    assert not model[0]._forward_hooks
