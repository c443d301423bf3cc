"""The registry: names, aliases, output shapes, parameter counts by hand, errors."""

import importlib.util
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


def conv(inputs, outputs, kernel, *, groups=1, bias=False):
    """Parameters of a convolution by hand; of it and its batch norm: `conv(...) + norm(...)`."""
    return inputs // groups * outputs * kernel**2 + (outputs if bias else 0)


def norm(width):
    return 2 * width


def linear(inputs, outputs):
    return inputs * outputs + outputs


def count_resnet(depth, widths, classes, option):
    stem, *stages = widths
    total, previous = conv(3, stem, 3) + norm(stem), stem
    for width in stages:
        for _ in range((depth - 2) // 6):
            total += conv(previous, width, 3) + conv(width, width, 3) + 2 * norm(width)
            if previous != width and option == "B":
                total += conv(previous, width, 1) + norm(width)
            previous = width
    return total + linear(previous, classes)


def count_wrn(depth, widen, classes):
    total, previous = conv(3, 16, 3), 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            total += norm(previous) + conv(previous, width, 3)
            total += norm(width) + conv(width, width, 3)
            total += conv(previous, width, 1) if previous != width else 0
            previous = width
    return total + norm(previous) + linear(previous, classes)


def count_vgg(depth, classes):
    rows = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2,) * 5}
    counts = rows.get(depth, (2, 2, *((depth - 7) // 3,) * 3))
    assert sum(counts) == depth - 3
    total, previous = 0, 3
    for count, width in zip(counts, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            total += conv(previous, width, 3, bias=True) + norm(width)
            previous = width
    return total + linear(512, classes)


def count_large_resnet(depth, classes):
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    times = 4 if depth == 50 else 1
    total, previous = conv(3, 64, 3) + norm(64), 64
    for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
        for _ in range(count):
            if depth == 50:
                total += conv(previous, width, 1) + conv(width, width, 3) + 2 * norm(width)
                total += conv(width, 4 * width, 1) + norm(4 * width)
            else:
                total += conv(previous, width, 3) + conv(width, width, 3) + 2 * norm(width)
            if previous != times * width:
                total += conv(previous, times * width, 1) + norm(times * width)
            previous = times * width
    return total + linear(previous, classes)


def count_mobilenet(classes):
    rows = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    total, previous = conv(3, 16, 3) + norm(16), 16
    for expansion, channels, count in rows:
        for _ in range(count):
            inner, width = expansion * previous, channels // 2
            total += conv(previous, inner, 1) + conv(inner, inner, 3, groups=inner)
            total += conv(inner, width, 1) + 2 * norm(inner) + norm(width)
            previous = width
    return total + conv(previous, 1280, 1) + norm(1280) + linear(1280, classes)


def count_shuffle_v1(classes):
    total, previous = conv(3, 24, 1) + norm(24), 24
    for count, width in ((4, 240), (8, 480), (4, 960)):
        for index in range(count):
            outputs = width - previous if index == 0 else width
            inner, groups = outputs // 4, 1 if previous == 24 else 3
            total += conv(previous, inner, 1, groups=groups) + conv(inner, inner, 3, groups=inner)
            total += conv(inner, outputs, 1, groups=3) + 2 * norm(inner) + norm(outputs)
            previous = width
    return total + linear(960, classes)


def count_shuffle_v2(classes):
    total, previous = conv(3, 24, 1) + norm(24), 24
    for count, width in ((4, 116), (8, 232), (4, 464)):
        half = width // 2
        depthwise, pointwise = conv(half, half, 3, groups=half), conv(half, half, 1)
        total += conv(previous, previous, 3, groups=previous) + norm(previous)
        total += 2 * (conv(previous, half, 1) + norm(half))
        total += depthwise + pointwise + 2 * norm(half)
        total += (count - 1) * (depthwise + 2 * pointwise + 3 * norm(half))
        previous = width
    return total + conv(464, 1024, 1) + norm(1024) + linear(1024, classes)


def count_pvt(classes):
    total, previous, side = 512, 3, 224  # 512: the class token
    stages = zip((4, 2, 2, 2), (64, 128, 320, 512), (8, 4, 2, 1), (8, 8, 4, 4), strict=True)
    for patch, width, reduction, expansion in stages:
        side //= patch
        total += conv(previous, width, patch, bias=True) + norm(width) + side * side * width
        block = linear(width, width) + linear(width, 2 * width) + linear(width, width)
        block += linear(width, expansion * width) + linear(expansion * width, width)
        block += 2 * norm(width)
        if reduction > 1:
            block += conv(width, width, reduction, bias=True) + norm(width)
        total += 2 * block
        previous = width
    return total + 512 + norm(512) + linear(512, classes)  # 512: the class token's position


def count_t2t(classes):
    """Without the random features and the sinusoid table, which are not trained."""
    total = 256 + linear(576, 256)
    for width in (147, 576):
        total += norm(width) + linear(width, 192) + 3 * linear(64, 64) + norm(64)
    block = 2 * norm(256) + 256 * 768 + linear(256, 256) + linear(256, 512) + linear(512, 256)
    return total + 7 * block + norm(256) + linear(256, classes)


def expected_count(name, classes):
    """By hand, from the papers' tables."""
    single = {
        "MobileNetV2": count_mobilenet,
        "ShuffleV1": count_shuffle_v1,
        "ShuffleV2": count_shuffle_v2,
        "PVT_Ti": count_pvt,
        "T2T_ViT_7": count_t2t,
    }
    if name in single:
        return single[name](classes)
    if name.startswith("vgg"):
        return count_vgg(int(name.removeprefix("vgg")), classes)
    if name.startswith("ResNet"):
        return count_large_resnet(int(name.removeprefix("ResNet")), classes)
    if name.startswith("wrn"):
        _, depth, widen = name.split("_")
        return count_wrn(int(depth), int(widen), classes)
    depth, _, times = name.removeprefix("resnet").partition("x")
    widths = (32, 64, 128, 256) if times else (16, 16, 32, 64)
    option = "A" if depth.endswith("a") else "B"
    return count_resnet(int(depth.rstrip("a")), widths, classes, option)


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
    if name in NAMES:
        assert parameters(model) == expected_count(name, 100)
    assert parameters(model) == PUBLISHED_100.get(name, parameters(model))


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "ShuffleV2", "PVT_Ti", "T2T_ViT_7"])
def test_costs_are_counted_without_computing(name):
    """Plans run the models on the meta device."""
    side = 224 if name in TRANSFORMERS else 32
    with FlopCounterMode(display=False) as counter:
        logits = on_meta(name, 5)(torch.empty(1, 3, side, side, device="meta"))
    assert logits.shape == (1, 5)
    assert counter.get_total_flops() > 1e6


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
    if name in NAMES:
        assert parameters(model) == expected_count(name, classes)
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


@needs_timm
def test_an_alias_is_the_library_model():
    torch.manual_seed(0)
    short = build_model("PiT_Ti", 5)
    torch.manual_seed(0)
    long = build_model("timm:pit_ti_224", 5)
    assert (short.ekd_name, long.ekd_name) == ("PiT_Ti", "timm:pit_ti_224")
    assert short.state_dict().keys() == long.state_dict().keys()
    pairs = zip(short.state_dict().values(), long.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


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


def test_timm_is_called_untrained(monkeypatch):
    calls = []

    def create_model(name, **options):
        calls.append((name, options))
        return torch.nn.Linear(2, options["num_classes"])

    fake = types.SimpleNamespace(
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny"],
        create_model=create_model,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert build_model("timm:tiny", 10).ekd_num_classes == 10
    assert calls == [("tiny", {"pretrained": False, "num_classes": 10})]
    with pytest.raises(UserError, match=r"unknown timm model 'tinny'\. Did you mean 'tiny'"):
        build_model("timm:tinny", 10)


@pytest.mark.parametrize("name", ["resnet21", "", "torchvison:resnet18", "weights:x", 7, "deit_ti"])
def test_unknown_names(name):
    with pytest.raises(UserError, match="unknown model"):
        build_model(name, 10)


@pytest.mark.parametrize("classes", [1, 0, -3, 2.0, True, "10", None])
def test_class_counts_out_of_bounds(classes):
    with pytest.raises(UserError, match="at least 2"):
        build_model("resnet8", classes)
