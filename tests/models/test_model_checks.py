"""The conformance suite refuses faulty models: one fault each, and the check that finds it."""

import pytest
import torch
from torch import nn

from ekd_ray.models.model_checks import (
    ModelCase,
    check_autocast,
    check_file,
    check_gradients,
    check_logits,
    check_memory_format,
    check_modes,
    check_seed,
)
from ekd_ray.testing import check_model, run_check


class Small(nn.Module):
    """A right model; each fault below changes one thing of it."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

    def features(self, images):
        return self.bn1(self.conv1(images)).relu()


class FixedClasses(Small):
    def __init__(self, num_classes):
        super().__init__(10)


class Tuple(Small):
    def forward(self, images):
        return super().forward(images), None


class TupleInTraining(Small):
    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class Double(Small):
    def forward(self, images):
        return super().forward(images).double()


class Halved(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.head.half()

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)).half()).float()


class OwnSeed(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.rand(self.head.weight.shape, generator=fresh))


fresh = torch.Generator().manual_seed(1)


class Frozen(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.conv1.weight.requires_grad_(False)


class AlwaysDropout(Small):
    def features(self, images):
        return nn.functional.dropout(super().features(images), 0.5)


class StuckInTraining(Small):
    def train(self, mode=True):
        super().train(mode)
        self.bn1.train()
        return self


class CouplesTheBatch(Small):
    def forward(self, images):
        return super().forward(images - images.mean(0, keepdim=True))


class Squeezes(Small):
    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)).squeeze())


class CountsInEvaluation(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        self.seen += 1
        return super().forward(images)


class Surplus(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.surplus = nn.Linear(2, 2)


class Views(Small):
    def features(self, images):
        return super().features(images.view(-1).view(images.shape))


class ByLayout(Small):
    def forward(self, images):
        last = images.stride(1) == 1 and images.shape[1] > 1
        return super().forward(images) * (2.0 if last else 1.0)


class HiddenState(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.shift = torch.rand(num_classes)

    def forward(self, images):
        return super().forward(images) + self.shift


class LosesState(Small):
    def state_dict(self, *args, **kwargs):
        found = super().state_dict(*args, **kwargs)
        return {key: value for key, value in found.items() if "running" not in key}


class OnlyFloat32(Small):
    def forward(self, images):
        pooled = self.features(images).mean((2, 3))
        return torch.addmm(self.head.bias, pooled.float(), self.conv1(images).mean((2, 3)).T)


class InPlace(Small):
    def features(self, images):
        active = self.bn1(self.conv1(images)).sigmoid()
        active.mul_(2.0)
        return active


FAULTY = {
    FixedClasses: check_logits,
    Tuple: check_logits,
    TupleInTraining: check_logits,
    Double: check_logits,
    Halved: check_seed,
    OwnSeed: check_seed,
    Frozen: check_seed,
    AlwaysDropout: check_modes,
    StuckInTraining: check_modes,
    CouplesTheBatch: check_modes,
    Squeezes: check_modes,
    CountsInEvaluation: check_modes,
    Surplus: check_gradients,
    InPlace: check_gradients,
    Views: check_memory_format,
    ByLayout: check_memory_format,
    HiddenState: check_file,
    LosesState: check_file,
    OnlyFloat32: check_autocast,
}


@pytest.mark.parametrize("model", FAULTY, ids=lambda model: model.__name__)
def test_a_faulty_model_is_refused(model):
    with pytest.raises(AssertionError, match=f"model '{model.__name__}'"):
        run_check(FAULTY[model], ModelCase(model))
    with pytest.raises(AssertionError, match=f"model '{model.__name__}'"):
        check_model(model)


def test_right_models_are_refused_by_none():
    check_model(Small)
    check_model("resnet8", image_size=40)
    check_model(lambda num_classes: Small(num_classes))


class Foreign(Small):
    """Names and shapes as akamaster's checkpoints have them, whose `linear` is another's `fc`."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(16, 16, 1)}))
        self.linear = self.__dict__["_modules"].pop("head")

    def forward(self, images):
        return self.linear(self.layer1[0]["conv1"](self.features(images)).mean((2, 3)))


def test_names_of_another_projects_checkpoints_come_back():
    check_model(Foreign)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(AssertionError, match=r"must return an nn\.Module, got int"):
        check_model(lambda num_classes: 7)
