"""What speaks against a teacher: hand-made predictions, each with its answer."""

import numpy as np
import pytest

from ekd_ray.engine.measure.teacher_judgement import (
    TRAIN_AGAIN,
    judge_accuracy,
    judge_normalizations,
    judge_order,
)
from ekd_ray.models import Claims

CLASSES = 10
LABELS = np.random.default_rng(0).integers(0, CLASSES, 500)
NAMES = tuple("abcdefghij")


def right_in(share: float, labels: np.ndarray = LABELS, seed: int = 1) -> np.ndarray:
    """Predictions right in this share of the images, and the next class in the others."""
    wrong = np.random.default_rng(seed).permutation(len(labels)) >= share * len(labels)
    return (labels + wrong) % CLASSES


@pytest.mark.parametrize(
    ("share", "claimed", "word"),
    [
        (0.9, None, None),
        (0.9, 0.93, None),  # other images, another crop
        (0.6, 0.93, "claims 93.0%"),
        (0.1, None, "near chance"),
        (0.1, 0.93, "near chance"),
        (0.3, None, None),
    ],
)
def test_accuracy(share, claimed, word):
    found = judge_accuracy(right_in(share), LABELS, Claims(accuracy=claimed))
    assert [word in warning for warning in found] == [True] * (word is not None)


@pytest.mark.parametrize(("share", "warned"), [(0.9, False), (0.1, True)])
def test_one_that_the_study_trained_is_to_be_trained_for_longer(share, warned):
    found = judge_accuracy(right_in(share), LABELS)
    assert len(found) == warned
    assert all("teacher_training" in text and "--teacher-weights" not in text for text in found)


def test_of_a_file_of_ours_nothing_is_to_be_checked():
    (found,) = judge_accuracy(right_in(0.1), LABELS, Claims(), TRAIN_AGAIN)
    assert "--teacher-normalization" not in found and "train-teacher" in found


def test_few_images_do_not_show_that_a_teacher_is_near_chance():
    labels = np.arange(20) % CLASSES
    half_right = np.where(np.arange(20) < 5, labels, labels + 1)
    (found,) = judge_accuracy(half_right, labels, Claims())
    # Wilson's interval of 5 of 20 at 2 deviations, by hand: 0.35 / 1.2 -+ 2 sqrt(0.011875) / 1.2.
    assert "20 images" in found and "25.0%" in found and "interval 11.0% to 47.3%" in found
    assert "near chance" not in found and "validation_fraction" in found


def test_chance_is_that_of_the_largest_class():
    labels = np.repeat([0, 1], [400, 100])
    assert judge_accuracy(np.zeros(500, int), labels, Claims())
    assert not judge_accuracy(labels.copy(), labels, Claims())


@pytest.mark.parametrize(
    ("own", "other", "count", "warned"),
    [
        (0.7, 0.9, 500, True),
        (0.88, 0.9, 500, False),
        (0.9, 0.7, 500, False),
        (0.7, 0.78, 50, False),  # so few images do not tell
    ],
)
def test_normalizations(own, other, count, warned):
    labels = LABELS[:count]
    others = {"half": right_in(other, labels, seed=2), "cifar10": right_in(0.2, labels)}
    found = judge_normalizations(right_in(own, labels), others, labels)
    assert ["--teacher-normalization half" in text for text in found] == [True] * warned


def test_an_order_of_classes_is_found_by_names_and_without():
    permuted = np.random.default_rng(3).permutation(CLASSES)
    named = [NAMES[index] for index in permuted]
    predicted = right_in(0.9)
    assert not judge_order(predicted, LABELS, CLASSES, NAMES, NAMES)
    assert not judge_order(predicted, LABELS, CLASSES, ["x", "y"], NAMES), "other words"
    (by_name,) = judge_order(predicted, LABELS, CLASSES, named, NAMES)
    assert f"class 0 is '{named[0]}' there" in by_name
    (by_images,) = judge_order(permuted[predicted], LABELS, CLASSES, (), NAMES)
    assert "another order" in by_images


@pytest.mark.parametrize("seed", range(5))
def test_guesses_are_no_order(seed):
    classes = 100
    draw = np.random.default_rng(seed)
    labels, predicted = draw.integers(0, classes, (2, 500))
    assert not judge_order(predicted, labels, classes, (), ())
