"""Samplers by name, and which schedulers they go with.

A sampler proposes configurations, a scheduler stops trials early. They go together if the
sampler can use, or has no need of, the trials that the scheduler stops:

| sampler | Optuna's class | learns from | schedulers |
|---|---|---|---|
| `tpe` | TPESampler, each parameter by itself | ended and stopped trials | stopping ones |
| `model` | `ModelSampler`, ours | ended and stopped trials, other studies | all |
| `cmaes` | CmaEsSampler (numbers; the rest at random) | ended and stopped trials | stopping ones |
| `random` | RandomSampler | nothing | all |
| `qmc`, `grid` | QMCSampler, BruteForceSampler | nothing | stopping ones |
| `gp` | GPSampler | trials of full length | `none` |
| `nsga2`, `nsga3` | NSGAIISampler, NSGAIIISampler | trials of full length | `none` |
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
)

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError, check_installed
from ekd_ray.scale.model_sampler import ModelSampler
from ekd_ray.scale.optuna_private import BoundedGP, BoundedTPE
from ekd_ray.scale.space import Space

STARTUP_TRIALS = 8  # drawn at random before a model of the objective is asked


@dataclass(frozen=True, kw_only=True)
class SamplerKind:
    """How to make a sampler from its `seed`, and what it asks of a study.

    `full_length`: it learns only from trials that were not stopped early. `finite`: it
    enumerates, so that every parameter needs finitely many values. `sequence`: it draws a
    sequence whose position it keeps in the study, and must go on under the same seed.
    `study`: it is told what the study is. `priors`: it knows those of a space. `plain`: it knows
    one objective and no constraints. `generations`: it breeds one from the other. `package`: what
    it needs besides Optuna, which is an extra of the same name.
    """

    make: Callable[..., BaseSampler]
    full_length: bool = False
    finite: bool = False
    sequence: bool = False
    study: bool = False
    priors: bool = False
    plain: bool = False
    generations: bool = False
    package: str | None = None


class _Grid(BruteForceSampler):
    """Optuna's, but it does not stop `Study.optimize` at its end, because nothing runs that here.

    The searcher notices by itself that nothing new comes.
    """

    def after_trial(self, *args: object) -> None:
        pass


SAMPLERS: dict[str, SamplerKind] = {
    # Each parameter by itself: on recorded curves (docs/search.md) the multivariate form settled
    # on what had been lucky, and was no better than chance.
    "tpe": SamplerKind(
        make=functools.partial(BoundedTPE, n_startup_trials=STARTUP_TRIALS),
        priors=True,
    ),
    "model": SamplerKind(
        make=functools.partial(ModelSampler, n_startup_trials=STARTUP_TRIALS),
        study=True,
        priors=True,
        plain=True,
    ),
    "gp": SamplerKind(
        make=functools.partial(
            BoundedGP, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False
        ),
        full_length=True,
    ),
    "cmaes": SamplerKind(
        make=functools.partial(
            CmaEsSampler, consider_pruned_trials=True, n_startup_trials=STARTUP_TRIALS,
            warn_independent_sampling=False,
        ),
        plain=True,
        package="cmaes",
    ),
    "qmc": SamplerKind(
        make=functools.partial(
            QMCSampler, scramble=True, warn_independent_sampling=False,
            warn_asynchronous_seeding=False,
        ),
        sequence=True,
    ),
    "random": SamplerKind(make=RandomSampler),
    "grid": SamplerKind(make=_Grid, finite=True),
    "nsga2": SamplerKind(make=NSGAIISampler, full_length=True, generations=True),
    "nsga3": SamplerKind(make=NSGAIIISampler, full_length=True, generations=True),
}  # fmt: skip


def make_sampler(config: StudyConfig, *, begun: int = 0) -> BaseSampler:
    """The sampler that a study asks for, for a study with so many trials and values begun.

    Its seed advances with them: a resumed study must not draw again what it drew before.
    """
    kind = SAMPLERS[config.chosen_sampler]
    seed = config.seed + (0 if kind.sequence else begun)
    # A generation is a quarter of the study: the published 50 would never see a second one.
    options: dict[str, Any] = {}
    if kind.generations:
        options["population_size"] = max(4, config.trials // 4)
    if kind.study:
        options["config"] = config
    elif kind.priors and config.space:
        parameters = Space(config.space).parameters
        options["believed"] = {name: p for name, p in parameters.items() if p.prior}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind.make(seed=seed % 2**32, **options)  # NumPy takes 32 bits


def check_sampler(config: StudyConfig, space: Space) -> None:
    """Raise `UserError` for a sampler that does not go with the scheduler or the space, or that
    needs a package which is not installed."""
    name = config.chosen_sampler
    kind = SAMPLERS[name]
    if kind.package:
        check_installed(kind.package, needed_by=f"sampler {name}", extra=kind.package)
    if kind.full_length and config.scheduler != "none":
        raise UserError(
            f"sampler {name} learns only from trials of full length, so "
            f"scheduler {config.scheduler} would hide most of them: set scheduler=none, or "
            f"choose {', '.join(name for name in SAMPLERS if not SAMPLERS[name].full_length)}.",
            keys=("sampler",),
        )
    if config.objectives and config.scheduler != "none":
        raise UserError(
            f"scheduler {config.scheduler} would stop trials by {config.metric} alone, which may "
            f"be on the Pareto front by {', '.join(config.objectives)}: set scheduler=none.",
            keys=("scheduler",),
        )
    if kind.plain and (config.objectives or config.constraints):
        raise UserError(
            f"sampler {name} knows one objective and no constraints: choose "
            f"{', '.join(name for name in SAMPLERS if not SAMPLERS[name].plain)}.",
            keys=("sampler",),
        )
    for searched, parameter in space.parameters.items():
        if parameter.prior and not kind.priors:
            raise UserError(
                f"sampler {name} knows no priors, and {searched} has one: drop it, or choose "
                f"{', '.join(name for name in SAMPLERS if SAMPLERS[name].priors)}.",
                keys=("space", searched, "prior"),
            )
        if not kind.finite:
            continue
        if parameter.number_of_values() is None:
            raise UserError(
                f"sampler {name} tries every combination, but {searched} has endlessly "
                "many values: give it choices or a step, or choose another sampler.",
                keys=("space", searched),
            )
