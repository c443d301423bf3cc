"""One interface for decoded and encoded images; what is decoded ahead changes nothing."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from ekd_ray.data import (
    DATASETS,
    EncodedImages,
    StagedImages,
    apply_views,
    check_view_scheme,
    epoch_batches,
    load_dataset,
    stage_images,
)
from ekd_ray.data.decode import decode_view
from ekd_ray.data.views import crop_bits
from ekd_ray.errors import UserError


@dataclass
class InMemory:
    """Pictures of an encoded split; notes what is read, and by which threads."""

    images: list
    asked: list = field(default_factory=list)
    threads: set = field(default_factory=set)
    seen: dict = field(default_factory=dict)

    def __post_init__(self):
        self.seen = {i: threading.Event() for i in range(len(self.images))}

    def read(self, index):
        self.asked.append(index)
        self.threads.add(threading.current_thread())
        self.seen[index].set()
        return self.images[index]

    def name(self, index):
        return f"the image {index}"


@pytest.fixture
def encoded(make):
    """20 pictures of different sizes, some PNG and some JPEG."""
    data = [make.picture(40 + i, 60 - i, i, ("PNG", "JPEG")[i % 2]) for i in range(20)]
    labels = np.arange(20, dtype=np.int64) % 5
    return EncodedImages("toy", "train", labels, tuple("abcde"), "f" * 16, 224, InMemory(data))


@pytest.fixture(params=["decoded", "encoded"])
def stage(request, encoded):
    if request.param == "decoded":
        return stage_images(load_dataset("synthetic", "test"), "cpu", scheme="crop_flip")
    return stage_images(encoded, "cpu", scheme="resized_crop", image_size=16, pool=9, seed=4)


def batches(stage, n=20, **changes):
    wanted = {"batch_size": 6, "seed": 1, "epoch": 2, "num_views": stage.num_views} | changes
    return list(epoch_batches(np.arange(n), **wanted))


def decoders():
    return [t for t in threading.enumerate() if t.name.startswith("ekd-decode")]


def test_views_of_decoded_images(recwarn):
    arrays = load_dataset("synthetic", "test")
    stage = stage_images(arrays, "cpu", scheme="crop_flip")
    assert stage.images.data_ptr() == arrays.images.ctypes.data  # nothing was copied
    assert not [w for w in recwarn if "writable" in str(w.message)]
    ids, views = np.array([7, 7, 499]), np.array([0, 161, 80])
    images, labels = stage.views(ids, views)
    originals = torch.from_numpy(np.array(arrays.images[ids]))
    assert torch.equal(images, apply_views(originals, torch.tensor(views), "crop_flip"))
    assert labels.tolist() == arrays.labels[ids].tolist()
    plain, _ = stage.views(ids, None)
    assert torch.equal(plain, originals)
    plain.zero_()  # a copy: the map is not touched
    assert torch.equal(stage.views(ids, None)[0], originals)


def test_views_of_encoded_images(encoded):
    stage = stage_images(encoded, "cpu", scheme="resized_crop", image_size=16, seed=4)
    ids, views = np.array([7, 7, 19]), np.array([0, 63, 5])
    images, labels = stage.views(ids, views)
    assert (images.dtype, images.shape, images.is_contiguous()) == (torch.uint8, (3, 3, 16, 16), 1)
    for row, (i, bits) in enumerate(zip(ids, crop_bits(ids, views, 4), strict=True)):
        want = decode_view(encoded.pictures.images[i], "", 16, bits)
        np.testing.assert_array_equal(images[row].numpy(), want)
    assert labels.tolist() == [2, 2, 4]
    plain, _ = stage.views(ids, None)
    want = decode_view(encoded.pictures.images[7], "", 16, None)
    np.testing.assert_array_equal(plain[0].numpy(), want)
    other = stage_images(encoded, "cpu", scheme="resized_crop", image_size=16, seed=5)
    assert not torch.equal(other.views(ids, views)[0], images)
    default = stage_images(encoded, "cpu", scheme="none")
    assert (default.num_views, default.image_size) == (1, 224)
    small = stage_images(encoded, "cpu", scheme="none", image_size=16)
    assert torch.equal(small.views(ids, views * 0)[0], plain)


def test_a_view_depends_on_nothing_else(stage):
    ids, views = np.arange(20), np.arange(20) % stage.num_views
    images, _ = stage.views(ids, views)
    turn = np.random.default_rng(0).permutation(20)[:7]
    assert torch.equal(stage.views(ids[turn], views[turn])[0], images[torch.tensor(turn)])
    for i in (0, 13):
        assert torch.equal(stage.views([i], [views[i]])[0][0], images[i])
    assert stage.views([], [])[0].shape == (0, 3, stage.image_size, stage.image_size)


@pytest.mark.parametrize("bad", [[20_000], [-1]])
def test_ids_out_of_range(stage, bad):
    with pytest.raises(IndexError):
        stage.views(bad, [0])


@pytest.mark.parametrize("threads", [1, 3])
def test_stream_is_views(stage, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = batches(stage)
        got = list(stage.stream(iter(wanted)))
    finally:
        torch.set_num_threads(before)
    assert [batch for batch, _, _ in got] == wanted
    assert len(got) == 3
    for batch, images, labels in got:
        want, want_labels = stage.views(batch.sample_ids, batch.view_ids)
        assert torch.equal(images, want)
        assert torch.equal(labels, want_labels)
    assert list(stage.stream([])) == []
    assert not decoders()


def test_evaluation_is_in_order_and_complete(stage):
    ids = np.array([5, 1, 19, 2, 2, 8, 11])
    parts = list(stage.evaluation(ids, 3))
    assert [len(labels) for _, labels in parts] == [3, 3, 1]
    images, labels = stage.views(ids, None)
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert list(stage.evaluation([], 3)) == []
    assert not decoders()


def test_one_batch_is_decoded_ahead(encoded):
    stage = stage_images(encoded, "cpu", scheme="resized_crop", image_size=16)
    pulled = []
    wanted = batches(stage)
    stream = stage.stream(b for b in wanted if pulled.append(b.step) is None)
    assert encoded.pictures.asked == []
    next(stream)
    assert pulled == [0, 1]
    for i in wanted[1].sample_ids:  # although nobody has asked for the second batch
        assert encoded.pictures.seen[i].wait(60)
    stream.close()
    assert set(encoded.pictures.asked) == {*wanted[0].sample_ids, *wanted[1].sample_ids}


def test_threads_are_torchs_and_end(encoded):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stage = stage_images(encoded, "cpu", scheme="resized_crop", image_size=16)
        stream = stage.stream(batches(stage))
        next(stream)
        assert 1 <= len(decoders()) <= 3
        stream.close()
        assert not decoders()
        next(stage.stream(batches(stage)))  # dropped without being closed
        assert not decoders()
        next(stage.evaluation(np.arange(20), 4))
        assert not decoders()
    finally:
        torch.set_num_threads(before)
    assert threading.main_thread() not in encoded.pictures.threads
    assert len(encoded.pictures.threads) <= 3 * 3


def test_a_bad_picture_is_reported_in_its_turn(encoded):
    stage = stage_images(encoded, "cpu", scheme="resized_crop", image_size=16)
    wanted = batches(stage)
    bad = int(wanted[1].sample_ids[2])
    encoded.pictures.images[bad] = encoded.pictures.images[bad][:-30]
    stream = stage.stream(wanted)
    _, images, _ = next(stream)
    assert torch.equal(images, stage.views(wanted[0].sample_ids, wanted[0].view_ids)[0])
    with pytest.raises(UserError, match=f"^the image {bad} is not a readable"):
        next(stream)
    assert not decoders()
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(UserError, match=f"the image {bad} "):
        stage.views([0 if bad else 1, bad], None)
    with pytest.raises(UserError, match=f"the image {bad} "):
        list(stage.evaluation(np.arange(20), 4))
    assert not decoders()


# ---- what is refused


def refusals(arrays, info, **asked):
    """The text of the refusal, which is the same before and after loading."""
    with pytest.raises(UserError) as caught:
        stage_images(arrays, "cpu", **asked)
    with pytest.raises(UserError) as early:
        check_view_scheme(info, asked["scheme"], asked.get("image_size"))
    assert str(early.value) == str(caught.value).replace("toy", "imagenet")
    return str(caught.value)


def test_refused_for_decoded_images():
    arrays, info = load_dataset("synthetic", "test"), DATASETS["synthetic"]
    text = refusals(arrays, info, scheme="resized_crop")
    assert "does not serve synthetic" in text
    assert "crop_flip, crop8_flip, crop or none" in text
    assert "Did you mean 'crop_flip'" in refusals(arrays, info, scheme="crop_flop")
    text = refusals(arrays, info, scheme="crop_flip", image_size=64)
    assert "image_size of synthetic is fixed at 32, got 64" in text
    assert stage_images(arrays, "cpu", scheme="none", image_size=32).num_views == 1
    with pytest.raises(UserError, match="cut while"):
        StagedImages(arrays, scheme="resized_crop")


def test_refused_for_encoded_images(encoded):
    info = DATASETS["imagenet"]
    for scheme in ("crop_flip", "crop8_flip", "crop"):
        assert "choose resized_crop or none" in refusals(encoded, info, scheme=scheme)
    for size in (7, 1025, 0, -3):
        text = refusals(encoded, info, scheme="resized_crop", image_size=size)
        assert f"image_size must be 8 to 1024 for toy, got {size}" in text
    with pytest.raises(UserError, match="pool of views must hold 1 or more, got 0"):
        stage_images(encoded, "cpu", scheme="resized_crop", pool=0)
    check_view_scheme(info, "resized_crop", 160)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_threads_decode_as_are_asked_for(count, encoded, monkeypatch):
    meeting = threading.Barrier(count, timeout=30)  # fewer would never all be there

    def decode(*args):
        meeting.wait()
        return decode_view(*args)

    monkeypatch.setattr("ekd_ray.data.staging.decode_view", decode)
    stage = stage_images(encoded, "cpu", scheme="none", image_size=16, threads=count)
    stage.views(np.arange(count * 4), None)
    assert len(encoded.pictures.threads) == count


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stream_does_not_wait_for_the_gpu(encoded):
    asked = {"scheme": "resized_crop", "image_size": 16}
    stage, host = (stage_images(encoded, device, **asked) for device in ("cuda", "cpu"))
    wanted = batches(stage)
    list(stage.stream(wanted))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(stage.stream(wanted))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (batch, images, labels), (_, want, want_labels) in zip(
        got, host.stream(wanted), strict=True
    ):
        assert images.is_cuda and batch in wanted
        assert torch.equal(images.cpu(), want)
        assert torch.equal(labels.cpu(), want_labels)
