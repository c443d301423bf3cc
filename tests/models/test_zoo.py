"""Every model of the zoo: shape, size against published figures, arithmetic, determinism."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from ekd_ray.errors import UserError
from ekd_ray.models import build_model, model_names

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
}
# Option A, 10 classes; He et al. print 0.27, 0.46, 0.66, 0.85 and 1.7 million.
PUBLISHED_10 = {
    "resnet20a": 269_722,
    "resnet32a": 464_154,
    "resnet44a": 658_586,
    "resnet56a": 853_018,
    "resnet110a": 1_727_962,
}
NAMES = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *PUBLISHED_10,
    *("resnet8x4", "resnet32x4"),
    *("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "wrn_28_2", "wrn_28_4", "wrn_16_4"),
]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def count_resnet(depth, widths, classes, option):
    """Parameters by hand: 9 weights an in/out pair, 2 a batch-norm channel."""
    stem, *stages = widths
    total, previous = 27 * stem + 2 * stem, stem
    for width in stages:
        for _ in range((depth - 2) // 6):
            total += 9 * previous * width + 9 * width * width + 4 * width
            if previous != width and option == "B":
                total += previous * width + 2 * width
            previous = width
    return total + previous * classes + classes


def count_wrn(depth, widen, classes):
    total, previous = 27 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            total += 2 * previous + 9 * previous * width + 2 * width + 9 * width * width
            total += previous * width if previous != width else 0
            previous = width
    return total + 2 * previous + previous * classes + classes


def expected_count(name, classes):
    if name.startswith("wrn"):
        _, depth, widen = name.split("_")
        return count_wrn(int(depth), int(widen), classes)
    depth, _, times = name.removeprefix("resnet").partition("x")
    widths = (32, 64, 128, 256) if times else (16, 16, 32, 64)
    option = "A" if depth.endswith("a") else "B"
    return count_resnet(int(depth.rstrip("a")), widths, classes, option)


def test_the_zoo_is_the_promised_one():
    assert sorted(model_names()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shape_size_and_gradient(name):
    model = build_model(name, 7)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert parameters(model) == expected_count(name, 7)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [(name, 100, count) for name, count in PUBLISHED_100.items()]
    + [(name, 10, count) for name, count in PUBLISHED_10.items()],
)
def test_published_parameter_counts(name, classes, count):
    assert parameters(build_model(name, classes)) == count


@pytest.mark.parametrize("name", ["resnet20", "resnet20a", "resnet8x4", "wrn_16_1", "wrn_16_2"])
def test_batch_order_and_memory_format_do_not_matter(name):
    torch.manual_seed(0)
    model = build_model(name, 10).eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        whole = model(images)
        single = torch.cat([model(image[None]) for image in images])
        last = model.to(memory_format=torch.channels_last)(
            images.to(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)
    assert whole.std(0).min() > 0  # the logits do depend on the image


def test_other_image_sizes_pool_globally():
    assert build_model("resnet8", 5)(torch.randn(2, 3, 40, 48)).shape == (2, 5)
    assert build_model("wrn_16_1", 5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def random_statistics(model):
    """Batch norms that do something: fresh ones are nearly the identity and would hide errors."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def batch_norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def classify(state, x):
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def reference_resnet(state, x, blocks):
    x = batch_norm(state, "bn1", conv(state, "conv1", x)).relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = batch_norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride)).relu()
            out = batch_norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", out))
            if f"{name}.downsample.0.weight" in state:
                x = conv(state, f"{name}.downsample.0", x, stride)
                x = batch_norm(state, f"{name}.downsample.1", x)
            elif stride == 2:
                padded = torch.zeros_like(out)
                quarter = out.shape[1] // 4
                padded[:, quarter : 3 * quarter] = x[:, :, ::2, ::2]
                x = padded
            x = (x + out).relu()
    return classify(state, x)


def reference_wrn(state, x, blocks):
    x = conv(state, "conv1", x)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"block{stage}.layer.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            active = batch_norm(state, f"{name}.bn1", x).relu()
            out = conv(state, f"{name}.conv1", active, stride)
            out = conv(state, f"{name}.conv2", batch_norm(state, f"{name}.bn2", out).relu())
            if f"{name}.convShortcut.weight" in state:
                x = conv(state, f"{name}.convShortcut", active, stride)
            x = x + out
    return classify(state, batch_norm(state, "bn1", x).relu())


@pytest.mark.parametrize(
    ("name", "reference", "blocks"),
    [
        ("resnet14", reference_resnet, 2),
        ("resnet20a", reference_resnet, 3),
        ("resnet8x4", reference_resnet, 1),
        ("wrn_16_1", reference_wrn, 2),
        ("wrn_16_2", reference_wrn, 2),
    ],
)
def test_forward_is_the_paper_arithmetic(name, reference, blocks):
    torch.manual_seed(1)
    model = random_statistics(build_model(name, 10)).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(model.state_dict(), images, blocks)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2"])
def test_initial_weights_are_kaiming_fan_out(name):
    torch.manual_seed(2)
    state = build_model(name, 10).state_dict()
    for key, weight in state.items():
        if weight.ndim == 4 and weight.numel() > 4000:
            deviation = (2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])) ** 0.5
            assert weight.std().item() == pytest.approx(deviation, rel=0.06), key
            assert abs(weight.mean().item()) < 0.1 * deviation, key
        if "bn" in key and key.endswith((".weight", ".bias")):
            assert (weight == (1 if key.endswith("weight") else 0)).all(), key


def test_names_are_those_of_mdistiller():
    batch_norm_keys = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def keys(convolutions, batch_norms):
        return {f"{c}.weight" for c in convolutions} | {
            f"{b}.{key}" for b in batch_norms for key in batch_norm_keys
        }

    stages = [f"layer{n}.0" for n in (1, 2, 3)]
    expected = keys(
        ["conv1", *(f"{s}.conv{n}" for s in stages for n in (1, 2))],
        ["bn1", *(f"{s}.bn{n}" for s in stages for n in (1, 2))],
    ) | {"fc.weight", "fc.bias"}
    changed = keys(
        [f"{s}.downsample.0" for s in stages[1:]], [f"{s}.downsample.1" for s in stages[1:]]
    )
    assert set(build_model("resnet8", 10).state_dict()) == expected | changed
    first = keys(["layer1.0.downsample.0"], ["layer1.0.downsample.1"])
    assert set(build_model("resnet8x4", 10).state_dict()) == expected | changed | first

    blocks = [f"block{n}.layer.{m}" for n in (1, 2, 3) for m in (0, 1)]
    wide = keys(
        ["conv1", *(f"{b}.conv{n}" for b in blocks for n in (1, 2))],
        ["bn1", *(f"{b}.bn{n}" for b in blocks for n in (1, 2))],
    ) | {"fc.weight", "fc.bias"}
    shortcuts = [f"block{n}.layer.0.convShortcut.weight" for n in (1, 2, 3)]
    assert set(build_model("wrn_16_1", 10).state_dict()) == wide | set(shortcuts[1:])
    assert set(build_model("wrn_16_2", 10).state_dict()) == wide | set(shortcuts)


def test_building_depends_on_the_global_seed_alone():
    def state(seed):
        torch.manual_seed(seed)
        return build_model("wrn_16_1", 10).state_dict()

    first, again, other = state(3), state(3), state(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


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
    with pytest.raises(UserError, match="pip install timm"):
        build_model("timm:deit_tiny_patch16_224", 10)


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


@pytest.mark.parametrize("name", ["resnet21", "", "torchvison:resnet18", "weights:x", 7])
def test_unknown_names(name):
    with pytest.raises(UserError, match="unknown model"):
        build_model(name, 10)


@pytest.mark.parametrize("classes", [1, 0, -3, 2.0, True, "10", None])
def test_class_counts_out_of_bounds(classes):
    with pytest.raises(UserError, match="at least 2"):
        build_model("resnet8", classes)
