"""Convolutional networks compute the published arithmetic: against plain functions of tensors."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F

from ekd_ray.models import build_model


def random_statistics(model):
    """Batch norms that do something: fresh ones are nearly the identity and would hide errors."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


class Read(UserDict):
    """A state_dict that notes which of its tensors are read."""

    def __init__(self, state):
        self.keys_read = set()
        super().__init__(state)

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)

    def unread(self):
        """Without the counters, which no arithmetic reads."""
        return {key for key in self.keys() - self.keys_read if "num_batches" not in key}


def batch_norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def conv(state, name, x, stride=1):
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)


def conv_bn(state, convolution, norm, x, stride=1):
    return batch_norm(state, norm, conv(state, convolution, x, stride))


def classify(state, x, name="fc"):
    return x.mean((2, 3)) @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def reference_resnet(state, x, blocks):
    x = conv_bn(state, "conv1", "bn1", x).relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = conv_bn(state, f"{name}.conv1", f"{name}.bn1", x, stride).relu()
            out = conv_bn(state, f"{name}.conv2", f"{name}.bn2", out)
            if f"{name}.downsample.0.weight" in state:
                x = conv_bn(state, f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
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


def reference_vgg(state, x, blocks):
    """`blocks`: convolutions in each of the five blocks."""
    rows = x.shape[2]
    for block, convolutions in enumerate(blocks):
        for index in range(convolutions):
            name = f"block{block}.{3 * index}", f"block{block}.{3 * index + 1}"
            x = conv_bn(state, *name, x).relu()
        if block < 3 or (block == 3 and rows == 64):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    return classify(state, x, "classifier")


def reference_mobilenet(state, x, blocks):
    x = conv_bn(state, "conv1.0", "conv1.1", x, 2).relu()
    for stage, (count, first) in enumerate(zip(blocks, (1, 1, 2, 2, 1, 2, 1), strict=True)):
        for block in range(count):
            name = f"blocks.{stage}.{block}.conv"
            out = conv_bn(state, f"{name}.0", f"{name}.1", x).relu()
            stride = first if block == 0 else 1
            out = conv_bn(state, f"{name}.3", f"{name}.4", out, stride).relu()
            out = conv_bn(state, f"{name}.6", f"{name}.7", out)
            x = x + out if out.shape == x.shape else out
    x = conv_bn(state, "conv2.0", "conv2.1", x).relu()
    return classify(state, x, "classifier.0")


def shuffled(x, groups):
    """Output channel i * groups + g is input channel i of part g."""
    size = x.shape[1] // groups
    return x[:, [part * size + index for index in range(size) for part in range(groups)]]


def reference_shuffle_v1(state, x, blocks):
    x = conv_bn(state, "conv1", "bn1", x).relu()
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            groups = 1 if (stage, block) == (1, 0) else 3
            out = conv_bn(state, f"{name}.conv1", f"{name}.bn1", x).relu()
            assert x.shape[1] == groups * state[f"{name}.conv1.weight"].shape[1]
            out = shuffled(out, groups)
            stride = 2 if block == 0 else 1
            out = conv_bn(state, f"{name}.conv2", f"{name}.bn2", out, stride).relu()
            out = conv_bn(state, f"{name}.conv3", f"{name}.bn3", out)
            if block == 0:
                # The mean of 3 x 3 pixels, zeros around the image counted.
                window = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).mean((4, 5))
                x = torch.cat([out, window], 1).relu()
            else:
                x = (out + x).relu()
    return classify(state, x, "linear")


def reference_shuffle_v2(state, x, blocks):
    x = conv_bn(state, "conv1", "bn1", x).relu()

    def step(name, index, x, stride=1):
        return conv_bn(state, f"{name}.conv{index}", f"{name}.bn{index}", x, stride)

    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            if block == 0:
                left = step(name, 2, step(name, 1, x, 2)).relu()
                right = step(name, 4, step(name, 3, x).relu(), 2)
                right = step(name, 5, right).relu()
            else:
                left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
                right = step(name, 2, step(name, 1, right).relu())
                right = step(name, 3, right).relu()
            x = shuffled(torch.cat([left, right], 1), 2)
    x = conv_bn(state, "conv2", "bn2", x).relu()
    return classify(state, x, "linear")


@pytest.mark.parametrize(
    ("name", "reference", "blocks"),
    [
        ("resnet14", reference_resnet, 2),
        ("resnet20a", reference_resnet, 3),
        ("resnet8x4", reference_resnet, 1),
        ("wrn_16_1", reference_wrn, 2),
        ("wrn_16_2", reference_wrn, 2),
        ("vgg8", reference_vgg, (1, 1, 1, 1, 1)),
        ("vgg13", reference_vgg, (2, 2, 2, 2, 2)),
        ("MobileNetV2", reference_mobilenet, (1, 2, 3, 4, 3, 3, 1)),
        ("ShuffleV1", reference_shuffle_v1, (4, 8, 4)),
        ("ShuffleV2", reference_shuffle_v2, (4, 8, 4)),
    ],
)
def test_forward_is_the_paper_arithmetic(name, reference, blocks):
    torch.manual_seed(1)
    model = random_statistics(build_model(name, 10)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        state = Read(model.state_dict())
        expected = reference(state, images, blocks)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    assert state.unread() == set(), "names are the published ones, all of them"


def test_vgg_pools_images_of_64_pixels_once_more():
    torch.manual_seed(1)
    model = random_statistics(build_model("vgg8", 10)).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = reference_vgg(model.state_dict(), images, (1, 1, 1, 1, 1))
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [18, 50])
def test_large_resnets_are_torchvisions_with_another_stem(depth):
    """An oracle that shares no line with ours: torchvision's ResNet, its stem exchanged."""
    torch.manual_seed(2)
    own = random_statistics(build_model(f"ResNet{depth}", 10))
    other = build_model(f"torchvision:resnet{depth}", 10).eval()
    other.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    other.maxpool = torch.nn.Identity()
    names = {"linear.": "fc.", ".shortcut.": ".downsample."}
    state = own.state_dict()
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    other.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "ResNet18", "MobileNetV2"])
def test_initial_convolutions_are_kaiming_fan_out(name):
    torch.manual_seed(2)
    model = build_model(name, 10)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            weight = module.weight
            deviation = (2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])) ** 0.5
            assert weight.std().item() == pytest.approx(deviation, rel=0.06), key
            assert abs(weight.mean().item()) < 0.1 * deviation, key
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            assert not module.bias.any(), key
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all(), key
            assert (module.bias == 0).all(), key


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2"])
def test_initial_classifiers_are_narrow(name):
    torch.manual_seed(3)
    model = build_model(name, 100)
    weight, bias = list(model.parameters())[-2:]
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not bias.any()
