"""Every view against torchvision's own pad, crop and flip."""

import pytest
import torch
import torchvision.transforms.functional as TF

from ekd_ray.data import (
    apply_views,
    normalize,
    view_count,
)


def images(n, height=32, width=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 28)])
@pytest.mark.parametrize(
    ("scheme", "count", "pad"), [("crop_flip", 162, 4), ("crop", 81, 4), ("crop8_flip", 578, 8)]
)
def test_every_view(scheme, count, pad, height, width):
    assert view_count(scheme) == count
    batch = images(count, height, width)
    got = apply_views(batch, torch.arange(count), scheme)
    assert got.dtype == torch.uint8
    assert got.shape == batch.shape
    side = 2 * pad + 1
    for flip in range(count // side**2):
        for dy in range(side):
            for dx in range(side):
                view = (flip * side + dy) * side + dx
                want = TF.crop(TF.pad(batch[view], [pad]), dy, dx, height, width)
                want = TF.hflip(want) if flip else want
                assert torch.equal(got[view], want), (flip, dy, dx)


def test_inputs_stay_as_they_are_and_any_order_works():
    batch, ids = images(50), torch.randint(0, 162, (50,))
    before, ids_before = batch.clone(), ids.clone()
    got = apply_views(batch, ids, "crop_flip")
    assert torch.equal(batch, before)
    assert torch.equal(ids, ids_before)
    turn = torch.randperm(50)
    assert torch.equal(apply_views(batch[turn], ids[turn], "crop_flip"), got[turn])
    assert apply_views(batch[:0], ids[:0], "crop_flip").shape == (0, 3, 32, 32)
    strided = batch.to(memory_format=torch.channels_last)
    assert torch.equal(apply_views(strided, ids, "crop_flip"), got)


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize(channels_last):
    mean, std = [0.5, 0.4, 0.3], (0.2, 0.25, 0.3)
    batch = images(4)
    got = normalize(batch, mean, std, channels_last=channels_last)
    want = torch.stack([TF.normalize(x.double() / 255, mean, list(std)) for x in batch])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=order)


def test_normalize_constants_survive_inference_mode():
    with torch.inference_mode():
        normalize(images(1), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    (normalize(images(1), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    batch, ids = images(64).cuda(), torch.randint(0, 162, (64,)).cuda()
    normalize(batch, (0.5,) * 3, (0.2,) * 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = normalize(apply_views(batch, ids, "crop_flip"), (0.5,) * 3, (0.2,) * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(
        apply_views(batch, ids, "crop_flip").cpu(), apply_views(batch.cpu(), ids.cpu(), "crop_flip")
    )
    assert got.is_cuda
