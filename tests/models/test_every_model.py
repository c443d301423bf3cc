"""Promises that every model of the zoo keeps: gradients, memory formats, autocast, seeds, files."""

import pytest
import torch
import torch.distributed as dist
from deterministic_ops import DeterministicOnly
from test_zoo import NAMES, TRANSFORMERS, WITH_ALIASES, needs_timm
from torch.nn.parallel import DistributedDataParallel

from ekd_ray.errors import UserError
from ekd_ray.models import ALIASES, build_model, load_weights, read_metadata, save_weights


def built(name, seed=0, classes=10):
    torch.manual_seed(seed)
    return build_model(name, classes)


def images_for(name, count=2):
    side = 224 if name in TRANSFORMERS or name in ALIASES else 32
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, side, side, generator=generator)


@pytest.fixture(scope="module", params=WITH_ALIASES)
def model(request):
    """One model of each name, built once: pytest runs all tests of a model in a row."""
    return built(request.param)


@pytest.fixture
def name(model):
    return model.ekd_name


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


# First in the file: later tests train the shared model.
def test_building_depends_on_the_global_seed_alone(model, name):
    assert_equal(built(name).state_dict(), model.state_dict())
    assert all(not p.is_meta and p.dtype == torch.float32 for p in model.parameters())


def test_gradient_reaches_every_parameter(model, name):
    """So that DDP needs no search for unused parameters; by what a GPU can compute repeatably."""
    model.train().zero_grad(set_to_none=True)
    with DeterministicOnly():
        logits = model(images_for(name))
        logits.square().sum().backward()
    assert (logits.shape, logits.dtype) == ((2, 10), torch.float32)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad, key
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_memory_format_does_not_matter(model, name):
    image = images_for(name)[:1]
    model.eval()
    with torch.no_grad():
        expected = model(image)
        model.to(memory_format=torch.channels_last)
        logits = model(image.to(memory_format=torch.channels_last))
        model.to(memory_format=torch.contiguous_format)
    assert expected.std() > 0
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


# Last of the shared model's tests: it overwrites the weights.
def test_a_published_pickle_loads_and_is_recognised(model, name, tmp_path):
    """Every tensor holds its own number, stored once: whole weights would fill half a gigabyte."""
    numbered = {
        key: torch.full((), index, dtype=value.dtype).expand(value.shape)
        for index, (key, value) in enumerate(model.state_dict().items())
    }
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"model": numbered, "epoch": 240}, path)
    metadata = load_weights(model, path)
    assert_equal(model.state_dict(), numbered)
    assert (metadata.layout, metadata.model, metadata.num_classes) == ("mdistiller", name, 10)
    found = read_metadata(path)
    assert (found.layout, found.num_classes) == ("mdistiller", 10)
    assert found.model == (name if name in NAMES else None)


# One of each kind of block, as small as it comes: bfloat16 is slow on many processors.
SMALL = [
    *("resnet8", "resnet20a", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
    *("ResNet18", "T2T_ViT_7"),
]


@pytest.mark.parametrize("name", SMALL)
def test_autocast_to_bfloat16(name):
    """Forward and backward in channels_last, as training runs: no in-place error, all finite."""
    model, images = built(name).to(memory_format=torch.channels_last), images_for(name)
    images = images.to(memory_format=torch.channels_last)
    images = images[:1] if name in TRANSFORMERS else images[:, :, ::2, ::2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_timm
def test_an_alias_and_its_library_name_are_one_model(tmp_path):
    source = built("PiT_Ti")
    for saved, other in (("PiT_Ti", "timm:pit_ti_224"), ("timm:pit_ti_224", "PiT_Ti")):
        path = tmp_path / "m"
        save_weights(source, path, model_name=saved, num_classes=10, mean=None, std=None)
        target = built(other, seed=1)
        assert load_weights(target, path).model == saved
        assert_equal(target.state_dict(), source.state_dict())
        with pytest.raises(UserError, match=f"holds a '{saved}', the model is a 'resnet8'"):
            load_weights(built("resnet8"), path)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def two_steps(module, images):
    for _ in range(2):  # a parameter without gradient is an error at the second forward
        module(images).square().mean().backward()


def test_distributed_data_parallel(process_group):
    for name in ("resnet8", "MobileNetV2", "ShuffleV2", "T2T_ViT_7"):
        two_steps(DistributedDataParallel(built(name)), images_for(name))
    unused = built("resnet8")
    unused.surplus = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        two_steps(DistributedDataParallel(unused), images_for("resnet8"))
