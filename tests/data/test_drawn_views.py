"""Drawn views against torchvision's transforms, and what a view and its label are a function of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import autoaugment, v2

from ekd_ray.config import DistillConfig
from ekd_ray.data.drawn_views import DrawnViews
from ekd_ray.data.strong_views import CUTOUT_FILL, STRONG_OPS

SIDE, CLASSES = 24, 6
ALL_ON = {
    "mixup_alpha": 0.4, "cutmix_alpha": 0.8, "auto_augment": "randaugment", "random_erasing": 0.5,
}  # fmt: skip


def views_of(partners=range(CLASSES), **values):
    return DrawnViews(
        config=DistillConfig(view_seed=3, **values), base_views=5, image_size=SIDE,
        num_classes=CLASSES, partners=np.array(partners),
    )  # fmt: skip


def noise(count):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8))


def drawn(views, pictures, samples, numbers):
    """(views, labels, shares): sample i is pictures[i], whatever its view below, of class i."""
    below, _ = views.below(samples, numbers)
    return views.finish(pictures[below], torch.from_numpy(below), samples, numbers)


def test_randaugment_makes_the_pictures_that_torchvision_makes():
    """At one strength there are some twenty: both draw all of them, and no others."""
    picture = noise(1)
    pillow = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    torch.manual_seed(0)
    transform = v2.RandAugment(num_ops=1, magnitude=17)
    expected = {np.asarray(transform(pillow)).tobytes() for _ in range(600)}
    views = views_of(auto_augment="randaugment", randaugment_ops=1, randaugment_magnitude=17)
    samples, numbers = np.zeros(600, np.int64), np.arange(600)
    found, _, shares = drawn(views, picture, samples, numbers)
    assert shares is None
    assert {view.permute(1, 2, 0).numpy().tobytes() for view in found} == expected
    assert 18 <= len(expected) <= 26


def test_trivialaugment_draws_the_values_of_torchvision():
    table = autoaugment.TrivialAugmentWide()._augmentation_space(31)
    views = views_of(auto_augment="trivialaugment")
    bits = views._bits(np.zeros(40_000, np.int64), np.arange(40_000), 2, 3)
    ops, values = (column[:, 0] for column in views._operations(bits))
    for position, op in enumerate(STRONG_OPS):
        magnitudes, signed = table[op.name]
        found = np.unique(np.round(values[ops == position], 4))
        if not magnitudes.ndim:
            assert found.tolist() == [0.0]
            continue
        expected = magnitudes.numpy().astype(float)
        if op.name.startswith("Translate"):
            # torchvision's `int(magnitude)`, of a float32 that may be just below a whole number.
            expected = np.trunc(expected + 1e-3) / SIDE
        if op.name == "Solarize":  # the table of the older transforms has it in levels
            assert expected.max() == 255
        if signed:
            start = 1.0 if op.name in ("Brightness", "Color", "Contrast", "Sharpness") else 0.0
            expected = start + np.concatenate([expected, -expected])
        assert found.tolist() == pytest.approx(np.unique(np.round(expected, 4)).tolist(), abs=2e-4)
    assert np.bincount(ops, minlength=14).min() > 0.9 * 40_000 / 14


def test_a_rectangle_is_erased_as_torchvision_does():
    count = 1500
    white = torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    views = views_of(random_erasing=0.6)
    found, _, _ = drawn(views, white, np.zeros(count, np.int64), np.arange(count))
    torch.manual_seed(0)
    erase = v2.RandomErasing(p=0.6)
    expected = torch.stack([erase(white[0]) for _ in range(count)])
    ours, theirs = ((these != 255).all(dim=1) for these in (found, expected))
    for measure in (lambda m: m.sum((1, 2)), lambda m: m.any(2).sum(1), lambda m: m.any(1).sum(1)):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    holes = found.permute(0, 2, 3, 1)[ours]
    assert holes.unique(dim=0).tolist() == [list(CUTOUT_FILL)]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mix_and_its_label_have_equal_shares(kind):
    """Class c is a picture of the level 40 c: the mean of a mix is that of its label."""
    count, alpha = 1200, 0.6
    levels = 40 * torch.arange(CLASSES)
    plain = levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    views = views_of(range(1, CLASSES), **{f"{kind}_alpha": alpha})
    samples = np.zeros(count, np.int64)
    found, labels, shares = drawn(views, plain, samples, np.arange(count))
    mean = found.float().mean((1, 2, 3))
    torch.testing.assert_close(mean, shares @ levels.float(), atol=0.51, rtol=0)
    assert shares.sum(dim=1).tolist() == pytest.approx([1.0] * count)
    assert (shares.gather(1, labels[:, None])[:, 0] >= 0.5).all()
    own = shares[:, 0]
    if kind == "mixup":
        assert stats.kstest(own, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    else:
        torch.manual_seed(0)
        cut = v2.CutMix(alpha=alpha, num_classes=2)
        pair = torch.zeros(2, 3, SIDE, SIDE), torch.arange(2)
        theirs = torch.stack([cut(*pair)[1][0, 0] for _ in range(count)])
        assert stats.ks_2samp(own, theirs).pvalue > 1e-3
        two = [len(view.unique()) for view in found]
        assert set(two) == {1, 2}  # one inside the other, none blended


def test_both_kinds_share_the_views_and_some_are_left_alone():
    pictures, samples, numbers = noise(CLASSES), np.zeros(600, np.int64), np.arange(600)
    views = views_of(range(1, CLASSES), mixup_alpha=1.0, cutmix_alpha=1.0, mix_share=0.7)
    found, _, shares = drawn(views, pictures, samples, numbers)
    alone = (shares[:, 0] == 1).float().mean()
    assert alone == pytest.approx(0.3, abs=0.06)
    # CutMix leaves whole pixels of the picture as they were, mixup next to none.
    kept = (found == pictures[0]).float().mean((1, 2, 3))[shares[:, 0] < 0.8]
    assert 0.3 < (kept > 0.1).float().mean() < 0.7


def test_a_view_depends_on_seed_sample_and_number_alone():
    pictures = noise(CLASSES)
    samples, numbers = np.arange(60) % CLASSES, np.arange(60) // 2
    views = views_of(**ALL_ON)
    whole = drawn(views, pictures, samples, numbers)
    some = np.random.default_rng(1).permutation(60)[:17]
    part = drawn(views_of(**ALL_ON), pictures, samples[some], numbers[some])
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one, other[torch.from_numpy(some)])
    below, bases = views.below(samples, numbers)
    assert (len(below), below.min(), below.max()) == (120, 0, CLASSES - 1)
    assert sorted(set(bases.tolist())) == [0, 1, 2, 3, 4]
    other_seed = DrawnViews(**{**vars(views), "config": views.config.replace(view_seed=4)})
    assert not torch.equal(drawn(other_seed, pictures, samples, numbers)[0], whole[0])


def test_what_a_view_depends_on_is_among_its_facts():
    told = [views_of(**ALL_ON, **more).facts for more in ({}, {"randaugment_ops": 3})]
    told += [views_of(range(3), **ALL_ON).facts, views_of(**{**ALL_ON, "mixup_alpha": 0.5}).facts]
    told += [views_of(**{**ALL_ON, name: 0.1}).facts for name in ("cutmix_alpha", "mix_share")]
    told += [views_of(**{**ALL_ON, "random_erasing": 0.1}).facts]
    told += [views_of(**ALL_ON, randaugment_magnitude=3).facts]
    assert all(a != b for i, a in enumerate(told) for b in told[:i])
    assert views_of(auto_augment="trivialaugment").facts == {"auto_augment": "trivialaugment"}
