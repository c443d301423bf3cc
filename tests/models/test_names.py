"""Tensor names and shapes are those of mdistiller and of the transformers' authors, all of them."""

import pytest

from ekd_ray.models import build_model


def convolution(name, planes, channels, kernel, bias=False):
    shapes = {f"{name}.weight": (planes, channels, kernel, kernel)}
    return shapes | ({f"{name}.bias": (planes,)} if bias else {})


def batch_norm(name, planes):
    vectors = ("weight", "bias", "running_mean", "running_var")
    shapes = {f"{name}.{vector}": (planes,) for vector in vectors}
    return shapes | {f"{name}.num_batches_tracked": ()}


def linear(name, inputs, outputs, bias=True):
    shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def united(*parts):
    whole = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole |= part
    return whole


def shapes_of(name, classes=7):
    return {
        key: tuple(value.shape) for key, value in build_model(name, classes).state_dict().items()
    }


def test_cifar_resnets():
    def expected(widths, shortcuts):
        parts = [convolution("conv1", widths[0], 3, 3), batch_norm("bn1", widths[0])]
        for stage in (1, 2, 3):
            name, width, before = f"layer{stage}.0", widths[stage], widths[stage - 1]
            parts += [
                convolution(f"{name}.conv1", width, before, 3),
                batch_norm(f"{name}.bn1", width),
                convolution(f"{name}.conv2", width, width, 3),
                batch_norm(f"{name}.bn2", width),
            ]
            if stage in shortcuts:
                parts.append(convolution(f"{name}.downsample.0", width, before, 1))
                parts.append(batch_norm(f"{name}.downsample.1", width))
        return united(*parts, linear("fc", widths[3], 7))

    assert shapes_of("resnet8") == expected((16, 16, 32, 64), (2, 3))
    assert shapes_of("resnet8x4") == expected((32, 64, 128, 256), (1, 2, 3))


def test_wide_resnets():
    def expected(widen, shortcuts):
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        parts = [convolution("conv1", 16, 3, 3), batch_norm("bn1", widths[3])]
        for stage in (1, 2, 3):
            for index in (0, 1):
                name, width = f"block{stage}.layer.{index}", widths[stage]
                before = widths[stage - 1] if index == 0 else width
                parts += [
                    batch_norm(f"{name}.bn1", before),
                    convolution(f"{name}.conv1", width, before, 3),
                    batch_norm(f"{name}.bn2", width),
                    convolution(f"{name}.conv2", width, width, 3),
                ]
                if index == 0 and stage in shortcuts:
                    parts.append(convolution(f"{name}.convShortcut", width, before, 1))
        return united(*parts, linear("fc", widths[3], 7))

    assert shapes_of("wrn_16_1") == expected(1, (2, 3))
    assert shapes_of("wrn_16_2") == expected(2, (1, 2, 3))


@pytest.mark.parametrize(("name", "counts"), [("vgg8", (1,) * 5), ("vgg16", (2, 2, 3, 3, 3))])
def test_vgg(name, counts):
    parts, before = [], 3
    for block, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        for index in range(count):
            parts.append(convolution(f"block{block}.{3 * index}", width, before, 3, bias=True))
            parts.append(batch_norm(f"block{block}.{3 * index + 1}", width))
            before = width
    assert shapes_of(name) == united(*parts, linear("classifier", 512, 7))


@pytest.mark.parametrize(("name", "times"), [("ResNet34", 1), ("ResNet50", 4)])
def test_large_resnets(name, times):
    parts, before = [convolution("conv1", 64, 3, 3), batch_norm("bn1", 64)], 64
    for stage, (count, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for index in range(count):
            name_of = f"layer{stage}.{index}"
            if times == 4:
                inner = [(width, before, 1), (width, width, 3), (4 * width, width, 1)]
            else:
                inner = [(width, before, 3), (width, width, 3)]
            for number, (planes, channels, kernel) in enumerate(inner, 1):
                parts.append(convolution(f"{name_of}.conv{number}", planes, channels, kernel))
                parts.append(batch_norm(f"{name_of}.bn{number}", planes))
            if before != times * width:
                parts.append(convolution(f"{name_of}.shortcut.0", times * width, before, 1))
                parts.append(batch_norm(f"{name_of}.shortcut.1", times * width))
            before = times * width
    assert shapes_of(name) == united(*parts, linear("linear", before, 7))


def test_mobilenet():
    parts, before = [convolution("conv1.0", 16, 3, 3), batch_norm("conv1.1", 16)], 16
    stages = [(1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)]
    for stage, (expansion, width, count) in enumerate(stages):
        for index in range(count):
            name, inner = f"blocks.{stage}.{index}.conv", expansion * before
            parts += [
                convolution(f"{name}.0", inner, before, 1),
                batch_norm(f"{name}.1", inner),
                convolution(f"{name}.3", inner, 1, 3),
                batch_norm(f"{name}.4", inner),
                convolution(f"{name}.6", width, inner, 1),
                batch_norm(f"{name}.7", width),
            ]
            before = width
    parts += [convolution("conv2.0", 1280, 160, 1), batch_norm("conv2.1", 1280)]
    assert shapes_of("MobileNetV2") == united(*parts, linear("classifier.0", 1280, 7))


def unit(name, *convolutions):
    """`convolutions`: (planes, channels per group, kernel) of conv1, conv2, ..."""
    parts = []
    for number, (planes, channels, kernel) in enumerate(convolutions, 1):
        parts.append(convolution(f"{name}.conv{number}", planes, channels, kernel))
        parts.append(batch_norm(f"{name}.bn{number}", planes))
    return united(*parts)


def test_shuffle_v1():
    parts, before = [convolution("conv1", 24, 3, 1), batch_norm("bn1", 24)], 24
    for stage, (count, width) in enumerate(((4, 240), (8, 480), (4, 960)), 1):
        for index in range(count):
            planes = width - before if index == 0 else width
            inner = planes // 4
            groups = 1 if before == 24 else 3
            parts.append(
                unit(
                    f"layer{stage}.{index}",
                    (inner, before // groups, 1),
                    (inner, 1, 3),
                    (planes, inner // 3, 1),
                )
            )
            before = width
    assert shapes_of("ShuffleV1") == united(*parts, linear("linear", 960, 7))


def test_shuffle_v2():
    parts, before = [convolution("conv1", 24, 3, 1), batch_norm("bn1", 24)], 24
    for stage, (count, width) in enumerate(((4, 116), (8, 232), (4, 464)), 1):
        half = width // 2
        right = [(half, before, 1), (half, 1, 3), (half, half, 1)]
        parts.append(unit(f"layer{stage}.0", (before, 1, 3), (half, before, 1), *right))
        for index in range(1, count):
            parts.append(
                unit(f"layer{stage}.{index}", (half, half, 1), (half, 1, 3), (half, half, 1))
            )
        before = width
    parts += [convolution("conv2", 1024, 464, 1), batch_norm("bn2", 1024)]
    assert shapes_of("ShuffleV2") == united(*parts, linear("linear", 1024, 7))


def test_pvt():
    parts, before, side = [], 3, 224
    stages = zip((4, 2, 2, 2), (64, 128, 320, 512), (8, 4, 2, 1), (8, 8, 4, 4), strict=True)
    for stage, (patch, width, reduction, expansion) in enumerate(stages, 1):
        side //= patch
        parts.append(convolution(f"patch_embed{stage}.proj", width, before, patch, bias=True))
        parts.append(layer_norm(f"patch_embed{stage}.norm", width))
        parts.append({f"pos_embed{stage}": (1, side * side + (stage == 4), width)})
        for index in (0, 1):
            name = f"block{stage}.{index}"
            parts += [
                layer_norm(f"{name}.norm1", width),
                linear(f"{name}.attn.q", width, width),
                linear(f"{name}.attn.kv", width, 2 * width),
                linear(f"{name}.attn.proj", width, width),
                layer_norm(f"{name}.norm2", width),
                linear(f"{name}.mlp.fc1", width, expansion * width),
                linear(f"{name}.mlp.fc2", expansion * width, width),
            ]
            if reduction > 1:
                parts.append(convolution(f"{name}.attn.sr", width, width, reduction, bias=True))
                parts.append(layer_norm(f"{name}.attn.norm", width))
        before = width
    parts += [layer_norm("norm", 512), {"cls_token": (1, 1, 512)}, linear("head", 512, 7)]
    assert shapes_of("PVT_Ti") == united(*parts)


def test_t2t():
    parts = [{"cls_token": (1, 1, 256), "pos_embed": (1, 197, 256)}]
    for number, width in ((1, 147), (2, 576)):
        name = f"tokens_to_token.attention{number}"
        parts += [
            {f"{name}.w": (32, 64)},
            linear(f"{name}.kqv", width, 192),
            linear(f"{name}.proj", 64, 64),
            layer_norm(f"{name}.norm1", width),
            layer_norm(f"{name}.norm2", 64),
            linear(f"{name}.mlp.0", 64, 64),
            linear(f"{name}.mlp.2", 64, 64),
        ]
    parts.append(linear("tokens_to_token.project", 576, 256))
    for index in range(7):
        name = f"blocks.{index}"
        parts += [
            layer_norm(f"{name}.norm1", 256),
            linear(f"{name}.attn.qkv", 256, 768, bias=False),
            linear(f"{name}.attn.proj", 256, 256),
            layer_norm(f"{name}.norm2", 256),
            linear(f"{name}.mlp.fc1", 256, 512),
            linear(f"{name}.mlp.fc2", 512, 256),
        ]
    parts += [layer_norm("norm", 256), linear("head", 256, 7)]
    assert shapes_of("T2T_ViT_7") == united(*parts)
