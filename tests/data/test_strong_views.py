"""Strong views against Pillow, image by image; their draws against big integers and scipy."""

import numpy as np
import pytest
import torch
from counter_oracle import counter_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import stats

from ekd_ray.data.counter import STREAM_STRONG
from ekd_ray.data.strong_views import (
    STRONG_OPS,
    StrongDraw,
    strong_augment,
    strong_base_views,
    strong_draws,
)


def affine(*matrix):
    return lambda image, v: image.transform(
        image.size,
        Image.Transform.AFFINE,
        [c(v, *image.size) if callable(c) else c for c in matrix],
    )


# The published operations, in their order, with their ranges.
PUBLISHED = {
    "AutoContrast": (lambda image, v: ImageOps.autocontrast(image), 0, 1),
    "Brightness": (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95),
    "Color": (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95),
    "Contrast": (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95),
    "Equalize": (lambda image, v: ImageOps.equalize(image), 0, 1),
    "Identity": (lambda image, v: image, 0, 1),
    "Posterize": (lambda image, v: ImageOps.posterize(image, int(v)), 4, 8),
    "Rotate": (lambda image, v: image.rotate(v), -30, 30),
    "Sharpness": (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95),
    "ShearX": (affine(1, lambda v, w, h: v, 0, 0, 1, 0), -0.3, 0.3),
    "ShearY": (affine(1, 0, 0, lambda v, w, h: v, 1, 0), -0.3, 0.3),
    "Solarize": (lambda image, v: ImageOps.solarize(image, v), 0, 256),
    "TranslateX": (affine(1, 0, lambda v, w, h: v * w, 0, 1, 0), -0.3, 0.3),
    "TranslateY": (affine(1, 0, 0, 0, 1, lambda v, w, h: v * h), -0.3, 0.3),
}
NAMES = list(PUBLISHED)
IDENTITY = NAMES.index("Identity")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")


def cutout(image, side, x, y):
    width, height = image.size
    side, x, y = side * width, x * width, y * height
    if side <= 0:
        return image
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    image = image.copy()
    corners = (left, top, min(width, left + side), min(height, top + side))
    ImageDraw.Draw(image).rectangle(corners, (125, 123, 114))
    return image


def pillow(images, draw):
    """The images as the published pipeline makes them, one by one."""
    results = []
    for pixels, ops, values, hole in zip(
        images.numpy(), draw.ops, draw.values, draw.cutout, strict=True
    ):
        image = Image.fromarray(pixels.transpose(1, 2, 0).copy())
        for op, value in zip(ops, values, strict=True):
            image = PUBLISHED[NAMES[op]][0](image, float(value))
        results.append(np.asarray(cutout(image, *map(float, hole))).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(results))


def pictures(n, height, width, seed=0):
    """Noise, narrow noise (for stretching), ramps (smooth) and, now and then, a flat channel."""
    rng = np.random.default_rng(seed)
    shape = (n, 3, height, width)
    low = rng.integers(0, 200, (n, 3, 1, 1))
    noise = rng.integers(0, 256, shape)
    narrow = rng.integers(low, low + rng.integers(1, 56, (n, 3, 1, 1)), shape)
    ramp = np.linspace(0, 255, height * width).reshape(height, width) * np.ones(shape)
    kind = rng.integers(0, 3, (n, 1, 1, 1))
    pixels = np.choose(kind, [noise, narrow, ramp.astype(int)])
    pixels[::7, 1] = 77
    return torch.from_numpy(pixels.astype(np.uint8))


def draw_of(ops, values, hole=(0.0, 0.0, 0.0)):
    n = len(ops)
    return StrongDraw(
        np.asarray(ops, dtype=np.int64).reshape(n, 2),
        np.asarray(values, dtype=np.float32).reshape(n, 2),
        np.asarray(np.broadcast_to(hole, (n, 3)), dtype=np.float32),
    )


def levels_off(got, want):
    return (got.int() - want.int()).abs()


def test_the_table_is_the_published_one():
    assert [(op.name, op.low, op.high) for op in STRONG_OPS] == [
        (name, low, high) for name, (_, low, high) in PUBLISHED.items()
    ]


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(
    ("height", "width", "n"), [(32, 32, 60), (64, 64, 30), (20, 45, 60), (224, 224, 4)]
)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation(name, height, width, n, slot):
    _, low, high = PUBLISHED[name]
    batch = pictures(n, height, width)
    ops = np.full((n, 2), IDENTITY)
    ops[:, slot] = NAMES.index(name)
    values = np.random.default_rng(slot).uniform(low, high, (n, 2))
    values[:2, slot] = low, high
    draw = draw_of(ops, values)
    wrong = levels_off(strong_augment(batch, draw), pillow(batch, draw))
    if name in BLENDS:  # a compiler may have fused Pillow's product and sum
        assert wrong.max() <= 1
        assert (wrong > 0).float().mean() < 1e-3
    elif name == "Rotate":  # a cosine may round to another 2^-16
        assert (wrong > 0).float().mean() < 1e-3
    else:
        assert wrong.max() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("Rotate", 0.0), ("ShearX", 0.0), ("ShearY", 0.0), ("Posterize", 4.9999), ("Solarize", 127.5)]
    + [(f"Translate{axis}", shift / 64) for axis in "XY" for shift in (-19, -1, 0, 1, 13)],
)
def test_values_at_the_border_of_two_outcomes(name, value):
    """Shifts by half pixels among them."""
    batch = pictures(12, 32, 32)
    draw = draw_of([(NAMES.index(name), IDENTITY)] * 12, [(value, 0.5)] * 12)
    assert torch.equal(strong_augment(batch, draw), pillow(batch, draw))


@pytest.mark.slow
def test_autocontrast_of_every_range():
    """Lowest, highest and all levels between: many results are whole up to the last bit."""
    low, high = (ends[::3] for ends in np.triu_indices(256))
    levels = np.clip(np.arange(256), low[:, None], high[:, None])
    keep = len(levels) // 3 * 3
    batch = torch.from_numpy(levels[:keep].astype(np.uint8)).view(-1, 3, 16, 16)
    ops = [(NAMES.index("AutoContrast"), IDENTITY)] * len(batch)
    draw = draw_of(ops, np.zeros((len(batch), 2)))
    assert torch.equal(strong_augment(batch, draw), pillow(batch, draw))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (18, 40), (41, 23)])
def test_cutout(height, width):
    n = 300
    rng = np.random.default_rng(0)
    holes = rng.random((n, 3)) * (0.5, 1, 1)
    holes[:4] = (0, 0.5, 0.5), (1e-3, 0.5, 0.5), (0.5, 0, 0), (0.5, 0.999, 0.999)
    batch = pictures(n, height, width)
    draw = draw_of(np.full((n, 2), IDENTITY), np.zeros((n, 2)), holes)
    got = strong_augment(batch, draw)
    assert torch.equal(got, pillow(batch, draw))
    assert torch.equal(got[0], batch[0])
    assert not torch.equal(got[1], batch[1])


ids = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(ids, ids), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
)
def test_any_shape_and_any_ids(pairs, height, width, seed):
    samples, strong = np.array(pairs, dtype=np.int64).T
    draw = strong_draws(samples, strong, seed=seed)
    batch = pictures(len(pairs), height, width)
    got = strong_augment(batch, draw)
    assert got.dtype == torch.uint8
    assert got.shape == batch.shape
    first, last = [[NAMES[op] for op in draw.ops[:, slot]] for slot in (0, 1)]
    off = levels_off(got, pillow(batch, draw)).flatten(1).amax(1)
    for wrong, one, two in zip(off.tolist(), first, last, strict=True):
        if one not in (*BLENDS, "Rotate") and two != "Rotate":
            assert wrong <= (two in BLENDS)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(24)), st.integers(0, 24), st.integers(0, 99))
def test_a_view_does_not_depend_on_its_batch(turn, size, seed):
    samples, strong = np.arange(24) + 1000, np.arange(24) // 3
    batch = pictures(24, 16, 16)
    whole = strong_augment(batch, strong_draws(samples, strong, seed=seed))
    some = np.array(turn[:size], dtype=np.int64)
    part = strong_draws(samples[some], strong[some], seed=seed)
    assert torch.equal(strong_augment(batch[some], part), whole[some])
    views = strong_base_views(samples, strong, seed=seed, num_views=162)
    np.testing.assert_array_equal(
        strong_base_views(samples[some], strong[some], seed=seed, num_views=162), views[some]
    )


def test_the_same_picture_again_and_nothing_else_touched():
    batch = pictures(40, 32, 32)
    draw = strong_draws(np.arange(40), np.zeros(40, dtype=np.int64), seed=1)
    before = [x.copy() for x in (batch.numpy(), draw.ops, draw.values, draw.cutout)]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    got = strong_augment(batch, draw)
    assert torch.equal(strong_augment(batch, draw), got)
    for x, y in zip(before, (batch.numpy(), draw.ops, draw.values, draw.cutout), strict=True):
        np.testing.assert_array_equal(x, y)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert got.is_contiguous()
    nothing = draw_of([(IDENTITY, IDENTITY)] * 40, np.zeros((40, 2)))
    same = strong_augment(batch, nothing)
    assert torch.equal(same, batch)
    assert same.data_ptr() != batch.data_ptr()


def test_memory_layouts_and_an_empty_batch():
    batch = pictures(20, 24, 32)
    draw = strong_draws(np.arange(20), np.arange(20), seed=2)
    got = strong_augment(batch, draw)
    for laid_out in (
        batch.to(memory_format=torch.channels_last),
        torch.stack([batch, batch], -1)[..., 0],
    ):
        again = strong_augment(laid_out, draw)
        assert torch.equal(again, got)
        assert again.is_contiguous()
    none = np.zeros(0, dtype=np.int64)
    assert strong_augment(batch[:0], strong_draws(none, none, seed=2)).shape == (0, 3, 24, 32)


def test_frozen_draws():
    """If this fails, recorded runs and teacher caches can no longer be replayed."""
    assert STREAM_STRONG == 7
    samples, strong = np.array([0, 49_999, -5]), np.array([0, 63, 2**40])
    draw = strong_draws(samples, strong, seed=7)
    assert (draw.ops.dtype, draw.values.dtype, draw.cutout.dtype) == (np.int64, *[np.float32] * 2)
    views = strong_base_views(samples, strong, seed=7, num_views=162)
    for row, (i, s) in enumerate(zip(samples.tolist(), strong.tolist(), strict=True)):
        bits = [counter_oracle(7, STREAM_STRONG, i, s, k) for k in range(8)]
        ops = [(b >> 32) * 14 >> 32 for b in bits[:2]]
        assert draw.ops[row].tolist() == ops
        unit = [(b >> 40) / 2**24 for b in bits]
        ranges = [PUBLISHED[NAMES[op]][1:] for op in ops]
        values = [low + (high - low) * u for (low, high), u in zip(ranges, unit[2:4], strict=True)]
        np.testing.assert_allclose(draw.values[row], values, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(draw.cutout[row], [unit[4] / 2, *unit[5:7]], rtol=1e-6)
        assert views[row] == (bits[7] >> 32) * 162 >> 32
    assert draw.ops.tolist() == FROZEN_OPS
    assert views.tolist() == FROZEN_VIEWS


FROZEN_OPS = [[11, 3], [4, 2], [7, 1]]
FROZEN_VIEWS = [61, 69, 156]


def test_draws_look_random():
    n, pool = 500, 24
    samples, strong = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(pool)))
    draw = strong_draws(samples, strong, seed=11)
    both = draw.ops[:, 0] * 14 + draw.ops[:, 1]
    assert stats.chisquare(np.bincount(both, minlength=196)).pvalue > 1e-4
    for op, (_, low, high, *_) in enumerate(STRONG_OPS):
        values = draw.values[draw.ops == op].astype(float)
        assert values.min() >= np.float32(low)
        assert values.max() <= np.float32(high)
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    for column, high in zip(draw.cutout.T.astype(float), (0.5, 1, 1), strict=True):
        assert stats.kstest(column, stats.uniform(0, high).cdf).pvalue > 1e-4
    views = strong_base_views(samples, strong, seed=11, num_views=162)
    assert (views.min(), views.max()) == (0, 161)
    assert stats.chisquare(np.bincount(views, minlength=162)).pvalue > 1e-4
    # The numbers of one view, and those of neighbouring samples and ids, are unrelated.
    bound = 4.5 / np.sqrt(n * pool)
    columns = np.column_stack([draw.ops, draw.cutout, views]).T.astype(float)
    assert np.abs(np.corrcoef(columns) - np.eye(6)).max() < bound
    for column in columns.reshape(6, pool, n):
        for a, b in ((column[1:], column[:-1]), (column[:, 1:], column[:, :-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < bound


def test_mistakes_are_named():
    batch, draw = pictures(4, 8, 8), strong_draws(np.arange(4), np.arange(4), seed=0)
    for wrong in (batch.float(), batch[0], batch[:, :1]):
        with pytest.raises(ValueError, match=r"images must be uint8 \[B, 3, H, W\]"):
            strong_augment(wrong, draw)
    with pytest.raises(ValueError, match="for 4 images, got 3"):
        strong_augment(batch[:3], draw)
    with pytest.raises(ValueError, match="one shape"):
        strong_draws(np.arange(4), np.arange(3), seed=0)
    with pytest.raises(TypeError, match="integers"):
        strong_draws(np.array([0.5]), np.array([1]), seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    batch, draw = pictures(64, 32, 32), strong_draws(np.arange(64), np.arange(64), seed=0)
    on_gpu = batch.cuda()
    strong_augment(on_gpu, draw)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = strong_augment(on_gpu, draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), strong_augment(batch, draw))
