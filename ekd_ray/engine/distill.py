"""One training run, with no Ray in it: the loop that every trial and final run goes through."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data import Batch, counter_hash, epoch_batches, make_ahead
from ekd_ray.data import steps_per_epoch as count_steps
from ekd_ray.data.counter import STREAM_STEP
from ekd_ray.engine import ranks
from ekd_ray.engine.checkpoint import (
    CHECKPOINT,
    DamagedCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from ekd_ray.engine.compiling import CompiledForward, wants_compilation
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.environment import warn_of_change
from ekd_ray.engine.evaluate import evaluate_model, student_inputs
from ekd_ray.engine.learner import Averages, Learner, make_optimizer
from ekd_ray.engine.measure.inheritance import compare_uncertainty
from ekd_ray.engine.measure.teacher_pass import teacher_priors
from ekd_ray.engine.precision import (
    autocast,
    cpu_threads,
    make_scaler,
    pick_device,
    resolve_precision,
)
from ekd_ray.engine.random_state import random_state, restore_random_state, seed_generator
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import RunData, load_run_data, strong_images
from ekd_ray.engine.runlog import RunLog, Session
from ekd_ray.engine.schedule import learning_rate
from ekd_ray.engine.teacher.source import Teacher, TeacherOutputs, evaluation_logits, load_teacher
from ekd_ray.losses.objective import Objective
from ekd_ray.losses.wkd import class_cosines
from ekd_ray.models import build_model, load_backbone

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
class TrainedStudent:
    """A student after its run, in memory.

    `metrics` is the last epoch's row (see `distill`), `history` all rows, `model` the
    student with its trained weights, `log_prior` its prior if it is evidential; `precision` and
    `compiled` tell what an `auto` among the settings became.
    """

    config: DistillConfig
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    model: nn.Module
    log_prior: float | None
    precision: str
    compiled: bool = False
    data_fingerprint: str
    seconds: float


@dataclass(kw_only=True)
class Run:
    """Everything that one run holds while it trains; `epoch` counts from 1, `step` from 0.

    `teachers` are none, that of the weak views, or it and that of the strong ones; `class_cosines`
    are of its classifier, where the method reads them; `taught` are its logits [N, C] on the
    validation images, with `compare_teacher`, and `teacher_log_prior` what they are read with.
    `forward` is the learner as a step calls it, and `averages` has the moving averages of its
    weights, where the configuration asks for them.
    `draws` tells whether a layer of the student draws random numbers, None until a step of the
    epoch has shown it; `seeded` is the state that it begins with.
    """

    config: DistillConfig
    data: RunData
    learner: Learner
    forward: nn.Module | CompiledForward
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    teachers: list[Teacher]
    device: torch.device
    precision: str
    steps_per_epoch: int
    class_cosines: Tensor | None = None
    averages: Averages | None = None
    taught: Tensor | None = None
    teacher_log_prior: float | None = None
    epoch: int = 1
    step: int = 0
    draws: bool | None = None
    seeded: Tensor | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def compiled(self) -> bool:
        """Whether the steps run as a compiled program."""
        return isinstance(self.forward, CompiledForward)

    @property
    def result(self) -> Learner:
        """The learner that is evaluated and exported, or the averages of its weights."""
        return self.averages.learner if self.averages else self.learner

    def compile(self) -> None:
        """Let the steps run as a compiled program, on a GPU as CUDA graphs where that is right."""
        graphs = self.device.type == "cuda" and self.config.accumulation_steps == 1
        self.forward = CompiledForward(self.learner, graphs=graphs)
        if graphs:  # no value of the step is then one of the host
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(self.config.lr, device=self.device)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Keep the epoch's row and go on to the next one."""
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.learner.sums.zero_()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A batch, or a part of one, as the learner takes it: this rank's rows, on the device.

    `shares` are those of the classes [B, C] in pictures that are mixed, else None.
    `inputs` are what the student sees, and `logits` the teacher's: of the weak view, and of the
    strong one where the method looks at it. `features` are those of the teacher's layers.
    """

    batch: Batch
    target: Tensor
    shares: Tensor | None
    inputs: list[Tensor]
    logits: list[Tensor]
    features: tuple[Tensor, ...]


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
) -> TrainedStudent:
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
        stack.enter_context(restore_random_state(pick_device()))  # steps seed the generators
        stack.enter_context(cpu_threads(threads))
        stack.enter_context(arithmetic(deterministic=bool(config.deterministic)))
        run = start_run(config, data_root)
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
        if run.compiled:
            stack.callback(torch.compiler.reset)  # gives back the memory of CUDA graphs
        stack.enter_context(ranks.synchronized_batch_norm(run.learner.student))
        saved_at = started = time.monotonic()
        while run.epoch <= run.config.epochs:
            epoch_started = time.monotonic()
            if checkpoint and checkpoint_steps:
                train_epoch(run, checkpoint=checkpoint, checkpoint_steps=checkpoint_steps)
            else:
                train_epoch(run)
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
    return TrainedStudent(
        config=run.config,
        metrics=run.history[-1],
        history=run.history,
        model=run.result.student.eval(),
        log_prior=run.result.objective.log_prior_value,
        precision=run.precision,
        compiled=run.compiled,
        data_fingerprint=run.data.fingerprint,
        seconds=time.monotonic() - started,
    )


def start_run(config: DistillConfig, data_root: str | None) -> Run:
    """A run before its first step: data, student, objective, teachers and optimizer in memory.

    Raises:
        UserError: bad configuration or data.
    """
    config = resolve(config, data_root=data_root)
    device = pick_device()
    precision = resolve_precision(config.precision, device)
    data = load_run_data(config, data_root=data_root, device=device)
    objective = Objective(config)
    seed_generator(torch.device("cpu"), config.seed)
    student = build_model(config.student, data.num_classes)
    if config.student_weights is not None:
        load_backbone(student, config.student_weights)
    learner = Learner(student, objective).to(device)
    if config.channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    averages = Averages(learner, config.ema_decay) if config.ema_decay else None
    teachers = [
        load_teacher(config, data, precision=precision, device=device, strong=strong)
        for strong in (False, True)[: 1 + objective.method.strong_view]
        if objective.method.needs_teacher
    ]
    cosines = None
    if objective.method.class_cosines:
        cosines = class_cosines(teachers[0].classifier).to(device)
    taught, teacher_log_prior = None, None
    if config.compare_teacher and teachers and len(data.validation_ids):
        taught = evaluation_logits(
            config, data, data.validation_ids, precision=precision, device=device
        )
        teacher_log_prior = teacher_priors(config)[1]
    run = Run(
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
        class_cosines=cosines,
        averages=averages,
        taught=taught,
        teacher_log_prior=teacher_log_prior,
    )
    if wants_compilation(config, device, config.epochs * run.steps_per_epoch):
        run.compile()
    return run


def train_epoch(
    run: Run, *, checkpoint: Path | None = None, checkpoint_steps: int | None = None
) -> None:
    """All steps of the epoch from `run.step` on; where the table is full, the host reads no value.

    Args:
        checkpoint: file of a checkpoint every `checkpoint_steps` steps.
    """
    run.learner.train()
    run.draws = run.draws or None
    factors = run.learner.objective.factors(run.epoch)
    with contextlib.closing(make_ahead(_parts(run), run.device)) as parts:
        for part in parts:
            _train_step(run, part, factors)
            due = checkpoint_steps and run.step % checkpoint_steps == 0
            if checkpoint and due and _is_last_part(run.config, part.batch):
                _save(run, checkpoint)
    for teacher in run.teachers:
        teacher.flush()


def _parts(run: Run) -> Generator[Part, None, None]:
    """The epoch's batches from `run.step` on, each in `accumulation_steps` parts."""
    config, data = run.config, run.data
    parts = config.accumulation_steps
    batches = epoch_batches(
        data.train_ids,
        batch_size=config.batch_size // parts,
        seed=config.seed,
        epoch=run.epoch,
        num_views=data.num_views,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
        start_step=run.step * parts,
        strong_pool=config.view_pool if run.learner.objective.method.strong_view else None,
        labels=data.train_labels,
        class_balance=config.class_balance,
    )
    # What fills no whole batch may still fill a part of one.
    wanted = itertools.islice(batches, (run.steps_per_epoch - run.step) * parts)
    with contextlib.closing(data.stream(wanted)) as stream:
        for batch, images, target, shares in stream:
            views = [(images, batch.view_ids)]
            if batch.strong_ids is not None:
                strong = strong_images(config, data, batch.sample_ids, batch.strong_ids)
                views.append((strong, batch.strong_ids))
            logits: list[Tensor] = []
            features: tuple[Tensor, ...] = ()
            for teacher, (view, view_ids) in zip(run.teachers, views, strict=False):
                if teacher.layers:
                    said, features = teacher.features(view)
                else:
                    said = teacher.logits(view, batch.sample_ids, view_ids)
                logits.append(said)
            yield Part(
                batch=batch,
                target=target,
                shares=shares,
                inputs=[student_inputs(view, data, config) for view, _ in views],
                logits=logits,
                features=features,
            )


def _is_last_part(config: DistillConfig, batch: Batch) -> bool:
    return (batch.step + 1) % config.accumulation_steps == 0


def _train_step(run: Run, part: Part, factors: Tensor) -> None:
    """Forward and backward of a batch, or of a part of one; the last part moves the weights."""
    last = _is_last_part(run.config, part.batch)
    if part.batch.step % run.config.accumulation_steps == 0:
        _begin_step(run)
    if not isinstance(run.forward, CompiledForward):
        _add_gradients(run, part, factors)
    elif not run.forward.survives(lambda: _add_gradients(run, part, factors)):
        run.forward = run.learner
        _begin_step(run)
        _add_gradients(run, part, factors)
    if last:
        if run.config.max_grad_norm is not None:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.learner.parameters(), run.config.max_grad_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.averages is not None:
            run.averages.move(_global_step(run))
        run.step += 1
        if run.draws is None:
            assert run.seeded is not None
            run.draws = not torch.equal(random_state(run.device), run.seeded)


def _add_gradients(run: Run, part: Part, factors: Tensor) -> None:
    """Forward and backward pass of a part of a batch."""
    parts = run.config.accumulation_steps
    rows = run.config.batch_size // parts
    # What the teacher says and the targets are those of the rows that all ranks have.
    logits, target = ranks.gather_columns(part.logits, rows), ranks.gather_rows(part.target, rows)
    shares = None if part.shares is None else ranks.gather_rows(part.shares, rows)
    features = tuple(ranks.gather_rows(feature, rows) for feature in part.features)
    weak, strong = (*logits, None, None)[:2]
    teacher = None
    if weak is not None:
        teacher = TeacherOutputs(weak, strong, features, run.class_cosines)
    inputs, strong_inputs = (*part.inputs, None)[:2]
    with ranks.exchange_gradients(run.forward, last=_is_last_part(run.config, part.batch)):
        with autocast(run.precision, run.device):
            loss, _, _ = run.forward(inputs, teacher, target, factors, strong_inputs, shares)
        run.scaler.scale(loss / parts if parts > 1 else loss).backward()


def _global_step(run: Run) -> int:
    return (run.epoch - 1) * run.steps_per_epoch + run.step


def _begin_step(run: Run) -> None:
    global_step = _global_step(run)
    lr = learning_rate(run.config, global_step, run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    if run.draws is not False:
        # Dropout, where a student has it, draws from the step, so that a resumed run repeats it.
        key = counter_hash(run.config.seed, STREAM_STEP, global_step, ranks.rank())
        seed_generator(run.device, int(key) >> 1)
        run.seeded = random_state(run.device)


def _epoch_row(run: Run) -> dict[str, Any]:
    """The epoch's metrics; the only place where the host waits for the device."""
    objective = run.result.objective
    last_step = run.epoch * run.steps_per_epoch - 1
    row: dict[str, Any] = {
        "epoch": run.epoch,
        "lr": learning_rate(run.config, last_step, run.steps_per_epoch),
        **run.learner.means(run.steps_per_epoch),
        **objective.state(run.epoch),
    }
    if run.scaler.is_enabled():
        row["loss_scale"] = run.scaler.get_scale()
    _check_finite(row, run)
    if len(run.data.validation_ids):
        evaluation = evaluate_model(
            run.result.student,
            run.data,
            run.data.validation_ids,
            config=run.config,
            precision=run.precision,
            log_prior=objective.log_prior_value,
        )
        row |= {f"val_{name}": value for name, value in evaluation.metrics.items()}
        if run.taught is not None:
            found = compare_uncertainty(
                evaluation.logits, run.taught, log_prior=objective.log_prior_value,
                teacher_log_prior=run.teacher_log_prior,
            )  # fmt: skip
            row |= {f"val_{name}": value for name, value in ranks.from_first(found).items()}
    _check_finite(row, run)
    return row


def _check_finite(row: dict[str, Any], run: Run) -> None:
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


def _save(run: Run, path: Path) -> None:
    """Write the run's checkpoint, which is the same on every rank, from the first one."""
    if ranks.is_first():
        progress = {
            "epoch": run.epoch,
            "step": run.step,
            "history": run.history,
            "sums": run.learner.sums,
            "scaler": run.scaler.state_dict(),
            "compiled": run.compiled,
            "fingerprint": run.config.fingerprint(),
            "conditions": _conditions(run),
        }
        if run.averages is not None:
            progress["averages"] = run.averages.learner.state_dict()
        save_checkpoint(path, learner=run.learner, optimizer=run.optimizer, progress=progress)


def _conditions(run: Run) -> dict[str, Any]:
    """The conditions that decide a run's bits and are no part of its identity."""
    return {
        "threads": torch.get_num_threads(),
        "workers": ranks.world_size(),
        "device": run.device.type,
        "precision": run.precision,
        "deterministic": bool(run.config.deterministic),
        "torch": str(torch.__version__),
    }


def _restore(run: Run, path: Path) -> None:
    fingerprint = run.config.fingerprint()
    progress = load_checkpoint(
        path, fingerprint=fingerprint, learner=run.learner, optimizer=run.optimizer
    )
    if ranks.is_first():
        warn_of_change(path.parent, progress.get("conditions", {}), _conditions(run))
    run.epoch, run.step, run.history = progress["epoch"], progress["step"], progress["history"]
    run.learner.sums.copy_(progress["sums"])
    if run.averages is not None:
        run.averages.learner.load_state_dict(progress["averages"])
    # Under `auto`, a run may go on where another precision is fast.
    if progress.get("scaler"):
        run.scaler.load_state_dict(progress["scaler"])
    may_compile = run.config.compile != "off" and ranks.world_size() == 1
    if progress.get("compiled", run.compiled) and may_compile:
        run.compile()  # also where it is already: the rate has come from the file
    elif run.compiled:
        run.forward = run.learner
