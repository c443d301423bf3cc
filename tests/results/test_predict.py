"""A bundle's student on pictures: preprocessing, probabilities, uncertainty, card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import dataset_info, load_dataset, normalize
from ekd_ray.data.decode import decode_view, fit_picture
from ekd_ray.errors import UserError
from ekd_ray.losses.dirichlet import log_expectation, vacuity
from ekd_ray.models import WeightsMetadata, build_model
from ekd_ray.results.card import model_card
from ekd_ray.results.inference import Classifier, Preprocessing, as_pictures, pixels
from ekd_ray.results.leaderboard import Leaderboard, Row


@pytest.fixture(scope="module")
def pictures():
    arrays = load_dataset("synthetic", "test")
    return np.ascontiguousarray(arrays.images[:70].transpose(0, 2, 3, 1)), arrays.labels[:70]


def test_probabilities_and_uncertainty_are_those_of_the_test_split(exported, pictures):
    """More than one batch; against the model, the data room's normalisation and the losses'
    formulas."""
    images, _ = pictures
    found = exported.predict(images)
    info = dataset_info("synthetic")
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = exported.model()(normalize(batch, info.mean, info.std))
    expected = log_expectation(logits, 1.0, -0.75).exp()
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.uncertainty, vacuity(logits, -0.75), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.labels, expected.argmax(1))
    assert found.names == tuple(f"pattern{label}" for label in found.labels.tolist())
    assert found.probabilities.sum(1).allclose(torch.ones(70))


def test_every_form_of_a_picture_gives_the_same(exported, pictures, tmp_path):
    images = pictures[0][:2]
    opened = [Image.fromarray(image) for image in images]
    for index, image in enumerate(opened):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png")]
    expected = exported.predict(images).probabilities
    for given in (torch.from_numpy(images), opened, paths, [opened[0], paths[1]]):
        assert torch.equal(exported.predict(given).probabilities, expected)
    for one in (opened[0], paths[0], str(paths[0])):
        torch.testing.assert_close(exported.predict(one).probabilities, expected[:1])


@pytest.mark.parametrize("wrong", [None, 3, object(), [3], {1: 2}])
def test_what_is_no_picture_is_refused(exported, wrong):
    with pytest.raises(UserError, match="images must be PIL images, paths, arrays or tensors, got"):
        exported.predict(wrong)


def test_a_folder_is_its_pictures_and_those_of_the_folders_in_it(exported, pictures, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"holds no picture .*name another"):
        exported.predict(tmp_path)
    for name, image in zip(("b/0.PNG", "a.png", "c.bmp"), pictures[0], strict=False):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside a.png")
    (tmp_path / "d.png").mkdir()
    expected = exported.predict(pictures[0][[1, 0, 2]]).probabilities
    for given in (tmp_path, str(tmp_path), [tmp_path]):
        assert torch.equal(exported.predict(given).probabilities, expected)


def test_grey_arrays_are_pictures_of_three_equal_channels(exported, pictures):
    grey = pictures[0][:4, :, :, 0]
    expected = exported.predict(grey[..., None].repeat(3, axis=3)).probabilities
    first = torch.from_numpy(grey.copy())
    for given in (grey, grey[..., None], grey[:, None], grey / 255, first, first[:, None],
                  first[..., None], [*grey], [grey[0][None], *grey[1:, :, :, None]]):  # fmt: skip
        assert torch.equal(exported.predict(given).probabilities, expected)
    with pytest.raises(UserError, match=r"of one channel if grey.* uint8 \[2, 32, 32, 2\]"):
        exported.predict(np.zeros((2, 32, 32, 2), np.uint8))


def test_a_bundle_is_printed_in_a_line(exported):
    shown = str(exported)
    assert len(shown.splitlines()) == 1 and str(exported.path) in shown
    assert f"test_top1 {100 * exported.metrics['model']['test_top1']:.2f} %" in shown


def test_16_bit_pictures_are_the_same_and_32_bit_ones_are_refused(exported, pictures, tmp_path):
    gray = pictures[0][0, :, :, 0]
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    expected = pixels(Image.fromarray(gray), exported.config)
    for given in (deep, tmp_path / "deep.png"):
        np.testing.assert_array_equal(pixels(given, exported.config), expected)
    wide = Image.fromarray(gray.astype(np.float32))
    with pytest.raises(UserError, match=r"^image 1 has pixels of the mode 'F'"):
        exported.predict([deep, wide])
    wide.save(tmp_path / "wide.tiff")
    with pytest.raises(UserError, match=r"wide.tiff has pixels of the mode 'F'"):
        exported.predict(tmp_path / "wide.tiff")


def test_the_preprocessing_is_a_transform_of_images_in_0_to_1(exported, pictures):
    batch = torch.from_numpy(pictures[0][:3]).permute(0, 3, 1, 2)
    info = dataset_info("synthetic")
    found = exported.preprocessing()(batch / 255)
    torch.testing.assert_close(found, normalize(batch, info.mean, info.std))
    resized = Preprocessing(info.mean, info.std, size=48)(batch / 255)
    assert resized.shape == (3, 3, 48, 48)


def test_a_softmax_student_is_uncertain_where_its_largest_probability_is_small():
    model = Classifier(build_model("resnet8", 10), Preprocessing((0.5,) * 3, (0.5,) * 3, size=32),
                       log_prior=None).eval()  # fmt: skip
    with torch.no_grad():
        logits, probabilities, uncertainty = model(torch.rand(4, 3, 32, 32))
    assert torch.equal(probabilities, logits.softmax(1))
    assert torch.equal(uncertainty, 1 - probabilities.max(1).values)


def test_pictures_of_other_sizes_are_cut_as_evaluation_cuts_them(tmp_path):
    """The central square for data sets of one size; the evaluation view on ImageNet."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 100, 3), dtype=np.uint8))
    image.save(tmp_path / "wide.png")
    small = DistillConfig(dataset="cifar10", image_size=32)
    (found,) = pixels(image, small)
    box = (20, 0, 80, 60)
    square = image.resize((32, 32), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    np.testing.assert_array_equal(found, np.asarray(square).transpose(2, 0, 1))
    large = DistillConfig(dataset="imagenet", image_size=48)
    (found,) = pixels(tmp_path / "wide.png", large)
    data = (tmp_path / "wide.png").read_bytes()
    np.testing.assert_array_equal(found, decode_view(data, "wide", 48, None))


def test_arrays_and_tensors_of_any_layout_are_the_same_pictures():
    config = DistillConfig(dataset="digits", image_size=32)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = images.transpose(0, 3, 1, 2)
    first = torch.from_numpy(expected.copy())
    for given in (
        images, first, images / 255, first / 255, (first / 255).double(), [images[0], first[1]],
        [Image.fromarray(images[0]), first[1] / 255],
    ):  # fmt: skip
        np.testing.assert_array_equal(np.stack(pixels(given, config)), expected)
    np.testing.assert_array_equal(pixels(images[0], config)[0], expected[0])
    small = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)  # both ends are 3
    np.testing.assert_array_equal(as_pictures(small)[0], small)
    found = as_pictures(torch.from_numpy(small))
    np.testing.assert_array_equal(found[0], small.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("dataset", "augment", "size", "margin"),
    [
        ("hf:/pets", "crop_flip", 48, False),
        ("hf:/pets", "resized_crop", 48, True),
        ("hf:/pets", "none", 48, False),
        ("hf:/pets", "none", 224, True),
        ("a-plugins", "crop8_flip", 64, False),
        ("folder:/pets", "none", 48, True),
    ],
)
def test_how_pictures_are_cut_needs_neither_data_nor_plugin(dataset, augment, size, margin):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    config = DistillConfig(dataset=dataset, augment=augment, image_size=size)
    (found,) = pixels(image, config)
    np.testing.assert_array_equal(found, fit_picture(image, size, margin=margin))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.full((1, 32, 32, 3), 2.0), "got float64 \\[1, 32, 32, 3\\] from 2 to 2"),
        (torch.full((3, 8, 8), torch.nan), "from nan to nan"),
        (np.zeros(32, np.uint8), "got uint8 \\[32\\]"),
        (torch.zeros(1, 2, 32, 32), r"got float32 \[1, 2, 32, 32\]"),
        (np.zeros((8, 8, 3), np.int64), "got int64 \\[8, 8, 3\\]"),
        ([3], "got one of type int"),
        ([], "there is no image to predict"),
        ("nowhere.png", "cannot read nowhere.png"),
    ],
)
def test_what_is_no_picture_is_one_sentence(exported, images, said):
    with pytest.raises(UserError, match=said):
        exported.predict(images)


def test_a_file_that_is_no_picture_is_named(exported, tmp_path):
    (tmp_path / "x.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"x\.jpg is not a readable"):
        exported.predict(tmp_path / "x.jpg")


# The card, read by the hub's own library


def test_the_card_is_one_that_the_hub_reads(exported):
    data = ModelCard.load(exported.path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("ekd_ray", "image-classification")
    assert "evidential-deep-learning" in data.tags
    assert data.datasets is None, "synthetic is nothing that the hub has"
    figures = {found.metric_type: found.metric_value for found in data.eval_results}
    assert figures["accuracy"] in (
        exported.metrics["model"]["test_top1"], exported.metrics["model"]["test_top5"],
    )  # fmt: skip
    assert figures["nll"] == exported.metrics["model"]["test_nll"]
    assert {found.dataset_split for found in data.eval_results} == {"test"}


def test_the_card_names_the_hubs_data_set_and_no_path():
    metrics = {
        "model": {"test_top1": 0.5}, "class_names": ["a", "b"], "classes": [], "log_prior": None,
    }  # fmt: skip
    weights = WeightsMetadata(sha256="0", layout="ekd_ray", model="resnet8", num_classes=2)
    for dataset, hub in (("cifar100", ["uoft-cs/cifar100"]), ("folder:/home/me/cats", None)):
        config = DistillConfig(dataset=dataset, student="resnet8", teacher="vgg8: odd #name")
        board = Leaderboard([Row(name="trial 1", config=config, test=(0.5,))], StudyConfig())
        text = model_card(config, weights, metrics, board)
        assert ModelCard(text).data.datasets == hub
        assert "/home" not in text
        assert ModelCard(text).data.model_name == "resnet8 distilled from vgg8: odd #name"


@pytest.mark.parametrize(("test", "spread"), [((0.5,), None), ((0.5, 0.7), "14.14%")])
def test_the_card_has_no_deviation_of_one_seed(test, spread):
    metrics = {
        "model": {"test_top1": 0.5}, "class_names": ["a", "b"], "classes": [], "log_prior": None,
    }  # fmt: skip
    weights = WeightsMetadata(sha256="0", layout="ekd_ray", model="resnet8", num_classes=2)
    config = DistillConfig(dataset="cifar100", student="resnet8", method="none")
    board = Leaderboard([Row(name="trial 1", config=config, test=test)], StudyConfig())
    text = model_card(config, weights, metrics, board)
    assert " 0.00%" not in text
    assert text.count(spread or "standard deviation") == (2 if spread else 0)
