"""One training run, with no Ray in it: the loop that every trial and final run goes through."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data import Batch, counter_hash, epoch_batches
from ekd_ray.data import steps_per_epoch as count_steps
from ekd_ray.data.counter import STREAM_STEP
from ekd_ray.engine import ranks
from ekd_ray.engine.checkpoint import (
    CHECKPOINT,
    DamagedCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.evaluate import evaluate_model, student_inputs
from ekd_ray.engine.learner import Learner, make_optimizer
from ekd_ray.engine.precision import (
    autocast,
    cpu_threads,
    make_scaler,
    pick_device,
    resolve_precision,
)
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import RunData, load_run_data, strong_images
from ekd_ray.engine.runlog import RunLog, Session
from ekd_ray.engine.schedule import learning_rate
from ekd_ray.engine.teacher.source import Teacher, TeacherLogits, load_teacher
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model

OnEpoch = Callable[[dict[str, Any]], None]
# Smallest scale of the loss under float16. It falls by one half in every step that is skipped:
# 26 in a row from its start mean that no scale is small enough.
LEAST_LOSS_SCALE = 2.0**-10


class Diverged(Exception):
    """A run whose loss or weights stopped being finite; the message says where.

    Under float16 a step whose gradients overflow is skipped, which is no divergence, unless steps
    are skipped until the scale of the loss is nothing. The loss is computed in float32: one that
    is not finite means that the network overflows, which no scale mends.
    """


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run, in memory.

    `metrics` is the last epoch's row (see `distill`), `history` all rows, `model` the
    student with its trained weights, `log_prior` its prior if it is evidential.
    """

    config: DistillConfig
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    model: nn.Module
    log_prior: float | None
    precision: str
    data_fingerprint: str
    seconds: float


class EpochSums:
    """Running sums over the steps of an epoch, in one tensor on the device.

    `values`, float64 [2 + T]: the loss, the share of correct answers, and the T unweighted terms.
    """

    def __init__(self, terms: Iterable[str], device: torch.device) -> None:
        self.terms = tuple(terms)
        self.values = torch.zeros(2 + len(self.terms), dtype=torch.float64, device=device)

    def add(
        self, loss: Tensor, logits: Tensor, target: Tensor, terms: Mapping[str, Tensor], parts: int
    ) -> None:
        """Add what `Learner.forward` gave for one of the `parts` of a batch."""
        correct = (logits.detach().argmax(dim=1) == target).double().mean()
        named = [terms[name] for name in self.terms]
        self.values += torch.stack([loss.detach(), correct, *named]).double() / parts

    def means(self, steps: int) -> dict[str, float]:
        """`train_loss`, `train_top1` and `loss_<term>`, the same on every rank (waits for the
        device)."""
        names = ("train_loss", "train_top1", *(f"loss_{name}" for name in self.terms))
        return dict(zip(names, ranks.from_first((self.values / steps).tolist()), strict=True))


@dataclass(kw_only=True)
class _Run:
    """Everything that one run holds while it trains; `epoch` counts from 1, `step` from 0.

    `teachers` are none, that of the weak views, or it and that of the strong ones.
    """

    config: DistillConfig
    data: RunData
    learner: Learner
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    teachers: list[Teacher]
    device: torch.device
    precision: str
    steps_per_epoch: int
    sums: EpochSums
    epoch: int = 1
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Keep the epoch's row and go on to the next one."""
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = EpochSums(self.learner.objective.weights(self.epoch), self.device)


def distill(
    config: DistillConfig,
    *,
    data_root: str | None = None,
    out: Path | None = None,
    on_epoch: OnEpoch | None = None,
    threads: int | None = None,
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int | None = None,
    constants: Mapping[str, float] | None = None,
    session: Session | None = None,
) -> RunResult:
    """Train one student (or, with a method that has no teacher, one network).

    Args:
        config: the run; it is resolved and checked first.
        data_root: folder of the data sets.
        out: folder for `history.jsonl`, TensorBoard events and the checkpoint; a run
            interrupted there continues, bit for bit as if it had not been. From a checkpoint
            that is damaged nothing can continue: the run begins again, with a warning.
        on_epoch: called (on every rank) with each epoch's row: `epoch` (from 1), `lr`,
            `train_loss`, `train_top1`, `loss_<term>` (unweighted), `log_prior` if
            evidential, `temperature` if learned, `loss_scale` under float16, `val_*` (see
            `classification_metrics`) if there is a validation split, and `seconds`.
        threads: CPU threads; part of what bitwise reproduction needs. The number that was set
            before is set again afterwards, as torch's random state is.
        checkpoint_seconds: least time between two checkpoints at epoch ends.
        checkpoint_steps: also checkpoint every so many steps, inside the epoch.
        constants: figures that every row is to carry, such as the student's costs.
        session: the part of the run that TensorBoard's HParams tab shows (all settings).

    Raises:
        UserError: bad configuration or data, another run's checkpoint, or with `deterministic` an
            operation that has no such algorithm. Diverged: NaN or infinity.
    """
    with contextlib.ExitStack() as stack:
        # Every step seeds torch's generators: the caller gets the state back that it had.
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(cpu_threads(threads))
        stack.enter_context(arithmetic(deterministic=bool(config.deterministic)))
        run = _start(resolve(config, data_root=data_root), data_root)
        checkpoint = out / CHECKPOINT if out else None
        if checkpoint and checkpoint.exists():
            try:
                _restore(run, checkpoint)
            except DamagedCheckpoint as error:  # looked at before anything is restored
                warnings.warn(f"{error} It is begun again from its start.", stacklevel=2)
        log = None
        if out and ranks.is_first():
            shown = {k: v for k, v in run.config.to_dict().items() if v is not None}
            log = RunLog(out, hyperparameters=shown, history=run.history, session=session)
            stack.push(log.close_after)
        stack.enter_context(ranks.synchronized_batch_norm(run.learner.student))
        saved_at = started = time.monotonic()
        while run.epoch <= run.config.epochs:
            epoch_started = time.monotonic()
            with contextlib.closing(_batches(run)) as batches:
                for batch, images, target in batches:
                    _train_step(run, batch, images, target)
                    due = checkpoint_steps and run.step % checkpoint_steps == 0
                    if checkpoint and due and _is_last_part(run.config, batch):
                        _save(run, checkpoint)
            row = _epoch_row(run) | dict(constants or {})
            row["seconds"] = time.monotonic() - epoch_started
            run.end_epoch(row)
            if log:
                log.write(row)
            due = time.monotonic() - saved_at >= checkpoint_seconds
            if checkpoint and ranks.from_first(due or run.epoch > run.config.epochs):
                _save(run, checkpoint)
                saved_at = time.monotonic()
            if on_epoch:
                on_epoch(row)
    return RunResult(
        config=run.config,
        metrics=run.history[-1],
        history=run.history,
        model=run.learner.student.eval(),
        log_prior=run.learner.objective.log_prior_value,
        precision=run.precision,
        data_fingerprint=run.data.fingerprint,
        seconds=time.monotonic() - started,
    )


def _start(config: DistillConfig, data_root: str | None) -> _Run:
    device = pick_device()
    precision = resolve_precision(config.precision, device)
    data = load_run_data(config, data_root=data_root, device=device)
    objective = Objective(config)
    torch.manual_seed(config.seed)
    student = build_model(config.student, data.num_classes)
    learner = Learner(student, objective, compiled=config.compile).to(device)
    if config.channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    teachers = [
        load_teacher(config, data, precision=precision, device=device, strong=strong)
        for strong in (False, True)[: 1 + objective.method.strong_view]
        if objective.method.needs_teacher
    ]
    return _Run(
        config=config,
        data=data,
        learner=learner,
        forward=ranks.parallelize(learner, device),
        optimizer=make_optimizer(config, learner),
        scaler=make_scaler(precision, device),
        teachers=teachers,
        device=device,
        precision=precision,
        steps_per_epoch=count_steps(len(data.train_ids), config.batch_size),
        sums=EpochSums(objective.weights(1), device),
    )


def _batches(run: _Run) -> Generator[tuple[Batch, Tensor, Tensor], None, None]:
    """The epoch's batches from `run.step` on, each in `accumulation_steps` parts."""
    run.learner.train()
    config = run.config
    parts = config.accumulation_steps
    batches = epoch_batches(
        run.data.train_ids,
        batch_size=config.batch_size // parts,
        seed=config.seed,
        epoch=run.epoch,
        num_views=run.data.images.num_views,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        start_step=run.step * parts,
        strong_pool=config.view_pool if run.learner.objective.method.strong_view else None,
    )
    # What fills no whole batch may still fill a part of one.
    return run.data.images.stream(
        itertools.islice(batches, (run.steps_per_epoch - run.step) * parts)
    )


def _is_last_part(config: DistillConfig, batch: Batch) -> bool:
    return (batch.step + 1) % config.accumulation_steps == 0


def _train_step(run: _Run, batch: Batch, images: Tensor, target: Tensor) -> None:
    """Forward and backward of a batch, or of a part of one; the last part moves the weights."""
    config = run.config
    parts = config.accumulation_steps
    rows = config.batch_size // parts
    last = _is_last_part(config, batch)
    if batch.step % parts == 0:
        _begin_step(run)
    views = [(images, batch.view_ids)]
    if batch.strong_ids is not None:
        strong = strong_images(config, run.data, batch.sample_ids, batch.strong_ids)
        views.append((strong, batch.strong_ids))
    inputs, *strong_inputs = [student_inputs(view, run.data, config) for view, _ in views]
    logits_of_views = [
        teacher.logits(view, batch.sample_ids, view_ids)
        for teacher, (view, view_ids) in zip(run.teachers, views, strict=False)
    ]
    teacher = None  # its logits of the rows that all ranks have
    if logits_of_views:
        teacher = TeacherLogits(*ranks.gather_columns(logits_of_views, rows))
    target = ranks.gather_rows(target, rows)
    with ranks.exchange_gradients(run.forward, last=last):
        with autocast(run.precision, run.device):
            loss, logits, terms = run.forward(inputs, teacher, target, run.epoch, *strong_inputs)
        run.scaler.scale(loss / parts).backward()
    run.sums.add(loss, logits, target, terms, parts)
    if last:
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.step += 1


def _begin_step(run: _Run) -> None:
    global_step = (run.epoch - 1) * run.steps_per_epoch + run.step
    lr = learning_rate(run.config, global_step, run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    # Dropout, where a student has it, draws from the step, so that a resumed run repeats it.
    key = counter_hash(run.config.seed, STREAM_STEP, global_step, ranks.rank())
    torch.manual_seed(int(key) >> 1)


def _epoch_row(run: _Run) -> dict[str, Any]:
    """The epoch's metrics; the only place where the host waits for the device."""
    objective = run.learner.objective
    last_step = run.epoch * run.steps_per_epoch - 1
    row: dict[str, Any] = {
        "epoch": run.epoch,
        "lr": learning_rate(run.config, last_step, run.steps_per_epoch),
        **run.sums.means(run.steps_per_epoch),
        **objective.state(run.epoch),
    }
    if run.scaler.is_enabled():
        row["loss_scale"] = run.scaler.get_scale()
    _check_finite(row, run)
    if len(run.data.validation_ids):
        evaluation = evaluate_model(
            run.learner.student,
            run.data,
            run.data.validation_ids,
            config=run.config,
            precision=run.precision,
            log_prior=objective.log_prior_value,
        )
        row |= {f"val_{name}": value for name, value in evaluation.metrics.items()}
    _check_finite(row, run)
    return row


def _check_finite(row: dict[str, Any], run: _Run) -> None:
    fault = next((f"{k} became {v}" for k, v in row.items() if not abs(v) < float("inf")), None)
    if fault is None and row.get("loss_scale", 1.0) < LEAST_LOSS_SCALE:
        fault = f"the scale of the loss fell to {row['loss_scale']:g}, gradients overflow at any,"
    # The loss does not see what the last step did to the weights.
    if fault is None and not ranks.all_finite(run.learner):
        fault = "a weight became infinite or nan"
    if fault:
        remedy = "lower lr or the weights of the loss terms"
        if run.precision == "float16":
            remedy += ", or set precision to float32"
        raise Diverged(
            f"{fault} in epoch {run.epoch} of {run.config.epochs} (lr {run.config.lr}): {remedy}."
        )


def _save(run: _Run, path: Path) -> None:
    """Write the run's checkpoint, which is the same on every rank, from the first one."""
    if ranks.is_first():
        progress = {
            "epoch": run.epoch,
            "step": run.step,
            "history": run.history,
            "sums": run.sums.values,
            "scaler": run.scaler.state_dict(),
            "fingerprint": run.config.fingerprint(),
        }
        save_checkpoint(path, learner=run.learner, optimizer=run.optimizer, progress=progress)


def _restore(run: _Run, path: Path) -> None:
    fingerprint = run.config.fingerprint()
    progress = load_checkpoint(
        path, fingerprint=fingerprint, learner=run.learner, optimizer=run.optimizer
    )
    run.epoch, run.step, run.history = progress["epoch"], progress["step"], progress["history"]
    run.sums = EpochSums(run.learner.objective.weights(run.epoch), run.device)
    run.sums.values.copy_(progress["sums"])
    # Under `auto`, a run may go on where another precision is fast.
    if progress.get("scaler"):
        run.scaler.load_state_dict(progress["scaler"])
