"""The search space: ranges over settings of `DistillConfig`, asked of Optuna as it runs."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import optuna

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.ranges import place_in_range
from ekd_ray.config.settings import hints_of
from ekd_ray.errors import Keys, UserError, error_context, shorten, unknown_name
from ekd_ray.losses.methods import method_of, resolve_method, with_method
from ekd_ray.models import read_metadata
from ekd_ray.scale.prior import Prior, check_prior

_KEYS = ("low", "high", "log", "step", "around_prior", "choices", "when", "prior")
MOST_STEPS = 10**6  # of a range; sampler grid tries every one
_LOG_PRIORS = ("log_prior", "teacher_log_prior")


def silence_optuna() -> None:
    """Keep Optuna's own progress lines from the terminal."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched setting: a range (`low`, `high`, `log`, `step`) or `choices`.

    `around_prior` is half the width of a range whose middle is a log prior that `around_prior`
    (the function) looks up; `low` and `high` serve where none is known. `when` maps another
    parameter to the values for which this one exists. `prior` is what the user believes of it.
    """

    name: str
    integer: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    around_prior: float | None = None
    choices: tuple[Any, ...] | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prior: Prior | None = None

    def suggest(self, trial: optuna.trial.BaseTrial) -> Any:
        """Ask Optuna for a value."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, self.choices)
        if self.integer:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.name, low, high, step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def edge_values(self) -> list[tuple[Keys, Any]]:
        """Values that are legal only if all are, each with its keys in the entry."""
        if self.choices is not None:
            return [(("choices", index), value) for index, value in enumerate(self.choices)]
        return [(("low",), self.low), (("high",), self.high)]

    def contains(self, value: Any) -> bool:
        """Whether a first point may have this value."""
        if self.choices is not None:
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high

    def nearest(self, value: float) -> float:
        """The value of a range that is nearest to a number."""
        if self.step or self.integer:
            step = self.step or 1
            last = int((self.high - self.low) / step + 1e-9)  # the end may be no multiple
            value = self.low + min(round((value - self.low) / step), last) * step
        return min(max(value, self.low), self.high)

    def place(self, value: Any) -> float:
        """Where a value lies: from 0 to 1 along its (logarithmic) range, of a choice its number."""
        if self.choices is not None:
            return float(self.choices.index(value))
        return place_in_range(value, self.low, self.high, log=self.log)

    def value_at(self, place: float) -> Any:
        """The value at a place, of a range the nearest that it has."""
        if self.choices is not None:
            return self.choices[int(place)]
        low, high = float(self.low), float(self.high)
        if self.log:
            value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        else:
            value = low + place * (high - low)
        nearest = self.nearest(value)
        return int(nearest) if self.integer else nearest

    def number_of_values(self) -> int | None:
        """How many values it can take, None if endlessly many."""
        if self.choices is not None:
            return len(self.choices)
        if self.low == self.high:
            return 1
        if self.step is None and not self.integer:
            return None
        return int((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether its condition holds for the values chosen so far."""
        return all(values.get(name) in legal for name, legal in self.when.items())

    def describe(self) -> str:
        """One line for plans: `0.5 .. 20 (log)` or `{1, 2, 4}`."""
        if self.choices is not None:
            text = "{" + ", ".join(str(choice) for choice in self.choices) + "}"
        else:
            text = f"{self.low:g} .. {self.high:g}" + (" (log)" if self.log else "")
            text += f" step {self.step:g}" if self.step else ""
            if self.around_prior:
                text += f", or within {self.around_prior:g} of the teacher's or the pair's"
        if self.prior:
            text += f", {self.prior.describe()}"
        conditions = [f"{k} in {{{', '.join(map(str, v))}}}" for k, v in self.when.items()]
        return text + (f" when {' and '.join(conditions)}" if conditions else "")


class Space:
    """The searched settings in order; calling it with an Optuna trial samples a point.

    Raises:
        UserError: an empty space, an unknown name or key, low > high, bounds that the
            setting itself does not allow, or a condition on a later parameter.
    """

    def __init__(self, spec: Mapping[str, Any] | None) -> None:
        if not spec:
            raise UserError(
                "the search space is empty: give --space FILE or a space: in the recipe.",
                keys=("space",),
            )
        self.parameters: dict[str, Parameter] = {}
        for name, entry in spec.items():
            with error_context("space", name):
                self.parameters[name] = _parse(name, entry, self.parameters)

    def __call__(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.applies(values):
                values[name] = parameter.suggest(trial)
        return values

    def sample(self, count: int, *, seed: int) -> list[dict[str, Any]]:
        """Points drawn at random."""
        silence_optuna()
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed % 2**32))
        return [self(study.ask()) for _ in range(count)]

    def searched_part(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a first point that Optuna is told to try: those of searched settings.

        Raises:
            UserError: a value outside of its range.
        """
        kept: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if name not in point:
                continue
            if not parameter.contains(point[name]):
                raise UserError(
                    f"first point has {name} = {point[name]}, outside of its range "
                    f"{parameter.describe()}: widen the range or drop the point.",
                    keys=(name,),
                )
            kept[name] = point[name]
        return kept


def point_config(base: DistillConfig, point: Mapping[str, Any]) -> DistillConfig:
    """The configuration of a point: `base` with the point's values laid over it.

    Under another method than the base's, the base's method settings do not carry over.
    """
    method = point.get("method", base.method)
    if method == base.method:
        return resolve_method(DistillConfig.from_dict({**base.to_dict(), **point}))
    rest = {name: value for name, value in point.items() if name != "method"}
    return with_method(base, method, **rest)


def first_points(config: StudyConfig) -> tuple[dict[str, Any], ...]:
    """The points that a study tries first: the authors' values, the recipe's others, then those
    that a warm start brought."""
    known = known_points(config)
    return known[1:] if config.authors and config.try_authors is False else known


def known_points(config: StudyConfig) -> tuple[dict[str, Any], ...]:
    """`first_points`, and the authors' values before them if they are only confirmed."""
    authors = (config.authors,) if config.authors else ()
    return (*authors, *config.first_points, *(config.warm_points or {}).values())


class KnownPrior(NamedTuple):
    """A log prior, and whether it is the pair's and not the one that the teacher has learned."""

    value: float
    is_pairs: bool


def known_prior(config: StudyConfig, base: DistillConfig) -> KnownPrior | None:
    """The log prior that a search starts from; None where none is known.

    The one that the teacher has learned; else, of a teacher whose file has none (a softmax
    teacher, or weights of the EKD authors), the pair's: that of the authors' values.

    Args:
        base: the shared settings, with `teacher_weights` once the teacher is there.
    """
    if base.teacher_weights is None:
        return None
    path, key = base.teacher_weights, base.teacher_key
    learned = read_metadata(path, whole_classifier=False, key=key).log_prior
    if learned is not None:
        return KnownPrior(value=learned, is_pairs=False)
    pair = (config.authors or {}).get("log_prior")
    return None if pair is None else KnownPrior(value=float(pair), is_pairs=True)


def with_pairs_prior(config: StudyConfig, base: DistillConfig) -> DistillConfig:
    """The shared settings, where the teacher's file has no log prior with the pair's.

    A prior that is given stays, and so does the one that a teacher has learned. Args as
    `known_prior`.
    """
    if not method_of(base).evidential:
        return base
    settings: Any = base  # the settings of methods are found by name
    name = "teacher_log_prior" if settings.learn_log_prior else "log_prior"
    if getattr(settings, name) is not None or (known := known_prior(config, base)) is None:
        return base
    return base.replace(**{name: known.value}) if known.is_pairs else base


def around_prior(config: StudyConfig, base: DistillConfig) -> StudyConfig:
    """The study with a range for every entry of its space that is relative to a log prior.

    The range is `around_prior` to both sides of the known one, as far as the setting allows, and
    as wide as the first points ask for. Without a known one (`known_prior`) nothing changes.
    Args as `known_prior`.
    """
    space = dict(config.space or {})
    relative = {name: entry for name, entry in space.items() if entry.get("around_prior")}
    known = known_prior(config, base) if relative else None
    if known is None:
        return config
    for name, entry in relative.items():
        rest = {key: value for key, value in entry.items() if key != "around_prior"}
        least, most = REGISTRY[name].low, REGISTRY[name].high
        assert least is not None and most is not None
        ends = [
            max(least, known.value - entry["around_prior"]),
            min(most, known.value + entry["around_prior"]),
        ]
        ends += [point[name] for point in known_points(config) if name in point]
        space[name] = {**rest, "low": min(ends), "high": max(ends)}
    return config.replace(space=space)


def check_space(config: StudyConfig) -> Space:
    """The parsed space of a study, after sampling it to see that its points are legal."""
    space = Space(config.space)
    for name, parameter in space.parameters.items():
        if not parameter.when:
            for keys, value in parameter.edge_values():
                with error_context("space", name, *keys):
                    config.distill.replace(**{name: value})
    for point in space.sample(32, seed=config.seed):
        with _point_context("space", point=point):
            point_config(config.distill, point)
    point_keys: list[Keys] = [("authors",)] if config.authors else []
    point_keys += [("first_points", index) for index in range(len(config.first_points))]
    point_keys += [("warm_points", name) for name in config.warm_points or {}]
    for keys, point in zip(point_keys, known_points(config), strict=True):
        with _point_context(*keys, point=point):
            space.searched_part(point)
            point_config(config.distill, point)
    return space


@contextlib.contextmanager
def _point_context(*keys: str | int, point: Mapping[str, Any]) -> Iterator[None]:
    """An error inside is about the point if that has the setting, else about the shared ones."""
    try:
        yield
    except UserError as error:
        if error.keys:
            error.keys = (*(keys if error.keys[0] in point else ("distill",)), *error.keys)
        raise


def _parse(name: str, entry: Any, earlier: Mapping[str, Parameter]) -> Parameter:
    if name not in DistillConfig.names():
        raise unknown_name("searched setting", name, DistillConfig.given_names(), keys=())
    if not isinstance(entry, Mapping):
        raise UserError(
            f"space.{name} must be {{low:, high:}} or {{choices:}}, got {shorten(entry)}.", keys=()
        )
    for key in entry:
        if key not in _KEYS:
            raise unknown_name(f"key of space.{name}:", key, _KEYS, keys=(key,))
    parameter = _parse_values(name, entry, _parse_when(name, entry.get("when") or {}, earlier))
    return _with_prior(parameter, entry["prior"]) if entry.get("prior") is not None else parameter


def _with_prior(parameter: Parameter, entry: Any) -> Parameter:
    name = parameter.name
    entry = check_prior(name, entry)
    center = entry["center"]
    if parameter.around_prior:
        raise UserError(
            f"space.{name} has around_prior, which places its range by the teacher: drop it or "
            "prior.",
            keys=("prior",),
        )
    if not parameter.contains(center):
        raise UserError(
            f"space.{name}.prior.center must be in {parameter.describe()}, got {shorten(center)}.",
            keys=("prior", "center"),
        )
    choices = None if parameter.choices is None else len(parameter.choices)
    prior = Prior(
        center=parameter.place(center), value=center, confidence=entry["confidence"],
        choices=choices,
    )  # fmt: skip
    return replace(parameter, prior=prior)


def _parse_values(
    name: str, entry: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]
) -> Parameter:
    if "choices" in entry:
        choices = entry["choices"]
        if not isinstance(choices, list) or not choices:
            raise UserError(
                f"space.{name}.choices must be a list of values, got {shorten(choices)}.",
                keys=("choices",),
            )
        if set(entry) - {"choices", "when", "prior"}:
            raise UserError(
                f"space.{name} must have choices or low and high, not both.", keys=("choices",)
            )
        return Parameter(name=name, choices=tuple(choices), when=when)
    if "prior" in entry and "low" not in entry:
        raise UserError(
            f"space.{name} has a prior and no values: give it low and high, or choices.", keys=()
        )
    return _parse_range(name, entry, when)


def _parse_range(
    name: str, entry: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]
) -> Parameter:
    kind = hints_of(DistillConfig)[name]
    kinds = set(typing.get_args(kind)) or {kind}
    if not kinds & {int, float}:
        raise UserError(f"space.{name} is not a number: give choices: instead of a range.", keys=())
    for key in ("low", "high", "step", "around_prior"):
        value = entry.get(key)
        if key in ("step", "around_prior") and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"space.{name}.{key} must be a number, got {shorten(value)}.", keys=(key,)
            )
    low, high, log, step = entry["low"], entry["high"], entry.get("log", False), entry.get("step")
    width = entry.get("around_prior")
    integer = float not in kinds
    must_be_whole = f": low and high must be whole, got {low} and {high}"
    bad_step = step is not None and (step <= 0 or (integer and not float(step).is_integer()))
    problems = (
        (not isinstance(log, bool), "log", f".log must be true or false, got {shorten(log)}"),
        (low > high, "low", f": low must be <= high ({high}), got {low}"),
        (log and low <= 0, "low", f": low must be > 0 with log: true, got {low}"),
        (log and step is not None, "step", ": step cannot be combined with log: true; drop one"),
        (integer and not float(low).is_integer(), "low", must_be_whole),
        (integer and not float(high).is_integer(), "high", must_be_whole),
        (
            width is not None and width <= 0,
            "around_prior",
            f".around_prior must be > 0, got {width}",
        ),
        (
            width is not None and (name not in _LOG_PRIORS or log),
            "around_prior",
            f".around_prior is for {' and '.join(_LOG_PRIORS)} without log: true; drop it",
        ),
        (bad_step, "step", f".step must be {'a whole number ' * integer}> 0, got {step}"),
        (
            not bad_step and step is not None and (high - low) / step > MOST_STEPS,
            "step",
            f".step must divide the range into <= {MOST_STEPS} steps, got {step}",
        ),
    )
    for found, key, problem in problems:
        if found:
            raise UserError(f"space.{name}{problem}.", keys=(key,))
    return Parameter(
        name=name, integer=integer, low=low, high=high, log=log, step=step, around_prior=width,
        when=when,
    )  # fmt: skip


def _parse_when(
    name: str, when: Any, earlier: Mapping[str, Parameter]
) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping):
        raise UserError(
            f"space.{name}.when must map a setting to its values, got {shorten(when)}.",
            keys=("when",),
        )
    conditions = {}
    for other, values in when.items():
        if other not in earlier:
            raise UserError(
                f"space.{name}.when names {other!r}, which must be a parameter above {name!r}.",
                keys=("when", other),
            )
        conditions[other] = tuple(values) if isinstance(values, list) else (values,)
        for value in conditions[other]:
            if not earlier[other].contains(value):
                raise UserError(
                    f"space.{name}.when asks for {other} = {value}, which is never drawn from "
                    f"{earlier[other].describe()}: correct one of them.",
                    keys=("when", other),
                )
    return conditions
