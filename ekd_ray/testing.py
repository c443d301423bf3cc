"""The conformance suite: what a method, a model or a data set keeps to, for the tests of plugins.

    from ekd_ray.testing import check_method, check_model

    def test_own_method():
        check_method("jsd")

The functions need no pytest. They raise `AssertionError` with a sentence that names the part, the
settings and what is wrong. The built-in parts are tested by the same checks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info
from ekd_ray.data.conformance import check_dataset
from ekd_ray.engine.distill import Diverged, TrainedStudent, distill
from ekd_ray.engine.features import record_features
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.errors import UserError, require
from ekd_ray.losses.method_checks import Case, Shapes, everything_on, method_cases
from ekd_ray.losses.methods import METHODS, Method, register_method, resolve_method
from ekd_ray.models import build_model, save_weights
from ekd_ray.models.model_checks import MODEL_CHECKS, Builder, ModelCase

__all__ = ["check_dataset", "check_method", "check_model", "check_training"]

T = TypeVar("T")
_UNNAMED = "the method to check"


def check_method(
    method: str | Method, *, student: str = "resnet8", teacher: str = "resnet14"
) -> None:
    """Check a method: its entry, its losses, and a miniature training through the real engine.

    The checks of the losses, under every variant of its settings: finite value and gradient for
    logits up to 10,000 and for features of any size, no dependence on the batch's order, a mean
    over the batch, float32 as good as float64 and in autocast, the same loss for the same batch, no
    gradient into the teacher and one into all that is asked of the student, terms that say
    `is_divergence` 0 at the teacher and never below, every weight and setting at work, derivatives
    that are right, no value read back from the device, one compiled program for all values, and
    state that comes back from a file.

    Args:
        method: a registered name, or an entry, which is registered while it is checked; its
            settings stay known.
        student: a model's name for the training, and for the features of a method that reads
            layers; it must take images of 32 x 32 pixels.
        teacher: likewise.

    Raises:
        AssertionError: the method does not keep to one of them; which, and with which values.
        UserError: an unknown name of a method, or of a model or its layers.
    """
    with _registered(method) as name, cpu_threads(1):
        shapes = feature_shapes(METHODS[name], student, teacher)
        for check, case in method_cases(name, shapes):
            run_check(check, case)
        check_training(name, student=student, teacher=teacher)


def check_model(model: str | Builder, *, image_size: int = 32) -> None:
    """Check a model: what searching, training, saving and exporting it needs.

    It builds for 2 and 10 classes, gives float32 logits [B, num_classes] in training and in
    evaluation, depends on torch's seed alone, tells both modes apart, takes one image in
    evaluation, lets a gradient reach every parameter, gives the same in channels_last, trains in
    bfloat16, and comes back from its weights file.

    Args:
        model: a name that `build_model` knows, or `build(num_classes) -> nn.Module`.
        image_size: side of the images that it takes, in pixels.

    Raises:
        AssertionError: the model does not keep to one of them.
    """
    case = ModelCase(model, image_size)
    with cpu_threads(1):  # more of them gain nothing here
        for check in MODEL_CHECKS:
            run_check(check, case)


def check_training(
    method: str, *, student: str = "resnet8", teacher: str = "resnet14", **settings: Any
) -> None:
    """Train a few steps on generated pictures, killed and resumed once, and look at the result.

    Two parts a batch (`accumulation_steps`), nothing compiled, a teacher that knows nothing.

    Args:
        method: a registered name.
        student: a model's name, as `teacher`.
        settings: of the run, `ekd_ray.DistillConfig`.

    Raises:
        AssertionError: the training stops, its loss is not finite or does not fall, a part of the
            student is not moved, or the run that was resumed is another one.
    """
    entry = METHODS[method]
    case = Case(method, {})
    with tempfile.TemporaryDirectory() as folder:
        config = DistillConfig(
            method=method, dataset="synthetic", student=student, teacher_cache="off",
            train_subset=40, validation_fraction=0.4, augment="none", image_size=32,
            batch_size=12, accumulation_steps=2, epochs=4, optimizer="adamw", lr=0.003,
            schedule="cosine", precision="float32", compile="off",
        )  # fmt: skip
        if entry.needs_teacher:
            weights = _write_teacher(teacher, config.dataset, Path(folder) / "teacher.safetensors")
            config = config.replace(teacher=teacher, teacher_weights=str(weights))
        # Without ramps the losses of the first epoch and of the last one are comparable.
        config = config.replace(**{**everything_on(method), **settings})
        straight = _train(case, config)
        missing = {f"loss_{n}" for n in entry.term_names} - straight.metrics.keys()
        require(not missing, f"{case}: the log of a run lacks {sorted(missing)}.")
        if not entry.learned_temperature:  # that climbs the loss
            first, last = (straight.history[i]["train_loss"] for i in (0, -1))
            require(last < first, f"{case} does not learn: train_loss {first:g}, then {last:g}.")
        out = Path(folder) / "run"
        with suppress(_Stopped):
            distill(config, out=out, on_epoch=_stop_after_two, threads=1, checkpoint_seconds=0)
        resumed = _train(case, config, out)
        found, expected = (
            [{**row, "seconds": 0} for row in r.history] for r in (resumed, straight)
        )
        require(found == expected, f"{case}: a run that was killed and resumed has other figures.")


class _Stopped(Exception):
    """Stands for a kill."""


def _stop_after_two(row: dict[str, Any]) -> None:
    if row["epoch"] == 2:
        raise _Stopped


def _train(case: Case, config: DistillConfig, out: Path | None = None) -> TrainedStudent:
    try:
        return distill(config, out=out, threads=1)
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, Diverged) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"{case} cannot be trained: {reason}") from error


def _write_teacher(name: str, dataset: str, path: Path) -> Path:
    """The file of a teacher with random weights."""
    info = dataset_info(dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_model(name, info.num_classes)
    save_weights(
        model, path, model_name=name, num_classes=info.num_classes, mean=info.mean, std=info.std
    )
    return path


@contextmanager
def _registered(method: str | Method) -> Iterator[str]:
    """The name of a method, which is registered for the time if it is not."""
    if isinstance(method, str):
        resolve_method(DistillConfig(method=method))  # an unknown name is the user's mistake
        yield method
        return
    for name, entry in METHODS.items():
        if entry is method:
            yield name
            return
    register_method(_UNNAMED, method)
    try:
        yield _UNNAMED
    finally:
        del METHODS[_UNNAMED]


def feature_shapes(method: Method, student: str, teacher: str) -> tuple[Shapes, ...]:
    """The shapes of the features that a method compares in two models, for 32 x 32 pixels."""
    sides = []
    for name, layers in ((student, method.student_layers), (teacher, method.teacher_layers)):
        if not layers:
            return ()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = build_model(name, 10).eval()
            with record_features(model, layers) as features:
                model(torch.zeros(2, 3, 32, 32))
        sides.append([tuple(feature.shape[1:]) for feature in features])
    return tuple(zip(*sides, strict=True))


def run_check(check: Callable[[T], None], case: T) -> None:
    """The check of a case, whose `AssertionError` names the case, whatever it stops with.

    Raises:
        AssertionError: what is checked does not keep to it.
    """
    try:
        check(case)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AssertionError(f"{case} stops in {check.__name__} with {reason}") from error
