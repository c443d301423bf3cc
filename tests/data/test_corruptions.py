"""Corruptions: deterministic, worse with the severity, and what each must do to a picture."""

from __future__ import annotations

import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from ekd_ray.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, published_pictures
from ekd_ray.errors import UserError

torch.set_num_threads(1)
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
BLURS = ("defocus_blur", "motion_blur", "zoom_blur", "jpeg_compression")


def scene(count=2, height=32, width=32, seed=0):
    """Smooth pictures with edges, uint8 [N, 3, H, W]."""
    rng = np.random.default_rng(seed)
    waves = ndimage.gaussian_filter(rng.random((count, 3, height, width)), (0, 0, 3, 3))
    waves = (waves - waves.min()) / (waves.max() - waves.min())
    waves[:, :, : height // 3] = 0.5 * waves[:, :, : height // 3] + 0.45
    return torch.from_numpy((waves * 255).astype(np.uint8))


def spoiled(images, name, severity, seed=0):
    return corrupt(images, name, severity, seed=seed, sample_ids=range(len(images)))


def flat(value, side=64):
    return torch.full((1, 3, side, side), value, dtype=torch.uint8)


def test_there_are_the_fifteen_that_were_published():
    assert len(CORRUPTIONS) == 15
    assert all(len(entry.strengths) == 5 for entry in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_is_spoiled_alike_in_any_batch_and_otherwise_under_another_seed(name):
    images = scene(3)
    for severity in (1, 5):
        found = spoiled(images, name, severity)
        assert found.dtype == torch.uint8 and found.shape == images.shape
        assert all(not torch.equal(one, other) for one, other in zip(found, images, strict=True))
        alone = corrupt(images[2:], name, severity, seed=0, sample_ids=[2])
        assert (alone[0].int() - found[2].int()).abs().max() <= 1
        assert torch.equal(spoiled(images, name, severity), found)
    draws = not torch.equal(spoiled(images, name, 5, seed=1), spoiled(images, name, 5))
    drawless = {
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    }
    assert draws == (name not in drawless)
    one, other = corrupt(images[:1].repeat(2, 1, 1, 1), name, 5, seed=0, sample_ids=[0, 1])
    assert draws == (not torch.equal(one, other))


@pytest.mark.parametrize("size", [(8, 8), (20, 33), (96, 64)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pictures_of_any_size_are_spoiled(name, size):
    images = scene(1, *size)
    for severity in SEVERITIES if size == (8, 8) else (3,):
        found = spoiled(images, name, severity)
        assert found.shape == images.shape


@pytest.mark.parametrize("name", [*NOISES, *BLURS, "contrast", "brightness", "fog"])
def test_the_severity_takes_a_picture_further_from_itself(name):
    images = scene(4)
    gaps = [(spoiled(images, name, s).float() - images).square().mean().item() for s in SEVERITIES]
    assert all(after >= 0.98 * before for before, after in itertools.pairwise(gaps)), gaps
    assert gaps[-1] > 1.5 * gaps[0]


# Each against a reckoning of its own


@pytest.mark.parametrize(("severity", "scale"), [(1, 0.04), (5, 0.1)])
def test_gaussian_noise_has_its_standard_deviation(severity, scale):
    noise = (spoiled(flat(128), "gaussian_noise", severity).double() - 128) / 255
    assert noise.std().item() == pytest.approx(scale, rel=0.05)
    assert stats.normaltest(noise.flatten()[:2000] + 0).pvalue > 1e-4


@pytest.mark.parametrize(("severity", "photons"), [(1, 500), (5, 50)])
def test_shot_noise_is_poisson(severity, photons):
    for value in (64, 192):
        found = spoiled(flat(value), "shot_noise", severity).double() / 255
        assert found.mean().item() == pytest.approx(value / 255, rel=0.02)
        assert found.var().item() == pytest.approx(value / 255 / photons, rel=0.1)


def test_impulse_noise_strikes_its_share_half_of_them_white():
    found = spoiled(flat(128, 128), "impulse_noise", 5)
    black, white = (found == 0).double().mean(), (found == 255).double().mean()
    assert black.item() == pytest.approx(0.035, rel=0.1)
    assert white.item() == pytest.approx(0.035, rel=0.1)
    assert ((found == 128) | (found == 0) | (found == 255)).all()


def test_jpeg_and_pixelate_are_those_of_pillow():
    image = scene(1)[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=40)
    found = spoiled(scene(1), "jpeg_compression", 5)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(Image.open(file)))
    small = Image.fromarray(image).resize((20, 20), Image.Resampling.BOX)
    expected = np.asarray(small.resize((32, 32), Image.Resampling.BOX))
    found = spoiled(scene(1), "pixelate", 5)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


def test_brightness_raises_the_value_of_hsv():
    images = scene(1)
    images[0, :, 0, 0] = 0
    found = spoiled(images, "brightness", 3)[0].permute(1, 2, 0) / 255
    for before, after in zip(images[0].permute(1, 2, 0).reshape(-1, 3)[::37] / 255,
                             found.reshape(-1, 3)[::37], strict=True):  # fmt: skip
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1))
        np.testing.assert_allclose(after, expected, atol=0.5 / 255 + 1e-6)


def test_contrast_draws_channels_to_their_mean():
    images = scene(1).double()
    mean = images.mean(dim=(2, 3), keepdim=True)
    expected = (images - mean) * 0.15 + mean
    assert (spoiled(images.byte(), "contrast", 5).double() - expected).abs().max() <= 0.51


@pytest.mark.parametrize("name", [*BLURS[:3], "glass_blur", "elastic_transform", "pixelate"])
def test_what_moves_light_about_leaves_an_even_picture_as_it_is(name):
    found = spoiled(flat(90, 32), name, 5).int()
    assert (found - 90).abs().max() <= 1


def test_defocus_spreads_a_point_over_a_disk():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 32, 32] = 255
    found = spoiled(images, "defocus_blur", 5)[0, 0].double()
    y, z = np.mgrid[:64, :64]
    away = np.hypot(y - 32, z - 32)
    assert found[torch.from_numpy(away <= 2.5)].min() > 0  # radius 1.5 at 32, 3 at 64
    assert found[torch.from_numpy(away > 5)].max() == 0


def test_glass_keeps_the_pixels_that_it_moves():
    images = scene(1)
    found = spoiled(images, "glass_blur", 1)  # blurred by 0.05 of a pixel: not at all
    assert torch.equal(found.flatten().sort().values, images.flatten().sort().values)
    assert (found != images).double().mean() > 0.5


def test_motion_is_along_one_line():
    images = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    found = spoiled(images, "motion_blur", 5)[0, 0].double().numpy()
    y, z = np.mgrid[:33, :33] - 16.0
    share = found / found.sum()
    spread = np.array([[(share * a * b).sum() for a in (y, z)] for b in (y, z)])
    centre = np.array([(share * y).sum(), (share * z).sum()])
    least, most = np.linalg.eigvalsh(spread - np.outer(centre, centre))
    assert most > 4 * least


def test_an_unknown_corruption_or_severity_is_refused():
    with pytest.raises(UserError, match="Did you mean 'fog'"):
        spoiled(scene(), "fogg", 1)
    with pytest.raises(UserError, match="1 to 5, got 6"):
        spoiled(scene(), "fog", 6)


# Published files


@pytest.fixture
def published(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4, dtype=np.uint8), 5)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "fog.npy", rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    return tmp_path


def test_published_files_are_read_as_they_are(published):
    images, labels = published_pictures(published, "fog", 10)
    assert np.array_equal(images, np.load(published / "fog.npy"))
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 3] * 5


@pytest.mark.parametrize(
    ("name", "array", "word"),
    [
        ("fog", np.zeros((15, 32, 32, 3), np.uint8), "uint8 [20, S, S, 3]"),
        ("fog", np.zeros((20, 32, 32, 3), np.float32), "float32"),
        ("fog", np.zeros((20, 3, 32, 32), np.uint8), "S, S, 3"),
        ("labels", np.zeros(19, np.uint8), "5 severities"),
        ("labels", np.full(20, 7, np.uint8), "0 to 4"),
        ("labels", np.zeros((4, 5), np.uint8), "[4, 5]"),
        ("labels", np.repeat(np.arange(4, dtype=np.uint8), 5), "same classes"),
        ("fog", np.array([{}], dtype=object), "damaged or no array"),
    ],
)
def test_other_files_are_refused_in_one_sentence(published, name, array, word):
    np.save(published / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(UserError) as refused:
        published_pictures(published, "fog", 5)
    assert word in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_or_cut_file_is_refused(published):
    with pytest.raises(UserError, match=r"snow\.npy"):
        published_pictures(published, "snow", 10)
    content = (published / "fog.npy").read_bytes()
    (published / "fog.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        published_pictures(published, "fog", 10)
