"""Populations: members train side by side, and the worse go on from a better one's checkpoint.

`pbt` is population based training (Jaderberg et al. 2017): a member that takes over perturbs
the better one's values. `pb2` (Parker-Holder et al. 2020) chooses them by a Gaussian process
over what has improved members how much, and needs ranges. Both find a schedule: a member's
configuration is its whole lineage, with the settings' `changes` by epoch, and training that
from scratch gives the same weights.

The copying and the exploring are Ray's. Its two modes are not used: one compares members at
different epochs, as they happen to arrive, the other stands still for ever once a member fails
or is retried. Here members wait for each other at every comparison, so that equals are compared
and the seed decides the outcome, not the machine's load.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.distill_config import CHANGEABLE
from ekd_ray.errors import UserError
from ekd_ray.losses.objective import resolve_method
from ekd_ray.scale.space import Parameter, Space
from ekd_ray.scale.worker import Job

POPULATIONS = ("pbt", "pb2")
QUANTILE = 0.25  # of the population takes over from as many of the best
RESAMPLE = 0.25  # probability that PBT draws a value anew instead of perturbing it
DRAWS = 16  # of new values, before a member goes on with those of the better one


def check_population(config: StudyConfig, space: Space) -> None:
    """Raises `UserError` for a study whose settings or space a population cannot have."""
    name = config.scheduler
    can_change = set(CHANGEABLE) - ({"log_prior"} if config.distill.learn_log_prior else set())
    fixed = [parameter for parameter in space.parameters if parameter not in can_change]
    conditional = [key for key, parameter in space.parameters.items() if parameter.when]
    choices = [key for key, entry in space.parameters.items() if entry.choices is not None]
    last = config.distill.epochs - 1
    refusals = {
        f"draws its members at random, got sampler {config.sampler}: set sampler=random": (
            config.sampler != "random"
        ),
        f"changes what it searches while training, and {', '.join(fixed)} cannot change: fix "
        "it with --set NAME=VALUE, or choose another scheduler": bool(fixed),
        f"needs every parameter in every member, and {', '.join(conditional)} has a condition "
        "(when): drop it, or choose another scheduler": bool(conditional),
        f"needs ranges, and {', '.join(choices)} has choices: give low and high, or set "
        "scheduler=pbt": name == "pb2" and bool(choices),
        "makes the changes itself, got changes in the shared settings: remove them": (
            bool(config.distill.changes)
        ),
        f"needs trials >= 2, got {config.trials}: raise --trials, 8 or more are usual": (
            config.trials < 2
        ),
        f"compares its members while they train: perturbation_epochs must be <= {last}, got "
        f"{config.perturbation}; lower it or raise --epochs": config.perturbation > last,
        "moves checkpoints between trials of one worker, got workers_per_trial "
        f"{config.workers_per_trial}: set workers_per_trial=1": config.workers_per_trial > 1,
        "begins all members before it ends one, so that budgets and stop_below limit nothing: "
        "remove them, and lower --trials or --epochs": any(
            limit is not None
            for limit in (
                config.budget_epochs,
                config.budget_hours,
                config.budget_gpu_hours,
                config.stop_below,
            )
        ),
        "takes turns among its members on all there is, so that max_concurrent limits nothing: "
        "remove it, and raise cpus_per_trial or gpus_per_trial": config.max_concurrent is not None,
    }
    for reason, holds in refusals.items():
        if holds:
            raise UserError(f"scheduler {name} {reason}.", keys=("scheduler",))


def make_population(config: StudyConfig) -> TrialScheduler:
    """The scheduler of a population."""
    if config.scheduler == "pb2":
        # Its scikit-learn takes seconds to import, which other studies need not wait for.
        from ekd_ray.scale.pb2 import Pb2

        return Pb2(config, Space(config.space))
    return _Pbt(config, Space(config.space))


class InStep(PopulationBasedTraining):
    """What both have in common: comparisons at equal epochs, and lineages.

    A trial's config is its `job`, whose settings are its lineage, and the values that hold now,
    by name, as coordinates (`_coordinate`).
    """

    def __init__(self, config: StudyConfig, space: Space, **options: Any) -> None:
        super().__init__(
            time_attr="epoch",
            metric=config.metric,
            mode=config.mode,
            perturbation_interval=config.perturbation,
            quantile_fraction=QUANTILE,
            log_config=False,
            require_attrs=False,
            synch=True,
            **options,
        )
        self._space = space
        self._next_perturbation_sync: int = config.perturbation
        self._seed = config.seed
        self._epochs = config.distill.epochs

    def _coordinate(self, parameter: Parameter, value: Any) -> Any:
        """Where a value lies on the axis that the scheduler explores."""
        return value

    def _value(self, parameter: Parameter, coordinate: Any) -> Any:
        return coordinate

    def _coordinates(self, values: Mapping[str, Any]) -> dict[str, Any]:
        parameters = self._space.parameters.items()
        return {name: self._coordinate(entry, values[name]) for name, entry in parameters}

    def _values(self, trial: Any) -> dict[str, Any]:
        """What a member trains with at the end of its lineage."""
        lineage = DistillConfig.from_dict(Job.from_config(trial.config).settings)
        now = lineage.at_epoch(self._epochs)
        return {name: getattr(now, name) for name in self._space.parameters}

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        trial.config.update(self._coordinates(self._values(trial)))
        super().on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        epoch = result["epoch"]
        if epoch % self._perturbation_interval or epoch >= self._epochs:
            return TrialScheduler.CONTINUE
        state = self._trial_state[trial]
        state.last_train_time, state.last_result = epoch, result
        self._compare(controller)
        paused = trial.status == Trial.PAUSED  # it has taken over
        return TrialScheduler.NOOP if paused else TrialScheduler.PAUSE

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(controller, trial, result)
        self._compare(controller, ended=trial)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        super().on_trial_error(controller, trial)
        if not trial.should_recover():
            self._compare(controller, ended=trial)

    def _compare(self, controller: Any, ended: Any = None) -> None:
        """Once all that still train have come as far as the next comparison, perturb them."""
        reached = {
            trial: state.last_train_time
            for trial, state in self._trial_state.items()
            if trial is not ended and not trial.is_finished()
        }
        while reached and min(reached.values()) >= self._next_perturbation_sync:
            epoch = self._next_perturbation_sync
            # Members of a resumed study may be ahead, and are compared further on.
            self._perturb(controller, [trial for trial, at in reached.items() if at == epoch])
            self._next_perturbation_sync = epoch + self._perturbation_interval

    def _perturb(self, controller: Any, members: list[Any]) -> None:
        for trial in members:  # in their own order, not as they came: PB2's model learns from it
            state = self._trial_state[trial]
            self._save_trial_state(state, state.last_train_time, state.last_result, trial)
        ranked = sorted(members, key=lambda trial: self._trial_state[trial].last_score)
        count = min(math.ceil(len(ranked) * QUANTILE), len(ranked) // 2)
        worst, rest = ranked[:count], ranked[count:]
        best = rest[len(rest) - count :]
        with _drawn_from(self._seed, int(self._next_perturbation_sync)):
            # The best come first: their checkpoints are what the worst take over.
            for trial in (*reversed(rest), *worst):
                self._checkpoint_or_exploit(trial, controller, best, worst)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], Any]:
        """The lineage of `trial` from now on: the other's, and new values from the next epoch."""
        explored, operations = super()._get_new_config(trial, trial_to_clone)
        before, parameters = self._values(trial_to_clone), self._space.parameters
        values = {
            name: before[name]
            if explored[name] == trial_to_clone.config[name]
            else _nearest(entry, self._value(entry, explored[name]))
            for name, entry in parameters.items()
        }
        job = Job.from_config(trial.config).as_config()["job"]
        settings = Job.from_config(trial_to_clone.config).settings
        begins = self._trial_state[trial_to_clone].last_train_time + 1
        for _ in range(DRAWS):
            changed = {name: value for name, value in values.items() if value != before[name]}
            changes = [*settings["changes"], {"epoch": begins, **changed}]
            # Nothing has changed at a range's end, or while PB2 has seen too little: equal
            # weights, data and values would train the same network twice.
            if _is_legal({**settings, "changes": changes}):
                settings = {**settings, "changes": changes}
                break
            values = {name: _draw(entry) for name, entry in parameters.items()}
        else:
            values = before
        return {"job": {**job, "settings": settings}, **self._coordinates(values)}, operations


class _Pbt(InStep):
    """Jaderberg et al. 2017: values times 0.8 or 1.2, choices to a neighbour, or drawn anew."""

    def __init__(self, config: StudyConfig, space: Space) -> None:
        mutations = {
            name: functools.partial(_draw, entry) if entry.choices is None else list(entry.choices)
            for name, entry in space.parameters.items()
        }
        super().__init__(
            config, space, hyperparam_mutations=mutations, resample_probability=RESAMPLE
        )


def _is_legal(settings: dict[str, Any]) -> bool:
    try:
        resolve_method(DistillConfig.from_dict(settings))
    except UserError:
        return False
    return True


def _nearest(parameter: Parameter, value: Any) -> Any:
    """The value of a parameter that is nearest to one beyond its range or between its steps."""
    if parameter.choices is not None:
        return value
    if parameter.step:
        value = parameter.low + round((value - parameter.low) / parameter.step) * parameter.step
    return min(max(value, parameter.low), parameter.high)


def _draw(parameter: Parameter) -> Any:
    """A value drawn from Python's generator, which Ray's perturbations use as well."""
    if parameter.choices is not None:
        return random.choice(parameter.choices)
    if parameter.log:
        drawn = math.exp(random.uniform(math.log(parameter.low), math.log(parameter.high)))
    else:
        drawn = random.uniform(parameter.low, parameter.high)
    return _nearest(parameter, drawn)


@contextlib.contextmanager
def _drawn_from(seed: int, epoch: int) -> Iterator[None]:
    """Seed the global generators that Ray's schedulers draw from, and leave no trace there."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(f"{seed} {epoch}")
    np.random.seed([seed % 2**32, epoch])
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
