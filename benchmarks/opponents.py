"""Other libraries' searches, called through their own ask and tell (extra `bench`).

Each has its defaults, and begins with what a study here begins with: the authors' values are its
first point or, where it takes a prior, its prior. Those that know other pairs are given their rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from benchmarks.curves import EPOCHS
from benchmarks.landscape import METRIC, Point
from benchmarks.simulate import NO_CHAMPIONS, Contestant, Game


def _first_point(game: Game) -> dict[str, Any]:
    return game.space.searched_part(game.config.authors or {})


# Optuna


class OptunasOwn:
    """Optuna with its own sampler and pruner, both as they come, through `ask` and `tell`."""

    def __init__(self, game: Game) -> None:
        import optuna

        self._space, self._optuna = game.space, optuna
        self.study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=game.config.seed),
            pruner=optuna.pruners.HyperbandPruner(max_resource=EPOCHS),
        )
        self.study.enqueue_trial(_first_point(game))
        self._trials: dict[str, Any] = {}

    def ask(self, trial_id: str) -> Point:
        self._trials[trial_id] = self.study.ask()
        return self._space(self._trials[trial_id])

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> bool:
        trial, states = self._trials[trial_id], self._optuna.trial.TrialState
        trial.report(row[METRIC], row["epoch"])
        if last:
            self.study.tell(trial, row[METRIC])
        elif trial.should_prune():
            self.study.tell(trial, state=states.PRUNED)
            return True
        return last


# Syne Tune


class SyneTune:
    """A scheduler of Syne Tune, told what its `Tuner` would tell it."""

    def __init__(self, game: Game, name: str, **options: Any) -> None:
        from syne_tune.config_space import loguniform, uniform
        from syne_tune.optimizer import legacy_baselines
        from syne_tune.optimizer.schedulers import transfer_learning

        space = {
            name: (loguniform if p.log else uniform)(p.low, p.high)
            for name, p in game.space.parameters.items()
        }
        if game.sources:
            options["transfer_learning_evaluations"] = {
                source.name: _task(transfer_learning, space, source.rows) for source in game.sources
            }
        else:
            options["points_to_evaluate"] = [_first_point(game)]
        make = getattr(legacy_baselines, name, None) or getattr(transfer_learning, name)
        self.scheduler = make(
            config_space=space, metric=METRIC, mode="max", random_seed=game.config.seed, **options
        )
        self._trials: dict[int, Any] = {}

    def ask(self, trial_id: str) -> Point | int | None:
        from syne_tune.backend.trial_status import Trial

        number = int(trial_id[1:])
        suggested = self.scheduler.suggest(number)
        if suggested is None:
            return None
        if not suggested.spawn_new_trial_id:
            resumed = suggested.checkpoint_trial_id
            if suggested.config is not None:
                self._trials[resumed] = replace(self._trials[resumed], config=suggested.config)
            return int(resumed)
        trial = Trial(trial_id=number, config=suggested.config, creation_time=datetime.now())
        self._trials[number] = trial
        self.scheduler.on_trial_add(trial)
        return trial.config

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> bool:
        trial = self._trials[int(trial_id[1:])]
        result = {METRIC: row[METRIC], "epoch": row["epoch"]}
        stops = self.scheduler.on_trial_result(trial, result) != "CONTINUE"
        if last and not stops:
            self.scheduler.on_trial_complete(trial, result)
        elif stops:
            self.scheduler.on_trial_remove(trial)
        return stops or last


def _task(transfer_learning: Any, space: Mapping[str, Any], rows: Any) -> Any:
    import pandas as pd

    return transfer_learning.LegacyTransferLearningTaskEvaluations(
        configuration_space=dict(space),
        hyperparameters=pd.DataFrame([dict(row.point) for row in rows])[[*space]],
        objectives_names=[METRIC],
        objectives_evaluations=np.array([row.scores for row in rows])[:, None, :, None],
    )


def _syne_tune(
    name: str, *, transfer: bool = False, slow: bool = False, **options: Any
) -> Contestant:
    return Contestant(
        settings=OWN_STOPS, player=lambda game: SyneTune(game, name, **options),
        transfer=transfer, rival=True, slow=slow, package="syne_tune",
    )  # fmt: skip


# Those that ask for a configuration up to an epoch


class _Milestones:
    """Tells a search of the epoch that it had asked for, after which the trial waits."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}  # of its configurations
        self._asked: dict[int, tuple[Any, int]] = {}

    def _next(self) -> tuple[Any, Any, Point, int]:
        """(what `_report` wants, a key of the configuration, its point, up to which epoch)."""
        raise NotImplementedError

    def _report(self, asked: Any, loss: float) -> None:
        raise NotImplementedError

    def ask(self, trial_id: str) -> Point | int | None:
        asked, key, point, epoch = self._next()
        known = key in self._numbers
        number = self._numbers.setdefault(key, int(trial_id[1:]))
        self._asked[number] = asked, epoch
        return number if known else point

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> bool:
        asked, epoch = self._asked[int(trial_id[1:])]
        if row["epoch"] < epoch:
            return False
        self._report(asked, -row[METRIC])
        return True


class NePS(_Milestones):
    """PriorBand of NePS; its prior is the first point, or the best one of the largest source."""

    def __init__(self, game: Game) -> None:
        import neps
        import torch

        super().__init__()
        torch.manual_seed(game.config.seed)
        random.seed(game.config.seed)
        prior = _first_point(game)
        if game.sources:
            largest = max(game.sources, key=lambda source: len(source.rows))
            prior = dict(max(largest.rows, key=lambda row: row.scores[-1]).point)
        parts: dict[str, Any] = {
            name: neps.Float(
                lower=p.low, upper=p.high, log=p.log, prior=prior[name], prior_confidence="medium"
            )
            for name, p in game.space.parameters.items()
        }
        parts["epoch"] = neps.IntegerFidelity(lower=1, upper=EPOCHS)
        space = type("Space", (neps.PipelineSpace,), parts)()
        self.search = neps.AskAndTell(neps.algorithms.priorband(space))

    def _next(self) -> tuple[Any, Any, Point, int]:
        trial = self.search.ask()
        point = dict(trial.config)
        epoch = point.pop("epoch")
        return trial, trial.metadata.id.partition("_rung_")[0], point, epoch

    def _report(self, asked: Any, loss: float) -> None:
        self.search.tell(asked, loss)


class Smac(_Milestones):
    """SMAC with budgets: Hyperband, whose configurations a random forest proposes."""

    def __init__(self, game: Game) -> None:
        from ConfigSpace import Configuration, ConfigurationSpace, Float
        from smac import MultiFidelityFacade, Scenario

        super().__init__()
        space = ConfigurationSpace(seed=game.config.seed)
        space.add(
            Float(name, (p.low, p.high), log=p.log) for name, p in game.space.parameters.items()
        )
        scenario = Scenario(
            space, output_directory=game.folder, deterministic=True, n_trials=10_000,
            min_budget=1, max_budget=EPOCHS, seed=game.config.seed,
        )  # fmt: skip
        first = Configuration(space, values=_first_point(game))
        self.search = MultiFidelityFacade(
            scenario, _never, overwrite=True, logging_level=False,
            initial_design=MultiFidelityFacade.get_initial_design(
                scenario, n_configs=8, additional_configs=[first]
            ),
        )  # fmt: skip

    def _next(self) -> tuple[Any, Any, Point, int]:
        trial = self.search.ask()
        return trial, trial.config, dict(trial.config), round(trial.budget)

    def _report(self, asked: Any, loss: float) -> None:
        from smac.runhistory import TrialValue

        self.search.tell(asked, TrialValue(cost=loss))


def _never(config: Any, seed: int = 0, budget: float = 0.0) -> float:
    raise NotImplementedError("asked and told, never called")


OWN_STOPS = {"scheduler": "none", **NO_CHAMPIONS}
OPPONENTS: dict[str, Contestant] = {
    "optuna-tpe": Contestant(settings=OWN_STOPS, player=OptunasOwn, rival=True),
    "syne-asha": _syne_tune("ASHA", resource_attr="epoch", max_t=EPOCHS),
    "syne-mobster": _syne_tune(
        "MOBSTER",
        slow=True,
        resource_attr="epoch",
        max_t=EPOCHS,
        search_options={"opt_skip_period": 3},  # of its fits, as DyHPO has by default
    ),
    "syne-dyhpo": _syne_tune("DyHPO", slow=True, resource_attr="epoch", max_t=EPOCHS),
    "syne-rush": _syne_tune("RUSHScheduler", transfer=True, resource_attr="epoch", max_t=EPOCHS),
    "syne-zeroshot": _syne_tune("ZeroShotTransfer", transfer=True, use_surrogates=True),
    "neps-priorband": Contestant(settings=OWN_STOPS, player=NePS, rival=True, package="neps"),
    "neps-priorband+transfer": Contestant(
        settings=OWN_STOPS, player=NePS, transfer=True, rival=True, package="neps"
    ),
    "smac": Contestant(settings=OWN_STOPS, player=Smac, rival=True, slow=True, package="smac"),
}
