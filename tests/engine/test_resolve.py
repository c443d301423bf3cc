"""Planning: names, teacher, prior and sizes are checked before any compute is spent."""

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.config.normalization import parse_normalization
from ekd_ray.engine.resolve import resolve, without_teacher
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.models import build_model, save_weights

torch.set_num_threads(1)

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Write a resnet8 teacher; returns its path as text."""
    folder = tmp_path_factory.mktemp("teachers")
    count = 0

    def write(*, classes=10, mean=HALF, std=HALF, log_prior=None):
        nonlocal count
        count += 1
        path = folder / f"{count}.safetensors"
        save_weights(
            build_model("resnet8", classes), path, model_name="resnet8", num_classes=classes,
            mean=mean, std=std, log_prior=log_prior,
        )  # fmt: skip
        return str(path)

    return write


def run(weights, **values):
    defaults = {"dataset": "digits", "student": "resnet8", "teacher": "resnet8", "method": "ekd"}
    return DistillConfig(**{**defaults, "teacher_weights": weights, **values})


# Normalisation


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("half", HALF, HALF),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("0.1,0.2,0.3/1,2,3", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
        (" 0, -1, 5e-1 / 1, 2, .5", (0.0, -1.0, 0.5), (1.0, 2.0, 0.5)),
    ],
)
def test_normalization_is_parsed(text, mean, std):
    parsed = parse_normalization(text)
    assert (parsed.mean, parsed.std) == (mean, std)
    assert parse_normalization(parsed.as_text()) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "1,2,3", "1,2/1,2", "1,2,3/1,2", "1,2,3/1,2,0", "1,2,3/1,2,-1", "a,b,c/1,2,3",
        "1,2,3/1,2,3/1,2,3", "nan,0,0/1,1,1", "0,0,0/1,nan,1", "0,0,0/1,1,nan", "0,0,inf/1,1,1",
        "0,0,0/1,1,inf",
    ],
)  # fmt: skip
def test_normalization_that_is_none(text):
    with pytest.raises(UserError, match="teacher_normalization"):
        parse_normalization(text)


# Teacher


@pytest.mark.parametrize("method", ["ekd", "kd"])
def test_resolving_fills_everything_and_again_changes_nothing(save, method):
    weights = save(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), log_prior=-0.75)
    done = resolve(run(weights, method=method))
    assert (done.augment, done.image_size) == ("crop", 32)
    assert done.teacher_sha256 == sha256_file(weights)
    assert done.teacher_normalization == "0.1,0.2,0.3/1.0,2.0,3.0"
    assert None not in (done.temperature, done.ce_weight, done.kd_weight)
    assert done.log_prior == (-0.75 if method == "ekd" else None)
    assert resolve(done) == done


@pytest.mark.parametrize(
    ("learned", "values", "student", "teacher"),
    [
        (-0.75, {}, -0.75, None),
        (None, {}, 0.0, None),
        (-0.75, {"log_prior": -2.0}, -2.0, None),
        (None, {"log_prior": -2.0}, -2.0, None),
        (-0.75, {"teacher_log_prior": 0.5}, -0.75, 0.5),
        (-0.75, {"log_prior": -2.0, "teacher_log_prior": 0.5}, -2.0, 0.5),
        (-0.75, {"learn_log_prior": True}, 1.0, -0.75),
        (-0.75, {"learn_log_prior": True, "teacher_log_prior": 0.5}, 1.0, 0.5),
        (-0.75, {"learn_log_prior": True, "log_prior": -2.0}, -2.0, None),
        (0.0, {"learn_log_prior": True}, 1.0, 0.0),
    ],
)
def test_precedence_of_the_log_prior(save, learned, values, student, teacher):
    """Explicit before the teacher's learned one before 0 (the uniform Dirichlet)."""
    done = resolve(run(save(log_prior=learned), **values))
    assert (done.log_prior, done.teacher_log_prior) == (student, teacher)
    assert resolve(done) == done


def test_methods_without_a_teacher_drop_it(save):
    done = resolve(run(save(), method="none"))
    names = ("teacher", "teacher_weights", "teacher_sha256", "teacher_normalization")
    assert all(getattr(done, name) is None for name in names)
    assert done == without_teacher(done)


@pytest.mark.parametrize(
    ("saved", "values", "words"),
    [
        ({"classes": 100}, {}, ["100 classes", "'digits' has 10"]),
        ({}, {"teacher": "resnet14"}, ["'resnet8'", "'resnet14'", "--teacher resnet8"]),
        ({}, {"teacher_sha256": "0" * 64}, ["SHA-256", "0" * 64]),
        ({"mean": None, "std": None}, {}, ["normalised", "--teacher-normalization"]),
        ({}, {"teacher_normalization": "cifar11"}, ["Did you mean 'cifar10", "cifar11"]),
        ({}, {"teacher": None}, ["needs a teacher", "--teacher"]),
        ({}, {"teacher_weights": None}, ["no weights for teacher", "--teacher-weights"]),
        ({}, {"teacher_weights": "/none/there"}, ["/none/there"]),
        ({}, {"teacher": "resnet9"}, ["'resnet9'", "resnet8"]),
        ({}, {"student": "resnet9"}, ["'resnet9'", "resnet8"]),
        ({}, {"dataset": "digit"}, ["Did you mean 'digits'"]),
        ({}, {"augment": "crop_flp"}, ["Did you mean 'crop_flip'"]),
        ({}, {"method": "edk"}, ["'edk'", "ekd"]),
        ({}, {"batch_size": 1439}, ["1439", "batch"]),
        ({}, {"batch_size": 1295}, ["1294 ", "1295"]),  # 1438 less a tenth for validation
        ({}, {"train_subset": 1439}, ["train_subset", "1438", "1439"]),
        ({}, {"train_subset": 110, "batch_size": 100}, ["99 ", "100"]),
        ({}, {"teacher_top": 10}, ["teacher_top", "< 10", "got 10", "leave it out"]),
        ({}, {"image_size": 64}, ["image_size", "digits", "32", "64"]),
        ({}, {"augment": "resized_crop"}, ["resized_crop", "digits", "crop_flip"]),
    ],
    ids=str,
)
def test_what_would_stop_the_run_later_is_refused_now(save, saved, values, words):
    with pytest.raises(UserError) as refused:
        resolve(run(save(**saved), **values))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values", [{"batch_size": 1294}, {"train_subset": 1438}, {"teacher_top": 9}, {"image_size": 32}]
)
def test_the_largest_sizes_that_fit(save, values):
    resolve(run(save(), **values))
