"""Promises that every model of the zoo keeps: gradients, memory formats, autocast, seeds, files."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from deterministic_ops import DeterministicOnly
from test_zoo import NAMES, TRANSFORMERS, WITH_ALIASES, needs_timm
from torch.nn.parallel import DistributedDataParallel

from ekd_ray.errors import UserError
from ekd_ray.models import ALIASES, build_model, load_weights, read_metadata, save_weights
from ekd_ray.models.model_checks import MODEL_CHECKS, ModelCase, check_autocast, check_gradients
from ekd_ray.testing import run_check


def built(name, seed=0, classes=10):
    torch.manual_seed(seed)
    return build_model(name, classes)


def images_for(name, count=2):
    side = 224 if name in TRANSFORMERS or name in ALIASES else 32
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, side, side, generator=generator)


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key


@pytest.fixture(scope="module", params=WITH_ALIASES)
def case(request):
    """One model of each name, built once: pytest runs all tests of a model in a row."""
    return ModelCase(request.param, 224 if request.param in {*TRANSFORMERS, *ALIASES} else 32)


# bfloat16 is slow on many processors: only one of each kind of block, as small as it comes.
SMALL = {
    *("resnet8", "resnet20a", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"),
    *("ResNet18", "T2T_ViT_7"),
}


@pytest.mark.quick_ids(
    "resnet8-",
    "wrn_16_1",
    "vgg8",
    "MobileNetV2-",
    "ShuffleV1",
    "ShuffleV2-",
    "ResNet18-",
    "T2T_ViT_7",
)
@pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
def test_the_model_keeps_to(case, check):
    """Gradients by what a GPU can compute repeatably."""
    if check is check_autocast and case.model not in SMALL:
        pytest.skip("slow")
    with DeterministicOnly() if check is check_gradients else contextlib.nullcontext():
        run_check(check, case)


# Last of the shared model's tests: it overwrites the weights.
@pytest.mark.quick_ids("resnet8-", "resnet8]", "wrn_16_1", "vgg8", "ShuffleV1", "T2T_ViT_7")
def test_a_published_pickle_loads_and_is_recognised(case, tmp_path):
    """Every tensor holds its own number, stored once: whole weights would fill half a gigabyte."""
    model, name = case.built, case.model
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
