"""What a run does on a GPU, without one: no operation mixes devices, and no step waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fake_cuda import CUDA, DevicesMixed, FakeCuda, HostWaits

from benchmarks.reference import random_teacher
from ekd_ray.config import DistillConfig
from ekd_ray.data import epoch_batches
from ekd_ray.data.strong_views import STRONG_OPS, strong_augment, strong_draws
from ekd_ray.data.views import VIEW_SCHEMES
from ekd_ray.engine import distill
from ekd_ray.engine.evaluate import evaluate_model, predict
from ekd_ray.engine.learner import Learner
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.measure.predictions import Predictions, teacher_predictions
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.engine.teacher import fill
from ekd_ray.engine.teacher.source import Teacher, _network, load_teacher
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model

TINY = {
    "dataset": "synthetic", "student": "resnet8", "train_subset": 80, "validation_fraction": 0.4,
    "batch_size": 16, "epochs": 2, "precision": "float32", "view_pool": 4,
}  # fmt: skip
# Every method, and each that reads logits as a Dirichlet with a learned prior too.
CASES = [(name, {}) for name in METHODS] + [
    (name, {"learn_log_prior": True}) for name, method in METHODS.items() if method.evidential
]
CASES += [
    ("ekd", {
        "mixup_alpha": 1.0, "cutmix_alpha": 1.0, "auto_augment": "randaugment",
        "random_erasing": 0.5, "label_smoothing": 0.1, "max_grad_norm": 1.0, "ema_decay": 0.9,
        "prior_kl_weight": 0.1,
    }),
]  # fmt: skip


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A device that computes nothing; no network or table is left behind."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    with FakeCuda() as fake:
        yield fake
    _network.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "resnet8.safetensors"
    random_teacher("resnet8", "synthetic", path)
    return path


@pytest.fixture
def made(weights):
    """A resolved configuration of a method, and its data on the device."""

    def make(method, **values):
        teacher = {"teacher": "resnet8", "teacher_weights": str(weights)}
        values |= teacher if METHODS[method].needs_teacher else {}
        config = resolve(with_method(DistillConfig(**TINY), method, **values))
        return config, load_run_data(config, data_root=None, device=CUDA)

    return make


def first_batch(config, data):
    strong = config.view_pool if METHODS[config.method].strong_view else None
    return next(
        epoch_batches(
            data.train_ids, batch_size=config.batch_size, seed=0, epoch=1,
            num_views=data.images.num_views, strong_pool=strong,
        )
    )  # fmt: skip


def learner_of(config, data):
    return Learner(build_model(config.student, data.num_classes), Objective(config)).to(CUDA)


@pytest.mark.quick_ids("[none", "[kd", "[mlkd-", "[ekd-", "[wkd-", "[ctkd+ekd")
@pytest.mark.parametrize(("method", "values"), CASES)
def test_an_epoch_of_every_method_waits_for_nothing(method, values, made, cuda, monkeypatch):
    config, _ = made(method, precision="bfloat16", compile="off", teacher_cache="on", **values)
    for module in (distill, fill):
        monkeypatch.setattr(module, "pick_device", lambda: CUDA)
    if METHODS[method].needs_teacher:
        fill.fill_tables(config, data_root=None, seeds=[config.seed])
    run, found = distill.start_run(config, None), []
    run.learner.register_forward_hook(lambda module, given, results: found.extend(results[:2]))
    distill.train_epoch(run)  # what is cached on the device is there in the second
    run.end_epoch({})
    with cuda.no_waiting():
        distill.train_epoch(run)
    assert not any(teacher.computed for teacher in run.teachers)
    assert len(found) == 2 * 2 * run.steps_per_epoch
    assert {tensor.device for tensor in found} == {CUDA}
    assert {tensor.dtype for tensor in found[::2]} == {torch.float32}, "losses"
    assert {tensor.dtype for tensor in found[1::2]} == {torch.bfloat16}, "logits"
    run.learner.means(run.steps_per_epoch)
    run.learner.objective.state(2)


@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_teacher_without_its_table_waits_for_nothing(cache, top, made, cuda):
    config, data = made("kd", teacher_cache=cache, teacher_top=top)
    teacher: Teacher = load_teacher(config, data, precision="float32", device=CUDA)
    batch = first_batch(config, data)
    images, _ = data.images.views(batch.sample_ids, batch.view_ids)
    teacher._network()  # its weights are copied at once
    before = cuda.waits
    for _ in range(2):  # what is cached on the device is there in the second
        logits = teacher.logits(images, batch.sample_ids, batch.view_ids)
        teacher.flush()
        assert logits.shape == (16, 10) and logits.device == CUDA
    assert cuda.waits - before == (cache == "on"), "for the rows that are to be written, once"


@pytest.mark.parametrize("size", [None, 16, 64])
def test_evaluation_waits_for_nothing_before_its_figures(size, made, cuda):
    config, data = made("ekd", student_image_size=size, ood_dataset="digits")
    model = learner_of(config, data).student.eval()
    ids = data.validation_ids
    predict(model, data, data.images, ids, config, "float32")
    with cuda.no_waiting():
        logits, target = predict(model, data, data.images, ids, config, "float32")
        outside, _ = predict(model, data, data.ood_images, data.ood_ids, config, "float32")
    assert logits.device == target.device == outside.device == CUDA
    found = evaluate_model(model, data, ids, config=config, precision="float32", log_prior=0.0)
    assert {"top1", "ood_auroc", "dissonance"} <= set(found.metrics)


@pytest.mark.parametrize("log_prior", [None, -1.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_every_figure_is_that_of_the_device(log_prior, classes, cuda, monkeypatch):
    monkeypatch.setattr("ekd_ray.engine.measure.uncertainty.DISSONANCE_OPERATIONS", 1e6)
    logits, target = torch.randn(64, classes), torch.arange(64) % classes
    logits[0, 0] = 9.0  # right, and not all are
    there = torch.empty(64, classes, device=CUDA), torch.empty(64, dtype=torch.int64, device=CUDA)
    expected = classification_metrics(logits, target, log_prior=log_prior, ood_logits=logits)
    found = classification_metrics(*there, log_prior=log_prior, ood_logits=there[0])
    assert set(expected) == set(found)


def test_predictions_are_kept_on_the_host(made, cuda):
    config, data = made("ekd")
    model = learner_of(config, data).student.eval()
    logits, labels = predict(model, data, data.images, data.validation_ids, config, "float32")
    teacher = teacher_predictions(config, data, data.validation_ids, precision="float32")
    kept = Predictions.of(
        logits, labels, log_prior=0.0, class_names=data.class_names, teacher=teacher
    )
    assert {v.device.type for v in vars(kept).values() if isinstance(v, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("scheme", VIEW_SCHEMES)
def test_views_wait_for_nothing(scheme, made, cuda):
    _, data = made("none")
    stage = data.images
    stage.scheme = scheme
    with cuda.no_waiting():
        images, labels = stage.views([3, 1, 4], [0, 0, 0])
    assert images.shape == (3, 3, 32, 32) and images.device == labels.device == CUDA


@pytest.mark.parametrize("op", range(len(STRONG_OPS)), ids=[op.name for op in STRONG_OPS])
def test_strong_views_wait_for_nothing(op, cuda):
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=CUDA)
    draw = strong_draws([0, 1, 2, 3], [0, 1, 2, 3], seed=0)
    draw = dataclasses.replace(draw, ops=draw.ops * 0 + op)
    with cuda.no_waiting():
        assert strong_augment(images, draw).device == CUDA


def test_the_fake_refuses_what_cuda_does(cuda):
    there, here = torch.empty(3, 4, device=CUDA), torch.ones(3, 4)
    rows = torch.arange(3)
    for mixed in (lambda: there + here, lambda: there.index_select(0, rows), lambda: there[rows]):
        with pytest.raises(DevicesMixed):
            mixed()
    waits = (
        lambda: float(there.sum()), lambda: there.cpu(), lambda: there[there > 0],
        lambda: there.nonzero(), lambda: there.unique(), lambda: here.to(CUDA),
        lambda: here.to(CUDA, non_blocking=True), lambda: here.pin_memory().to(CUDA),
        lambda: torch.tensor(1.0, device=CUDA), lambda: bool(there.isnan().any()),
    )  # fmt: skip
    for wait in waits:
        with cuda.no_waiting(), pytest.raises(HostWaits):
            wait()
    with cuda.no_waiting():
        there + here.pin_memory().to(CUDA, non_blocking=True)
        there * torch.tensor(2.0)
