"""Checks for every method: functions that raise `AssertionError` for one that fails.

`ekd_ray.testing.check_method` runs all of them, and trains. A check takes a `Case`: the method
under some settings. Those of `VARIANT_CHECKS` hold under any settings, `METHOD_CHECKS` look at the
method itself.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ekd_ray.config import DistillConfig
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.errors import UserError, require
from ekd_ray.losses.methods import METHODS, Method, resolve_method
from ekd_ray.losses.objective import Objective
from ekd_ray.losses.torch_private import fake_tensors
from ekd_ray.losses.wkd import class_cosines

# Of one feature, without the batch: the student's and the teacher's.
Shapes = tuple[tuple[int, ...], tuple[int, ...]]

LIMIT = 1e4  # logits up to this size give finite losses
# Where a form breaks first: overflow of exp in float32 and float64, saturation of the `exp`
# evidence, the digamma series, the last step of bfloat16.
CORNERS = (-LIMIT, LIMIT, 0.0, 88.0, 89.0, -104.0, 10.0, 20.0, 709.0, 710.0, 9984.0, 1e-30)
# Classes, type and epoch of the batches that `check_finite` makes of them.
_EXTREMES = (
    (2, torch.float32, 1),
    (10, torch.bfloat16, 40),
    (1000, torch.float32, 40),
)
FEATURE_SIZES = (0.0, 1.0, 1e3)  # a layer that says nothing, one as usual, one that has grown


@dataclasses.dataclass(frozen=True)
class Batch:
    """Logits [B, C] of both views, targets [B], and features [B, ...] by layer."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    student_strong: Tensor
    teacher_strong: Tensor
    student_features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """`function` on every tensor."""
        mapped: dict[str, Any] = {
            name: tuple(map(function, value)) if isinstance(value, tuple) else function(value)
            for name, value in vars(self).items()
        }
        return Batch(**mapped)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers in another floating type."""
        return self.map(lambda value: value.to(dtype) if value.is_floating_point() else value)

    def replace(self, **values: Any) -> Batch:
        """A copy with some tensors changed."""
        return dataclasses.replace(self, **values)

    def with_gradients(self) -> Batch:
        """Fresh leaves; the targets stay."""
        return self.map(
            lambda value: (
                value.detach().clone().requires_grad_() if value.is_floating_point() else value
            )
        )

    def students(self, method: str) -> list[Tensor]:
        """The student's tensors that the method looks at: logits of its views, then features."""
        strong = [self.student_strong] if METHODS[method].strong_view else []
        return [self.student, *strong, *self.student_features]

    def equal_sides(self) -> Batch:
        """The student says what the teacher says."""
        return self.replace(
            student=self.teacher.clone(),
            student_strong=self.teacher_strong.clone(),
            student_features=tuple(feature.clone() for feature in self.teacher_features),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A method under settings, and the shapes of the features that it compares."""

    method: str
    values: Mapping[str, Any]
    shapes: tuple[Shapes, ...] = ()

    def __str__(self) -> str:
        given = {k: v for k, v in self.values.items() if not k.endswith(("_weight", "_warmup"))}
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        return f"method {self.method!r}" + (f" with {shown}" if shown else "")

    @property
    def entry(self) -> Method:
        """The method's entry."""
        return METHODS[self.method]

    def build(self, **values: Any) -> Objective:
        """The objective, under further settings."""
        config = DistillConfig(method=self.method, **{**self.values, **values})
        return Objective(resolve_method(config))

    def draw(self, **options: Any) -> Batch:
        """A batch for the method, see `draw`."""
        return draw(shapes=self.shapes, **options)


Check = Callable[[Case], None]


def draw(
    seed: int = 0,
    batch: int = 6,
    classes: int = 7,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float64,
    shapes: Iterable[Shapes] = (),
) -> Batch:
    """Normal logits of deviation `scale`, positive features, and targets; a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logits = scale * normal(4, batch, classes)
    target = torch.randint(classes, (batch,), generator=generator)
    features = [tuple(normal(batch, *shape).abs() for shape in pair) for pair in shapes]
    student, teacher = zip(*features, strict=True) if features else ((), ())
    drawn = Batch(logits[0], logits[1], target, logits[2], logits[3], student, teacher)
    return drawn.to(dtype)


def draw_cosines(classes: int) -> Tensor:
    """`Outputs.class_cosines`, float32 [C, C], of a classifier with normal rows."""
    return class_cosines(torch.randn(classes, 5, generator=torch.Generator().manual_seed(1)))


def run(
    objective: Objective, batch: Batch, epoch: int | Tensor = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms; the strong view and cosines are given only to methods that ask for them."""
    entry = METHODS[objective.config.method]
    given: dict[str, Any] = {}
    if entry.strong_view:
        given = {"student_strong": batch.student_strong, "teacher_strong": batch.teacher_strong}
    if entry.class_cosines:
        given["class_cosines"] = draw_cosines(batch.student.shape[1])
    return cast(
        tuple[Tensor, dict[str, Tensor]],
        objective(
            batch.student, batch.teacher, batch.target, epoch, **given,
            student_features=batch.student_features, teacher_features=batch.teacher_features,
        ),
    )  # fmt: skip


def is_close(one: Tensor, other: Tensor, *, rtol: float, atol: float) -> bool:
    """Whether two tensors agree, in float64; NaN agrees with nothing."""
    return torch.allclose(one.detach().double(), other.detach().double(), rtol=rtol, atol=atol)


def require_close(
    one: Tensor, other: Tensor, sentence: str, *, rtol: float = 1e-9, atol: float = 1e-9
) -> None:
    """Raise `AssertionError` with the sentence and both values unless they agree."""
    if not is_close(one, other, rtol=rtol, atol=atol):
        one, other = one.detach().double(), other.detach().double()
        gap = float((one - other).abs().max())
        shown = f"{float(one):g} and {float(other):g}" if one.dim() == 0 else f"{gap:g} apart"
        raise AssertionError(f"{sentence}: {shown}.")


def gradients(total: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the total by each input, None where it is no function of it."""
    if not total.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


# ---------------------------------------------------------------- settings


def weights_of(method: str) -> list[str]:
    """The settings that multiply the method's terms, each once."""
    return list(dict.fromkeys(term.weight for term in METHODS[method].terms))


def warmups_of(method: str) -> list[str]:
    """The settings that ramp a weight up."""
    return list(dict.fromkeys(term.warmup for term in METHODS[method].terms if term.warmup))


def decays_of(method: str) -> list[str]:
    """The settings with the epoch after which a weight falls."""
    return [term.decay for term in METHODS[method].terms if term.decay]


def everything_on(method: str) -> dict[str, Any]:
    """Distinct weights > 0 for every term of a method, without ramps."""
    high = {entry.name: entry.high for entry in METHODS[method].settings}
    weights = {
        name: min(0.5 + 0.25 * i, high[name] or float("inf"))
        for i, name in enumerate(weights_of(method))
    }
    return weights | dict.fromkeys(warmups_of(method), 0)


def alternatives(entry: MethodSetting, value: Any) -> list[Any]:
    """Legal values of a setting other than `value`; none for a free text."""
    kinds = {entry.kind, *typing.get_args(entry.kind)}
    if entry.choices:
        return [choice for choice in entry.choices if choice != value]
    if bool in kinds:
        return [not value]
    if not kinds & {int, float}:
        return []
    wanted = (value or 0) + 5 if int in kinds else 0.7 if value is None else 1.5 * value + 0.1
    low = entry.low if entry.above is None else entry.above
    if entry.high is not None and wanted > entry.high:
        wanted = (value + (low or 0)) / 2 if value else entry.high
    return [int(wanted) if int in kinds else wanted]


def variants(method: str) -> list[dict[str, Any]]:
    """Settings to try a method with: all terms on, each other setting changed, the defaults."""
    on = everything_on(method)
    config = resolve_method(DistillConfig(method=method, **on))
    free = [entry for entry in METHODS[method].settings if entry.name not in on]
    changed = [
        {**on, entry.name: value}
        for entry in free
        for value in alternatives(entry, getattr(config, entry.name))
    ]
    return [on, *changed, {}]


# ---------------------------------------------------------------- under any settings


def check_finite(case: Case) -> None:
    """Value and gradient are finite for logits up to `LIMIT`, and for features of any size."""
    names = ("student", "teacher", "student_strong", "teacher_strong")
    for seed, (classes, dtype, epoch) in enumerate(_EXTREMES):
        generator = torch.Generator().manual_seed(seed)
        size = FEATURE_SIZES[seed % len(FEATURE_SIZES)]
        noise = case.draw(seed=seed, batch=3, classes=classes, scale=1.0)
        pick = torch.randint(len(CORNERS), (4, 3, classes), generator=generator)
        corners = torch.tensor(CORNERS)[pick].double()
        logits = {
            name: (corner + getattr(noise, name)).clamp(-LIMIT, LIMIT)
            for name, corner in zip(names, corners, strict=True)
        }
        batch = noise.replace(
            **logits,
            student_features=tuple(size * feature for feature in noise.student_features),
            teacher_features=tuple(size * feature for feature in noise.teacher_features),
        ).to(dtype)
        require_finite(case.build(), batch, epoch)
        require_finite(case.build(), batch.equal_sides(), epoch)
    for value, classes in ((0.0, 2), (1234.5, 1000), (-LIMIT, 10)):
        one = case.draw(batch=1, classes=classes, dtype=torch.float32)
        flat = dict.fromkeys(names, torch.full((1, classes), value))  # rows without any spread
        require_finite(case.build(), one.replace(**flat), 1)
        # Both sides at the bounds, opposite to each other, and the target where neither is.
        row = LIMIT * torch.tensor([[1.0, -1.0] + [0.0] * (classes - 2)])
        opposite = dict(zip(names, (row, -row, -row, row), strict=True))
        target = torch.tensor([classes - 1])
        require_finite(case.build(), one.replace(**opposite, target=target), 1)


def require_finite(objective: Objective, batch: Batch, epoch: int) -> None:
    """The total and its gradients, float32 the first and as their inputs these, are finite."""
    batch = batch.with_gradients()
    total, terms = run(objective, batch, epoch)
    require(total.dim() == 0, f"the total must be 0-d, got shape {tuple(total.shape)}.")
    largest = float(batch.student.detach().abs().max())
    where = f"for logits up to {largest:g} of {batch.student.shape[1]} classes"
    require(total.dtype == torch.float32, f"the total must be float32, got {total.dtype}.")
    values = {name: float(value) for name, value in terms.items()}
    require(torch.isfinite(total), f"the loss is not finite {where}: {values}.")
    inputs = [*batch.students(objective.config.method), *objective.parameters()]
    for one, gradient in zip(inputs, gradients(total, inputs), strict=True):
        if gradient is not None:
            require(
                gradient.isfinite().all(),
                f"the gradient of a tensor {tuple(one.shape)} is not finite {where}: {values}.",
            )


def check_order(case: Case) -> None:
    """The order of the batch does not matter, but which teacher's row goes with which sample."""
    objective, batch, order = case.build(), case.draw(), torch.tensor([3, 0, 5, 1, 4, 2])
    one = run(objective, batch, 2)[0]
    require_close(
        one,
        run(objective, batch.map(lambda value: value[order]), 2)[0],
        "the loss depends on the order of the batch",
    )
    mixed = batch.replace(
        teacher=batch.teacher[order],
        teacher_strong=batch.teacher_strong[order],
        teacher_features=tuple(feature[order] for feature in batch.teacher_features),
    )
    uses = not is_close(run(objective, mixed, 2)[0], one, rtol=1e-9, atol=1e-9)
    needs = case.entry.needs_teacher
    require(uses or not needs, "the method asks for a teacher, but its loss does not look at one.")
    require(needs or not uses, "the loss looks at a teacher that needs_teacher does not ask for.")


def check_mean(case: Case) -> None:
    """The loss is a mean over the batch: twice the same samples are the same loss."""
    objective, batch = case.build(), case.draw()
    once = run(objective, batch, 2)[1]
    twice = run(objective, batch.map(lambda value: torch.cat([value, value])), 2)[1]
    free = {name for term in case.entry.terms if term.couples_samples for name in term.names}
    for name in once.keys() - free:
        require_close(
            twice[name],
            once[name],
            f"term {name!r} is no mean over the batch, because the same samples twice give "
            "another value (a term that compares samples says couples_samples=True)",
        )


def check_repeat(case: Case) -> None:
    """The same batch gives the same loss again: nothing is kept between two steps."""
    objective, batch, found = case.build(), case.draw(), []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(run(objective, batch, 2)[0])
    require_close(
        found[0], found[1],
        "the same batch, seed and epoch give another loss the second time, so that no run could "
        "be resumed or repeated",
        rtol=0, atol=0,
    )  # fmt: skip


def check_precision(case: Case) -> None:
    """float32 agrees with float64, in value and gradient."""
    for scale in (1.0, 30.0):
        drawn = case.draw(batch=16, classes=100, scale=scale, dtype=torch.float32)
        single, double = (drawn.to(t).with_gradients() for t in (torch.float32, torch.float64))
        totals = [run(case.build(), batch, 2)[0] for batch in (single, double)]
        require_close(
            totals[0], totals[1], "float32 and float64 give other losses", rtol=1e-5, atol=1e-5
        )
        found = [
            gradients(total, batch.students(case.method))
            for total, batch in zip(totals, (single, double), strict=True)
        ]
        for mine, exact in zip(*found, strict=True):
            if mine is not None and exact is not None:  # `check_teacher` speaks of these
                require_close(
                    mine, exact, "float32 and float64 give other gradients",
                    rtol=1e-3, atol=1e-5 * float(exact.abs().max()) + 1e-12,
                )  # fmt: skip


def check_autocast(case: Case) -> None:
    """The loss is computed in float32 inside autocast, from logits in bfloat16 too."""
    batch = case.draw(dtype=torch.bfloat16)
    expected = run(case.build(), batch.to(torch.float32), 2)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = run(case.build(), batch, 2)
    for name, value in {"total": total, **terms}.items():
        require(
            value.dtype == torch.float32,
            f"{name} must be float32 inside autocast, got {value.dtype}.",
        )
    require_close(
        total, expected,
        "from bfloat16 inside autocast the loss is another one than from the same numbers in "
        "float32 (ekd_ray.losses.at_least_float32 converts logits)",
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


def check_teacher(case: Case) -> None:
    """No gradient reaches the teacher, one reaches all that is asked of the student."""
    batch = case.draw().with_gradients()
    total, terms = run(case.build(), batch, 2)
    teachers = {"logits": batch.teacher, "strong view's logits": batch.teacher_strong}
    named = zip(case.entry.teacher_layers, batch.teacher_features, strict=True)
    teachers |= {f"layer {layer!r}": feature for layer, feature in named}
    for name, gradient in zip(teachers, gradients(total, [*teachers.values()]), strict=True):
        require(
            gradient is None,
            f"a gradient reaches the teacher's {name}: detach them.",
        )
    layers = [f"the layer {layer!r}" for layer in case.entry.student_layers]
    strong = ["the strong view's logits"] if case.entry.strong_view else []
    inputs = batch.students(case.method)
    for name, gradient in zip(
        ["the logits", *strong, *layers], gradients(total, inputs), strict=True
    ):
        require(
            gradient is not None and bool(gradient.abs().max() > 0),
            f"no gradient reaches the student by {name}, which the method asks for.",
        )
    for name, value in terms.items():
        require(value.dim() == 0, f"term {name!r} must be 0-d, got shape {tuple(value.shape)}.")


def check_divergence(case: Case) -> None:
    """Terms that say so are 0 where the student is the teacher, and nowhere less."""
    objective = case.build()
    if getattr(objective.config, "teacher_log_prior", None) is not None and case.entry.evidential:
        return  # two readings of the same logits
    names = {name for term in case.entry.terms if term.is_divergence for name in term.names}
    for seed in range(3):
        batch = case.draw(seed=seed)
        terms, equal = run(objective, batch, 2)[1], run(objective, batch.equal_sides(), 2)[1]
        for name in names & terms.keys():
            require(
                equal[name].abs() < 1e-9,
                f"term {name!r} is called a divergence, but is {float(equal[name]):g} where the "
                "student says what the teacher says.",
            )
            require(
                terms[name] > -1e-9,
                f"term {name!r} is called a divergence, but is {float(terms[name]):g}, below 0.",
            )


VARIANT_CHECKS: tuple[Check, ...] = (
    check_finite,
    check_order,
    check_mean,
    check_repeat,
    check_precision,
    check_autocast,
    check_teacher,
    check_divergence,
)


# ---------------------------------------------------------------- the method itself


def check_entry(case: Case) -> None:
    """Names, defaults and ranges are legal, and a setting is a setting like others."""
    names = case.entry.term_names
    require(len({*names}) == len(names), f"two parts of the loss have one name: {names}.")
    default = resolve_method(DistillConfig(method=case.method))
    require(
        resolve_method(default) == default,
        "a default depends on another one, because the settings that it gives have others.",
    )
    require(
        DistillConfig.from_dict(default.to_dict()) == default,
        "a run's settings do not come back from its file.",
    )
    for entry in case.entry.settings:
        require(entry.doc.strip(), f"setting {entry.name} has no doc, which is its help text.")
        for name in ("low", "high", "choices"):
            found = (entry.search or {}).get(name, ())
            for value in found if isinstance(found, list | tuple) else (found,):
                try:
                    DistillConfig(method=case.method, **{entry.name: value})
                except UserError as error:
                    raise AssertionError(f"a search would try an illegal value: {error}") from None
        for value in alternatives(entry, getattr(default, entry.name))[:1]:
            changed = default.replace(**{entry.name: value})
            require(
                changed.fingerprint() != default.fingerprint(),
                f"{entry.name}={value} leaves the fingerprint of the default's run.",
            )


def check_weights(case: Case) -> None:
    """Every weight multiplies its terms once, and alone gives exactly these."""
    batch, limits = case.draw(), {entry.name: entry.high for entry in case.entry.settings}
    off = dict.fromkeys(weights_of(case.method), 0.0)
    for weight in off:
        unit = min(1.0, (limits[weight] or 4.0) / 4)
        (one, terms), (two, same), (four, _) = (
            run(case.build(**{weight: factor * unit}), batch) for factor in (1.0, 2.0, 4.0)
        )
        own = [n for term in case.entry.terms if term.weight == weight for n in term.names]
        moved = two - one
        require(moved.abs() > 1e-9, f"{weight} does not move the loss.")
        require_close(four - two, 2 * moved, f"{weight} is no factor of the loss")
        for name in terms:
            require_close(
                terms[name], same[name],
                f"term {name!r} depends on {weight}, which multiplies it afterwards", atol=1e-12,
            )  # fmt: skip
        total = torch.stack([terms[name] for name in own]).sum() * unit
        require_close(moved, total, f"{weight} multiplies other terms than its own")
        alone = set(run(case.build(**{**off, weight: unit}), batch)[1])
        require(alone == {*own}, f"under {weight} alone the terms must be {own}, got {alone}.")


def check_parameters(case: Case) -> None:
    """Also with a term of weight 0 every learned value gets a gradient, which DDP waits for."""
    learned = {"learn_log_prior": True} if case.entry.evidential else {}
    weights = weights_of(case.method)
    for off in [None, *weights]:
        values = {**learned, **({off: 0.0} if off else {})}
        if len(weights) == 1 and off:
            continue
        objective, batch = case.build(**values), case.draw().with_gradients()
        run(objective, batch)[0].backward()
        for name, parameter in objective.named_parameters():
            require(parameter.grad is not None, f"no gradient reaches {name} with {off}=0.")
        require(batch.student.grad is not None, f"no gradient reaches the logits with {off}=0.")


def check_settings(case: Case) -> None:
    """Every setting moves the loss, or the gradient of what is learned beside the student."""
    base = dict.fromkeys(warmups_of(case.method), 10) | dict.fromkeys(decays_of(case.method), 1)
    config = case.build(**base).config

    def seen(values: Mapping[str, Any]) -> dict[str, float]:
        objective = case.build(**values)
        total = run(objective, case.draw().with_gradients(), 3)[0]
        total.backward()
        found = {
            name: float(parameter.grad)
            for name, parameter in objective.named_parameters()
            if parameter.grad is not None
        }
        return {"total": float(total.detach()), **found}

    before = seen(base)
    for entry in case.entry.settings:
        for value in alternatives(entry, getattr(config, entry.name)):
            after = seen({**base, entry.name: value})
            common = before.keys() & after.keys()
            require(
                any(abs(after[key] - before[key]) > 1e-6 for key in common),
                f"{entry.name}={value} does what {getattr(config, entry.name)} does: nothing in "
                "the training depends on it.",
            )


def check_gradient(case: Case) -> None:
    """The gradient is the derivative of the loss, by central differences.

    A learned temperature is left out: its gradient is reversed. The teacher's prior is its own:
    one that followed the student's would have no gradient.
    """
    evidential = {"learn_log_prior": True, "teacher_log_prior": 0.4}
    own = {k: v for k, v in evidential.items() if k in case.entry.setting_names}
    objective = case.build(**own).double()
    batch = case.draw(batch=3, classes=4, scale=1.5).with_gradients()
    inputs = batch.students(case.method)
    if objective.method.evidential:
        inputs.append(objective.log_prior)
    # `gradcheck` moves the inputs in place: the function reads them where they are.
    right = torch.autograd.gradcheck(
        lambda *_: run(objective, batch, 2)[0], inputs, fast_mode=True, raise_exception=False
    )
    require(right, "the gradient is not the derivative of the loss.")


def check_readback(case: Case) -> None:
    """No value is read back from the device, which would make a GPU wait in every step."""
    try:
        with fake_tensors():
            objective = case.build()
            batch = case.draw(dtype=torch.float32).with_gradients()
            total, _ = run(objective, batch)
            gradients(total, batch.students(case.method))
    except Exception as error:
        raise AssertionError(
            f"the loss reads a value back from the device (.item(), float(), if): {error}"
        ) from error


def check_program(case: Case) -> None:
    """`torch.compile` traces the same program for all values of the real settings.

    A method that reads layers is not compiled.
    """
    if case.entry.features:
        return
    programs: list[str] = []

    def keep(graph: Any, inputs: Any) -> Callable[..., Any]:
        programs.append(graph.code)
        return cast(Callable[..., Any], graph.forward)

    real = [s for s in case.entry.settings if float in (s.kind, *typing.get_args(s.kind))]
    config = case.build().config
    for factor in (1.25, 1.5):
        values = {}
        for entry in real:
            value = getattr(config, entry.name)
            wanted = factor * (1.0 if value is None else value)
            if entry.high is None or wanted <= entry.high:
                values[entry.name] = wanted
        torch.compiler.reset()
        objective = case.build(**values)
        try:
            compiled = torch.compile(objective, backend=keep, fullgraph=True)
            run(cast(Objective, compiled), case.draw(), objective.factors(1))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise AssertionError(f"the loss is not one program: {reason}") from error
    require(
        len(programs) == 2 and programs[0] == programs[1],
        "another value of a setting is another program, because the loss branches on it or turns "
        "it into a number: settings are 0-d tensors.",
    )


def check_without_teacher(case: Case) -> None:
    """A method that needs no teacher takes none."""
    if case.entry.needs_teacher:
        return
    batch, objective = case.draw(), case.build()
    without = run(objective, batch.replace(teacher=None, teacher_strong=None))[0]
    require_close(without, run(objective, batch)[0], "a teacher changes the loss", atol=0, rtol=0)


def check_state(case: Case) -> None:
    """A learned value comes back from a file: the same total and the same state."""
    learned = {"learn_log_prior": True} if case.entry.evidential else {}
    trained, fresh = case.build(**learned), case.build(**learned)
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):
            parameter.add_(0.25 + i)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    batch = case.draw()
    same = torch.equal(run(fresh, batch)[0], run(trained, batch)[0])
    require(same and fresh.state(3) == trained.state(3), "what is learned is lost in a file.")


METHOD_CHECKS: tuple[Check, ...] = (
    check_entry,
    check_weights,
    check_parameters,
    check_settings,
    check_gradient,
    check_readback,
    check_program,
    check_without_teacher,
    check_state,
)


# ---------------------------------------------------------------- all of them


def method_cases(method: str, shapes: tuple[Shapes, ...] = ()) -> Iterator[tuple[Check, Case]]:
    """Every check with every case that it is for."""
    cases = [Case(method, values, shapes) for values in variants(method)]
    yield from itertools.product(METHOD_CHECKS, cases[:1])
    yield from itertools.product(VARIANT_CHECKS, cases)
