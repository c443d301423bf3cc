"""The registry: names, aliases, output shapes, parameter counts, errors."""

import importlib.util
import sys

import pytest
import torch

from ekd_ray.errors import UserError
from ekd_ray.models import ALIASES, build_model, model_names

needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is missing")

# Exact parameter counts for 100 classes that RepDistiller and mdistiller report for their zoo.
PUBLISHED_100 = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
    "ResNet50": 23_705_252,
}
# Option A, 10 classes; He et al. print 0.27, 0.46, 0.66, 0.85 and 1.7 million.
PUBLISHED_10 = {
    "resnet20a": 269_722,
    "resnet32a": 464_154,
    "resnet44a": 658_586,
    "resnet56a": 853_018,
    "resnet110a": 1_727_962,
}
# The rest at 100 classes, counted by hand from the papers' tables.
BY_HAND_100 = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet44": 667_188,
    "wrn_16_1": 180_916,
    "wrn_28_2": 1_479_220,
    "wrn_28_4": 5_872_180,
    "wrn_16_4": 2_772_020,
    "vgg11": 9_277_284,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "ResNet18": 11_220_132,
    "ResNet34": 21_328_292,
    "PVT_Ti": 12_767_588,
    "T2T_ViT_7": 4_024_394,
}
# Millions at 1,000 classes, as the papers print them; timm's and mdistiller's exact counts.
PUBLISHED_1000 = {
    "PVT_Ti": 13.2e6,
    "T2T_ViT_7": 4.3e6,
    "DeiT_Ti": 5_717_416,
    "PiT_Ti": 4_847_272,
    "MobileNetV1": 4_231_976,
}
TRANSFORMERS = ["PVT_Ti", "T2T_ViT_7"]
NAMES = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *PUBLISHED_10,
    *("resnet8x4", "resnet32x4"),
    *("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_28_2", "wrn_28_4", "wrn_16_4"),
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
    *("ResNet18", "ResNet34", "ResNet50", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
    *TRANSFORMERS,
]
WITH_ALIASES = [*NAMES, *(pytest.param(name, marks=needs_timm) for name in ALIASES)]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name, classes):
    """The model without numbers: shapes and counts cost nothing, and plans are made this way."""
    with torch.device("meta"):
        return build_model(name, classes)


def test_the_zoo_is_the_promised_one():
    assert sorted(model_names()) == sorted(NAMES)
    assert not set(ALIASES) & set(NAMES)
    assert set(ALIASES) == {"DeiT_Ti", "PiT_Ti", "MobileNetV1"}


@pytest.mark.parametrize("name", WITH_ALIASES)
def test_shape_and_size(name):
    """At 100 classes; tests/models/test_every_model.py has 10."""
    model = build_model(name, 100).eval()
    side = 224 if name in TRANSFORMERS or name in ALIASES else 32
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side)).shape == (1, 100)
    assert (model.ekd_name, model.ekd_num_classes) == (name, 100)
    counted = PUBLISHED_100 | BY_HAND_100
    assert parameters(model) == counted.get(name, parameters(model))
    assert name in {*counted, *PUBLISHED_10, *PUBLISHED_1000}


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [(name, 10, count) for name, count in PUBLISHED_10.items()]
    + [
        pytest.param(name, 1000, count, marks=needs_timm if name in ALIASES else [])
        for name, count in PUBLISHED_1000.items()
    ],
)
def test_published_parameter_counts(name, classes, count):
    model = on_meta(name, classes)
    digits = -5 if isinstance(count, float) else 0
    assert round(parameters(model), digits) == count


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1"])
def test_other_image_sizes_pool_globally(name):
    model = build_model(name, 5).eval()
    for height, width in ((40, 48), (64, 64)):
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


@pytest.mark.parametrize(
    "name", [*TRANSFORMERS, *(pytest.param(n, marks=needs_timm) for n in ("DeiT_Ti", "PiT_Ti"))]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 256), (448, 112)])
def test_transformers_name_their_image_size(name, height, width):
    with pytest.raises(UserError) as caught:
        on_meta(name, 5)(torch.empty(2, 3, height, width, device="meta"))
    message = str(caught.value)
    assert f"the model {name!r} takes images of 224 x 224 pixels" in message
    assert f"got {height} x {width}" in message


def test_torchvision_models():
    model = build_model("torchvision:mobilenet_v3_small", 9).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 9)
    assert model.ekd_name == "torchvision:mobilenet_v3_small"
    with pytest.raises(UserError, match="Did you mean 'resnet18'"):
        build_model("torchvision:resnet81", 10)
    with pytest.raises(UserError, match="unknown torchvision model"):
        build_model("torchvision:fasterrcnn_resnet50_fpn", 10)


def test_timm_missing_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:deit_tiny_patch16_224", "DeiT_Ti"):
        with pytest.raises(UserError, match="pip install timm"):
            build_model(name, 10)


@pytest.mark.parametrize("name", ["resnet21", "", "torchvison:resnet18", "weights:x", 7, "deit_ti"])
def test_unknown_names(name):
    with pytest.raises(UserError, match="unknown model"):
        build_model(name, 10)


@pytest.mark.parametrize("classes", [1, 0, -3, 2.0, True, "10", None])
def test_class_counts_out_of_bounds(classes):
    with pytest.raises(UserError, match="at least 2"):
        build_model("resnet8", classes)
