"""`StudyConfig`: every setting of a study.

It is frozen, keyword-only and checked when built, as `DistillConfig` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ekd_ray.config.distill_config import DistillConfig
from ekd_ray.config.settings import MOST_EPOCHS, MOST_SEED, MOST_THREADS, Settings, setting
from ekd_ray.config.targets import COSTS, DIRECTIONS, METRICS, Constraint
from ekd_ray.errors import UserError, error_context

BASELINES = ("none", "kd")  # those that a study has unless told otherwise
CHAMPIONS = ("authors", "warm-start", "defaults")
FIRST_SEEDS = 2  # of every champion and finalist: one seed shows no spread
# Which of them go together: `ekd_ray.scale.samplers`.
SAMPLERS = ("tpe", "model", "gp", "cmaes", "qmc", "random", "grid", "nsga2", "nsga3")
SCHEDULERS = ("asha", "hyperband", "median", "none")
MOST_TRIALS = 10**6
LEAST_SHARE = 0.001  # of a GPU
# In a study's file, from its extension to its next end: how many trials it had before.
EXTENDED_FROM = "extended_from"
# And for good: how many it had whenever it was extended after its test figures had been shown.
TESTED_AT = "tested_at"
# GPUs per worker of a run.
Gpus = float | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Settings):
    """One study: what every trial shares, what is searched, and how the winner is confirmed."""

    retired: ClassVar[dict[str, Any]] = {
        "batch_scaling": "fixed",
        "perturbation_epochs": None,
    }
    filled_in = ("softmax_teacher_sha256", "warm_points", "known_studies")

    distill: DistillConfig = setting(DistillConfig(), "settings that every trial shares")
    teacher_training: dict[str, Any] | None = setting(
        None,
        "settings to train the teacher with when no teacher_weights are given; of several "
        "candidates (their number, or seeds) the best is kept, by choose_by",
    )
    space: dict[str, Any] | None = setting(None, "searched settings: name -> range (see README)")
    first_points: tuple[dict[str, Any], ...] = setting((), "configurations tried first")
    warm_points: dict[str, Any] | None = setting(
        None, "first points that --warm-start brought: name -> point", neutral=None
    )
    known_studies: dict[str, Any] | None = setting(
        None, "trials of other studies that --warm-start brought: name -> points and scores",
        neutral=None,
    )  # fmt: skip
    champions: tuple[str, ...] = setting(
        CHAMPIONS, "known configurations that finalists have to beat", choices=CHAMPIONS
    )
    baselines: tuple[str, ...] = setting(
        BASELINES, "rows the winner is compared with", choices=(*BASELINES, "ekd-softmax")
    )
    softmax_teacher_weights: str | None = setting(
        None, "checkpoint of a teacher trained by plain cross-entropy, for baseline ekd-softmax",
        effect="pinned", alike=bool,
    )  # fmt: skip
    softmax_teacher_sha256: str | None = setting(
        None, "SHA-256 of softmax_teacher_weights; filled in", effect="pinned", neutral=None
    )
    authors: dict[str, Any] | None = setting(
        None, "the authors' values for this pair: first point and champion"
    )
    try_authors: bool | None = setting(
        None, "the authors' values are tried in the search too; unset: unless the studies of "
        "--warm-start expect less of them than of a random draw", neutral=None,
    )  # fmt: skip

    trials: int = setting(16, "configurations to try", low=1, high=MOST_TRIALS, effect="free")
    budget_epochs: int | None = setting(
        None, "start no trial once all together have trained so many epochs", low=1,
        high=MOST_TRIALS * MOST_EPOCHS, effect="free",
    )  # fmt: skip
    budget_hours: float | None = setting(
        None, "start no trial so many hours after the search (or its continuation) began",
        above=0, high=10**6, effect="free",
    )  # fmt: skip
    budget_gpu_hours: float | None = setting(
        None, "start no trial once all together have trained so many GPU-hours", above=0,
        high=10**9, effect="free",
    )  # fmt: skip
    stop_below: float | None = setting(
        None,
        "start no trial once the model expects a further one to improve the metric by less than "
        "this, in its unit (0.005: half a point of accuracy)",
        above=0, high=10**6, effect="free",
    )  # fmt: skip
    metric: str = setting("val_top1", "objective on the validation split", choices=METRICS)
    objectives: tuple[str, ...] = setting(
        (), "further objectives: the search looks for the Pareto front", choices=tuple(DIRECTIONS)
    )
    constraints: tuple[str, ...] = setting((), "bounds to keep, such as val_ece<=0.05")
    sampler: str = setting(
        "auto",
        "what proposes trials (auto: model, or tpe with several objectives or constraints)",
        choices=("auto", *SAMPLERS),
    )
    scheduler: str = setting(
        "auto", "early stopping of trials (auto: asha, or none with several objectives)",
        choices=("auto", *SCHEDULERS),
    )  # fmt: skip
    rung_score: str = setting(
        "mean",
        "what trials are compared by at a rung: the mean since the learning rate fell, or the last",
        choices=("mean", "last"),
    )
    grace_epochs: int | None = setting(
        None, "first rung of ASHA (epochs / 8 under a step schedule, else / 4; at least 1)", low=1,
        high=MOST_EPOCHS,
    )  # fmt: skip
    rungs: tuple[int, ...] = setting(
        (), "epochs after which ASHA compares (grace, and once the learning rate has fallen)",
        low=1, high=MOST_EPOCHS,
    )  # fmt: skip
    reduction_factor: int = setting(
        2, "ASHA keeps 1 / reduction_factor at each rung", low=2, high=1000
    )
    seed: int = setting(0, "seed of the sampler", low=0, high=MOST_SEED)

    confirm_top_k: int = setting(3, "finalists that are run over several seeds", low=1, high=1000)
    confirm_seeds: int | Literal["auto"] = setting(
        3, "seeds of the winner, champions and baselines; auto: until the two best are told apart",
        low=1, high=1000,
    )  # fmt: skip
    confirm_seeds_cap: int = setting(
        10, "most seeds under confirm_seeds: auto", low=FIRST_SEEDS, high=1000, neutral=10
    )
    confirm_elimination: bool = setting(
        True, "give no further seeds to a finalist that is clearly worse than the best"
    )

    teacher_fill: str = setting(
        "eager", "when the teacher cache is filled: before the trials (eager) or by them (lazy)",
        choices=("eager", "lazy"), effect="free",
    )  # fmt: skip

    optuna_storage: str | None = setting(
        None, "database URL of the Optuna study (a journal file in the study's folder)",
        effect="pinned",
    )  # fmt: skip
    recipe_name: str | None = setting(
        None, "the recipe that the study was begun with; filled in", effect="free"
    )
    track: str | None = setting(
        None, "also tell a tracking service of every run: mlflow[:URI] or wandb[:PROJECT]",
        effect="free",
    )  # fmt: skip
    data_root: str | None = setting(None, "folder of the data sets", effect="free")
    max_concurrent: int | None = setting(
        None, "trials at once (as many as fit)", low=1, high=MOST_TRIALS, effect="free"
    )
    workers_per_trial: int = setting(1, "data-parallel workers per trial", low=1, high=10_000)
    cpus_per_trial: int = setting(
        1, "CPU threads per worker", low=1, high=MOST_THREADS, effect="pinned"
    )
    gpus_per_trial: Gpus = setting(
        "auto", "GPUs per worker; a fraction shares one, 0: on CPUs, auto: 1 where there are GPUs",
        low=0, high=1024, effect="pinned", alike=bool,  # all shares of a GPU compute the same
    )  # fmt: skip
    limit_gpu_memory: bool = setting(
        True, "a trial on a fraction of a GPU gets no more of its memory than that", effect="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler == "auto":
            object.__setattr__(self, "scheduler", "none" if self.objectives else "asha")
        if isinstance(self.gpus_per_trial, float) and 0 < self.gpus_per_trial < LEAST_SHARE:
            raise UserError(
                f"gpus_per_trial must be 0 or >= {LEAST_SHARE}, got {self.gpus_per_trial}: nothing "
                "can be computed with less of a GPU.",
                keys=("gpus_per_trial",),
            )
        if len({*self.objectives, self.metric}) <= len(self.objectives):
            raise UserError(
                f"objectives must differ from metric ({self.metric}) and from each other, "
                f"got {list(self.objectives)}: drop what is named twice.",
                keys=("objectives",),
            )
        for index, text in enumerate(self.constraints):
            with error_context("constraints", index):
                Constraint.parse(text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "configuration") -> Self:
        """As of all settings; `authors`, a baseline before it was a champion, is read as that."""
        listed = values.get("baselines") if isinstance(values, Mapping) else None
        if isinstance(listed, list | tuple) and "authors" in listed:
            values = {**values, "baselines": [name for name in listed if name != "authors"]}
        return super().from_dict(values, where=where)

    @property
    def chosen_sampler(self) -> str:
        """`sampler`, or what `auto` stands for."""
        if self.sampler != "auto":
            return self.sampler
        plain = not (self.objectives or self.constraints)
        return "model" if plain else "tpe"

    @property
    def gpus(self) -> float:
        """`gpus_per_trial` of a study that knows its cluster, see `scale.cluster.with_gpus`."""
        assert not isinstance(self.gpus_per_trial, str), "the cluster was not asked"
        return self.gpus_per_trial

    @property
    def most_seeds(self) -> int:
        """Seeds of the confirm stage, at most."""
        return self.confirm_seeds_cap if self.confirm_seeds == "auto" else self.confirm_seeds

    @property
    def half_more(self) -> int:
        """The trials of an extension that is worth its while: half as many again."""
        return max(1, self.trials // 2)

    @property
    def mode(self) -> str:
        """`max` for accuracies, `min` for losses and calibration errors."""
        return DIRECTIONS[self.metric]

    @property
    def all_objectives(self) -> tuple[str, ...]:
        """The metric, then the further objectives."""
        return (self.metric, *self.objectives)

    @property
    def directions(self) -> tuple[str, ...]:
        """`max` or `min` for each of `all_objectives`."""
        return tuple(DIRECTIONS[name] for name in self.all_objectives)

    @property
    def watched(self) -> tuple[str, ...]:
        """The objectives, then what else is bounded."""
        return tuple(dict.fromkeys([*self.all_objectives, *(b.metric for b in self.bounds)]))

    @property
    def shown_settings(self) -> tuple[str, ...]:
        """The searched settings, then those that the authors' values and brought points fix: by
        these the rows of a study differ."""
        points = [self.authors, *(self.warm_points or {}).values()]
        fixed = (name for point in points if isinstance(point, dict) for name in point)
        known = (name for name in fixed if name in DistillConfig.names())  # a file may be edited
        return tuple(dict.fromkeys([*(self.space or {}), *known]))

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs of the student among `watched`."""
        return tuple(name for name in self.watched if name in COSTS)

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """The constraints, parsed."""
        return tuple(Constraint.parse(text) for text in self.constraints)

    @property
    def grace(self) -> int:
        """Epochs of the first rung; the default shares are measured (docs/search.md)."""
        share = 8 if self.distill.schedule == "step" else 4
        return self.grace_epochs or max(1, self.distill.epochs // share)
