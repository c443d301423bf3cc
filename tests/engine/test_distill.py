"""The training loop: what it computes, what it reads, what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_runs import by_hand, same_weights, slow_view, untimed
from engine_runs import state as weights
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import ekd_ray.engine.distill as engine
import ekd_ray.engine.rundata as rundata
from ekd_ray.data import dataset_info, epoch_batches, load_dataset
from ekd_ray.engine.distill import Diverged, distill, start_run, train_epoch
from ekd_ray.engine.random_state import seed_generator
from ekd_ray.engine.rundata import load_run_data, split_ids
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.models import build_model, load_weights


@pytest.fixture(scope="module")
def plain_run(tiny):
    """An uninterrupted run of the tiny configuration, and its weights."""
    result = distill(tiny(), threads=1)
    return result, weights(result)


# What it computes


@pytest.fixture(scope="module")
def kd_config(tiny, with_teacher):
    return tiny(method="kd", epochs=1, lr_milestones=(), kd_weight=2.0, ce_weight=0.5,
                temperature=3.0, seed=3, **with_teacher)  # fmt: skip


def plain_training(config):
    """One epoch of KD as a beginner would write it; returns (model, mean losses)."""
    torch.manual_seed(config.seed)
    student = build_model(config.student, 10).train()
    teacher = build_model(config.teacher, 10)
    load_weights(teacher, config.teacher_weights)
    teacher.eval()
    arrays, info = load_dataset("synthetic", "train"), dataset_info("synthetic")
    train_ids, _ = split_ids(config, arrays.labels)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4,
        foreach=False, fused=False,
    )  # fmt: skip
    losses, temperature = [], config.temperature
    for batch in epoch_batches(
        train_ids, batch_size=config.batch_size, seed=config.seed, epoch=1, num_views=162
    ):
        views = [
            slow_view(torch.from_numpy(arrays.images[i].copy()), int(v))
            for i, v in zip(batch.sample_ids, batch.view_ids, strict=True)
        ]
        images = by_hand(torch.stack(views), info.mean, info.std)
        target = torch.from_numpy(arrays.labels[batch.sample_ids])
        with torch.no_grad():  # a teacher's logits are float16 by definition
            soft = functional.softmax(teacher(images).half().float() / temperature, dim=1)
        logits = student(images)
        log_probs = functional.log_softmax(logits / temperature, dim=1)
        kd = functional.kl_div(log_probs, soft, reduction="batchmean") * temperature**2
        ce = functional.cross_entropy(logits, target)
        total = config.ce_weight * ce + config.kd_weight * kd
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(torch.stack([total.detach(), ce.detach(), kd.detach()]))
    return student, torch.stack(losses).mean(0).tolist()


@pytest.fixture(scope="module")
def plain_student(kd_config):
    return plain_training(kd_config)


# In another memory format sums round otherwise, and a ReLU that flips moves single weights.
@pytest.mark.parametrize(("channels_last", "atol"), [(False, 2e-5), (True, 1e-3)])
def test_three_steps_equal_a_plain_loop(kd_config, plain_student, channels_last, atol):
    student, (total, ce, kd) = plain_student
    result = distill(kd_config.replace(channels_last=channels_last), threads=1)
    expected, found = student.state_dict(), result.model.state_dict()
    assert result.metrics["train_loss"] == pytest.approx(total, rel=1e-4)
    assert result.metrics["loss_ce"] == pytest.approx(ce, rel=1e-4)
    assert result.metrics["loss_kd"] == pytest.approx(kd, rel=1e-4)
    assert expected["bn1.num_batches_tracked"] == 3
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=atol, msg=key)


# The conformance suite trains every method for a few steps (test_objective.py); here one of each
# kind learns enough to be seen on validation images, and the slow tests the others.
QUICK = ("none", "evidential", "kd", "mlkd+ekd", "ctkd+ekd", "wkd")


@pytest.mark.quick_ids("[kd]", "[mlkd+ekd]")
@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method_learns(method, tiny, learnable, with_teacher):
    values = with_teacher if METHODS[method].needs_teacher else {}
    config = with_method(tiny(**learnable), method, **values)
    history = distill(config, threads=1).history
    terms = set(METHODS[method].term_names) - {"prior_kl"}  # that one's weight is 0
    assert {name for name in history[-1] if name.startswith("loss_")} == {
        f"loss_{t}" for t in terms
    }
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert history[-1]["train_top1"] > 0.3  # chance is 0.1
    assert history[-1]["val_top1"] > 0.2


def test_rows_have_the_documented_columns(plain_run):
    result, _ = plain_run
    names = {"epoch", "lr", "train_loss", "train_top1", "loss_ce", "seconds"}
    figures = ("top1", "top5", "balanced_top1", "worst_recall", "nll", "ece", "aurc", "error_auroc")
    validation = {f"val_{name}" for name in figures}
    assert [row["epoch"] for row in result.history] == [1, 2]
    for row in result.history:
        # Whether uncertainty ranks the errors is no question if all or none are errors.
        undefined = set() if 0 < row["val_top1"] < 1 else {"val_error_auroc"}
        assert set(row) == (names | validation) - undefined
    assert result.metrics == result.history[-1]
    assert result.history[0]["lr"] == 0.05
    assert result.history[1]["lr"] == pytest.approx(0.05 * 0.1)  # milestone 0.625 * 2 is 1
    assert not result.model.training


def test_validation_metrics_are_those_of_the_final_weights(plain_run, tiny):
    result, _ = plain_run
    data = load_run_data(result.config, data_root=None, device=torch.device("cpu"))
    again = engine.evaluate_model(
        result.model, data, data.validation_ids,
        config=result.config, precision="float32", log_prior=None,
    )  # fmt: skip
    found = {f"val_{k}": v for k, v in again.metrics.items()}
    assert found.items() <= result.metrics.items()


# Determinism


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(plain_run, tiny):
    first, bits = plain_run
    torch.manual_seed(987654321)
    second = distill(tiny(), threads=1)
    assert untimed(second.history) == untimed(first.history)
    assert same_weights(weights(second), bits)


def test_the_callers_random_state_and_threads_are_left_as_they_were(tiny):
    torch.manual_seed(7)
    torch.set_num_threads(2)
    expected, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        seen = []
        distill(
            tiny(epochs=1), threads=1, on_epoch=lambda row: seen.append(torch.get_num_threads())
        )
        assert seen == [1]
        assert torch.equal(torch.get_rng_state(), expected)
        assert torch.get_num_threads() == threads == 2
        with pytest.raises(UserError):
            distill(tiny(student="none such"), threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_every_step_has_a_dropout_of_its_own(tiny, monkeypatch):
    """Its mask is a function of seed and step: a resumed run repeats it, and no step another's."""
    masks = []

    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3 * 32 * 32, 10)

        def forward(self, images):
            drop = functional.dropout(torch.ones(64), training=self.training)
            masks.append(tuple(drop.tolist()))
            return self.head(images.flatten(1))

    monkeypatch.setattr(engine, "build_model", lambda name, classes: Dropping())
    for seed in (0, 0, 1):
        distill(tiny(seed=seed, validation_fraction=0.0, lr=1e-4), threads=1)
    first, again, other = masks[:10], masks[10:20], masks[20:]
    assert first == again
    assert len({*first, *other}) == 20


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_student_that_draws_nothing_is_not_seeded_in_every_step(rate, tiny, monkeypatch):
    """Whether it does, the first step of an epoch tells."""
    seeded = []

    def counted(device, seed):
        seeded.append(device)
        seed_generator(device, seed)

    def student(name, classes):
        head = torch.nn.Linear(3 * 32 * 32, classes)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(rate), head)

    monkeypatch.setattr(engine, "build_model", student)
    monkeypatch.setattr(engine, "seed_generator", counted)
    distill(tiny(lr=1e-4), threads=1)  # 2 epochs of 3 steps
    assert len(seeded) == 1 + (6 if rate else 2)


# What it reads


def test_training_never_opens_the_test_split(tiny, monkeypatch):
    opened = []

    def guarded(name, split, **kwargs):
        opened.append(split)
        assert split != "test", "distill opened the test split"
        return load_dataset(name, split, **kwargs)

    monkeypatch.setattr(rundata, "load_dataset", guarded)
    distill(tiny(epochs=1), threads=1)
    assert opened == ["train"]


class NoReads(TorchDispatchMode):
    """Raises where the host reads a value of a tensor."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero
        )  # fmt: skip
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["none", "ctkd+ekd", "mlkd+ekd", "dkd"])
def test_the_host_reads_no_value_within_an_epoch(method, tiny, with_teacher):
    teacher = with_teacher if METHODS[method].needs_teacher else {}
    config = with_method(tiny(optimizer="adamw", lr=1e-3, view_pool=2), method, **teacher)
    run = start_run(config, None)
    with NoReads():
        train_epoch(run)
    assert run.step == run.steps_per_epoch == 3
    assert run.learner.sums.isfinite().all()


def test_no_validation_image_is_trained_on(tiny):
    labels = load_dataset("synthetic", "train").labels
    train, validation = split_ids(tiny(), labels)
    assert len(train) == 48
    assert len(validation) == 32
    assert not set(train.tolist()) & set(validation.tolist())
    whole, none = split_ids(tiny(validation_fraction=0.0), labels)
    assert set(whole.tolist()) == set(train.tolist()) | set(validation.tolist())
    assert len(none) == 0


def test_other_data_than_the_configuration_was_made_for_is_refused(tiny, plain_run):
    fingerprint = plain_run[0].data_fingerprint
    load_run_data(tiny(data_fingerprint=fingerprint), data_root=None, device=torch.device("cpu"))
    with pytest.raises(UserError, match=f"must be 0123, got {fingerprint}"):
        distill(tiny(data_fingerprint="0123"), threads=1)


# How it fails


@pytest.mark.parametrize("lr", [1e20, 1e38])
def test_divergence_names_the_epoch(tiny, tmp_path, monkeypatch, lr):
    monkeypatch.setattr(engine, "learning_rate", lambda *_: lr)  # no legal one does it for sure
    rows, config = [], tiny()
    said = rf"became (nan|inf) in epoch 1 of 2 \(lr {config.lr}"
    with pytest.raises(Diverged, match=said) as caught:
        distill(config, out=tmp_path, on_epoch=rows.append, threads=1)
    assert "\n" not in str(caught.value)
    assert rows == []
    assert (tmp_path / "history.jsonl").read_text() == ""


@pytest.mark.parametrize("validation_fraction", [0.4, 0.0])
def test_divergence_in_the_very_last_step_is_noticed(tiny, monkeypatch, validation_fraction):
    """No loss follows the last step: the validation, or without one the weights, must tell."""
    sane, calls = engine.learning_rate, itertools.count()
    config = tiny(epochs=1, validation_fraction=validation_fraction)
    last = round(80 * (1 - validation_fraction)) // 16 - 1
    monkeypatch.setattr(
        engine, "learning_rate", lambda c, s, n: 1e300 if next(calls) == last else sane(c, s, n)
    )
    with pytest.raises(Diverged, match="epoch 1 of 1"):
        distill(config, threads=1)
