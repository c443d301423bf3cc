"""Random resized crops against torchvision's rule and PIL's own crop, resize and mirror."""

import io
import math
import types
import zlib

import numpy as np
import pytest
import torchvision.transforms.transforms as tv
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ekd_ray.data.counter import STREAM_CROP, counter_hash
from ekd_ray.data.decode import decode_any, decode_fixed, decode_view
from ekd_ray.data.views import crop_bits, crop_box, crop_flips, evaluation_region
from ekd_ray.errors import UserError

BILINEAR = Image.Resampling.BILINEAR
THEIRS = tv.RandomResizedCrop(8)
SCALE, RATIO = list(THEIRS.scale), list(THEIRS.ratio)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fed(numbers):
    """torch as torchvision's RandomResizedCrop uses it, with its random numbers given."""
    state = types.SimpleNamespace(tries=-1, parts=0)

    class Value(float):
        def item(self):
            return float(self)

    class Empty:
        def uniform_(self, low, high):
            if state.parts == 0:
                state.tries += 1
            draw = numbers[4 * state.tries + state.parts]
            state.parts = 1 - state.parts
            return Value(low + (high - low) * draw)

    def randint(low, high, size):
        assert low == 0
        draw = numbers[4 * state.tries + 2 + state.parts]
        state.parts += 1
        return types.SimpleNamespace(item=lambda: math.floor(draw * high))

    return types.SimpleNamespace(
        tensor=list,
        log=lambda values: [math.log(value) for value in values],
        exp=lambda value: Value(math.exp(value)),
        empty=lambda count: Empty(),
        randint=randint,
    )


def torchvision_box(width, height, numbers):
    """(left, top, width, height) of the original, fed with our uniform numbers."""
    saved, tv.torch = tv.torch, fed(numbers)
    try:
        image = Image.new("1", (width, height))
        top, left, h, w = tv.RandomResizedCrop.get_params(image, SCALE, RATIO)
    finally:
        tv.torch = saved
    return left, top, w, h


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**40),
    st.integers(0, 1000),
    st.integers(-(2**63), 2**63),
)
def test_boxes_are_torchvisions(width, height, sample, view, seed):
    bits = crop_bits([sample], [view], seed)[0]
    # 53 bits decide a length and 32 a place, as the docstrings say.
    numbers = [(int(b) >> 11) / 2**53 for b in bits]
    for first in range(0, 40, 4):
        numbers[first + 2 : first + 4] = [(int(b) >> 32) / 2**32 for b in bits[first + 2 :][:2]]
    box = crop_box(width, height, bits)
    assert tuple(box) == torchvision_box(width, height, numbers)
    assert 0 <= box.left <= box.left + box.width <= width
    assert 0 <= box.top <= box.top + box.height <= height
    assert min(box.width, box.height) >= 1


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))]
)
def test_what_never_fits_is_cut_in_the_centre(size, box):
    # All tries ask for the whole area at ratio 1.
    middle = np.full(41, 2**63 - 1, dtype=np.uint64)
    middle[0:40:4] = 2**64 - 1
    assert crop_box(*size, middle) == box


def test_bits_belong_to_seed_sample_and_view():
    samples, views = np.array([5, 0, 2**33]), np.array([1, 63, 7])
    bits = crop_bits(samples, views, 11)
    assert bits.shape == (3, 41)
    for row in range(3):
        for k in (0, 7, 40):
            want = counter_hash(11, STREAM_CROP, int(samples[row]), int(views[row]), k)
            assert bits[row, k] == want
    assert (crop_bits(samples, views, 12) != bits).all()


def test_a_view_is_crop_resize_and_mirror():
    image = noise(90, 70)
    data = encoded(image)
    flips = set()
    for view, bits in enumerate(crop_bits([3] * 24, np.arange(24), 0)):
        left, top, w, h = crop_box(90, 70, bits)
        want = image.crop((left, top, left + w, top + h)).resize((32, 32), BILINEAR)
        if crop_flips(bits):
            want = want.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        got = decode_view(data, "x", 32, bits)
        assert (got.dtype, got.shape) == (np.uint8, (3, 32, 32))
        np.testing.assert_array_equal(got, np.asarray(want).transpose(2, 0, 1), err_msg=view)
        flips.add(crop_flips(bits))
    assert flips == {True, False}


@pytest.mark.parametrize("width", [500, 333])
def test_usual_jpegs_are_not_drafted(width):
    data = encoded(noise(width, 375), "JPEG")
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for bits in crop_bits(np.arange(6), [0] * 6, 0):
        left, top, w, h = crop_box(width, 375, bits)
        want = TF.resized_crop(image, top, left, h, w, [128, 128], TF.InterpolationMode.BILINEAR)
        want = TF.hflip(want) if crop_flips(bits) else want
        got = decode_view(data, "x", 128, bits)
        np.testing.assert_array_equal(got, np.asarray(want).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (1000, 60), (61, 301)])
@pytest.mark.parametrize("side", [224, 160])
def test_evaluation_is_resize_and_centre_crop(size, side):
    image = noise(*size)
    want = TF.center_crop(TF.resize(image, [round(side * 256 / 224)]), [side, side])
    got = decode_view(encoded(image), "x", side, None)
    # PIL rounds between its two passes, and their order depends on how much is asked for.
    difference = np.abs(got.astype(int) - np.asarray(want, dtype=int).transpose(2, 0, 1))
    assert difference.max() <= 1
    region = evaluation_region(*size, side)
    assert 0 <= region.left < region.right <= size[0]
    assert 0 <= region.top < region.bottom <= size[1]


@pytest.mark.parametrize("bits", [None, *crop_bits([0, 1, 2, 5], [0] * 4, 0)])
def test_large_jpegs_are_drafted_and_look_the_same(make, monkeypatch, bits):
    data = make.picture(2000, 1500, kind="JPEG")
    got = decode_view(data, "x", 64, bits)
    drafts = []
    monkeypatch.setattr(JpegImageFile, "draft", lambda *args: drafts.append(args))
    want = decode_view(data, "x", 64, bits)
    assert drafts  # the first time it was not patched away
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 3


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = encoded(noise(40, 40).convert(mode), kind)
    rgb = Image.open(io.BytesIO(data)).convert("RGB")
    want = np.asarray(rgb.resize((46, 46), BILINEAR))[3:43, 3:43]
    got = decode_view(data, "x", 40, None).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
    if kind == "PNG":
        np.testing.assert_array_equal(decode_fixed(data, "x", 40, "d"), np.asarray(rgb))


def test_16_bit_files_are_scaled_and_not_clipped():
    """By each function that reads files: of folders, of shards, of sizes that are known."""
    exact = np.asarray(noise(40, 40).convert("L"))
    data = encoded(Image.fromarray(exact.astype(np.uint16) * 257 + 128))
    for pixels in (decode_any(data, "x"), decode_fixed(data, "x", 40, "d")):
        np.testing.assert_array_equal(pixels, np.repeat(exact[:, :, None], 3, axis=2))
    plain = encoded(Image.fromarray(exact))
    np.testing.assert_array_equal(
        decode_view(data, "x", 32, None), decode_view(plain, "x", 32, None)
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(make, kind):
    data = make.picture(50, 40, kind=kind)
    decode_view(data, "x", 16, None)
    with pytest.raises(
        UserError, match=r"^the image x is not a readable JPEG, PNG, WEBP, BMP, TIFF or"
    ):
        decode_view(data[: len(data) // 2], "the image x", 16, None)


def test_a_bomb_is_refused_by_its_header():
    small = encoded(noise(8, 8))
    bomb = bytearray(small)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR's width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="DecompressionBombError"):
        decode_view(bytes(bomb), "x", 16, None)
