"""Searches played on recorded learning curves, epoch by epoch.

A landscape (`benchmarks.landscape`) stands for training. Four workers train an epoch in about the
same time; the scheduler is told of every epoch in the order of the clock, and a free worker asks
for the next configuration at once, as under Ray Tune.

`race` plays one search and says what it is worth after each epoch: by *regret*, the best value
that there is minus the value, without noise, of the configuration that the search would name; by
the *oracle's*, of the best one that it has tried, named or not; and by that of the *confirmed*
winner, where the epochs of the confirm stage count too.
"""

from __future__ import annotations

import heapq
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.curves import EPOCHS, IMAGES, VALIDATION, recorded_study
from benchmarks.landscape import METRIC, Landscape, Point, unit_coordinates
from benchmarks.reference import random_teacher
from benchmarks.tables import Source, Target, reverse_source
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.study_config import FIRST_SEEDS
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results.leaderboard import Row, rank_contenders
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study_model import rank_by_model
from ekd_ray.results.study_reader import rank_trials
from ekd_ray.scale.confirm import champions
from ekd_ray.scale.schedulers import Chance, make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.selection import wanted_seeds
from ekd_ray.scale.space import Space
from ekd_ray.scale.worker import RUN
from ekd_ray.studies.warm_start import POINTS, learn_from

WORKERS = 4
CHANCE = Chance(classes=10, images=round(IMAGES * VALIDATION))
SEEDS_OF_A_SEARCH = 100  # of noise: its trials have the first, its confirm runs the next ones


class Player(Protocol):
    """A search: proposes configurations and is told of their epochs."""

    def ask(self, trial_id: str) -> Point | int | None:
        """The next configuration, or the number of a trial that it had stopped and goes on with,
        None if there is nothing to do before it is told more."""

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> bool | None:
        """Take an epoch's row; true if the trial stops here (or waits to be gone on with)."""


class Curves(Protocol):
    """A stand-in for training: a `Landscape`, or recorded curves themselves."""

    epochs: int

    def curve(self, point: Point, seed: int = 0) -> tuple[list[float], float]: ...


@dataclass(frozen=True, kw_only=True)
class Game:
    """The makings of a player: the study, an empty folder, what other pairs have found."""

    config: StudyConfig
    folder: Path
    sources: Sequence[Source] = ()

    @property
    def space(self) -> Space:
        """The searched settings."""
        return Space(self.config.space)


class Ours:
    """The searcher that studies run, with its journal and its trial folders."""

    def __init__(self, game: Game) -> None:
        self.searcher = OptunaSearcher(game.folder, game.config, game.config.distill)
        self._folders: dict[str, Path] = {}

    def ask(self, trial_id: str) -> Point | None:
        suggested = self.searcher.suggest(trial_id)
        if not isinstance(suggested, dict):
            return None
        run = RunRecord.from_dict(suggested[RUN])
        self._folders[trial_id] = run.folder
        return run.config

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None:
        with open(self._folders[trial_id] / HISTORY, "a") as file:
            file.write(json.dumps(row) + "\n")
        if last:
            self.searcher.on_trial_complete(trial_id, row)
        else:
            self.searcher.on_trial_result(trial_id, row)


class RaysAdapter:
    """TPE through Ray's own OptunaSearch, as most people run it."""

    def __init__(self, game: Game) -> None:
        from ray.tune.search.optuna import OptunaSearch

        space = game.space

        def define(trial: Any) -> None:
            space(trial)

        points = [space.searched_part(game.config.authors or {})]
        self.searcher = OptunaSearch(
            space=define, metric=METRIC, mode="max", seed=game.config.seed,
            points_to_evaluate=points,
        )  # fmt: skip

    def ask(self, trial_id: str) -> Point | None:
        return self.searcher.suggest(trial_id)

    def tell(self, trial_id: str, row: dict[str, Any], *, last: bool) -> None:
        result = {**row, "training_iteration": row["epoch"]}
        if last:
            self.searcher.on_trial_complete(trial_id, result)
        else:
            self.searcher.on_trial_result(trial_id, result)


def bring_best_points(config: StudyConfig, sources: Sequence[Source], folder: Path) -> StudyConfig:
    """The study with the best points of each source, and nothing else of them."""
    known = [Space(config.space).searched_part(config.authors or {})]
    points: dict[str, Any] = {}
    for source in sources:
        for index, row in enumerate(source.ranked()[:POINTS], start=1):
            if row.point not in [*known, *points.values()]:
                points[f"from {source.name} ({index})"] = dict(row.point)
    return config.replace(warm_points=points or None)


def learn_from_sources(config: StudyConfig, sources: Sequence[Source], folder: Path) -> StudyConfig:
    """The study that learns from its sources, as `--warm-start` makes it."""
    return learn_from(config, {source.name: source.outcomes() for source in sources})


def rank_by_score(
    trials: Sequence[RunRecord], config: StudyConfig, sources: Sequence[Source]
) -> Sequence[RunRecord]:
    """The trials of full length, the best first, as a study ranks them."""
    return rank_trials(trials, config)


def rank_by_expectation(
    trials: Sequence[RunRecord], config: StudyConfig, sources: Sequence[Source]
) -> Sequence[RunRecord]:
    """The trials of full length by what the model of the study expects of them, as a study
    chooses its finalists."""
    return rank_by_model(rank_trials(trials, config), trials, config)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to search.

    Attributes:
        settings: of its study, such as sampler and scheduler.
        player: what proposes configurations; one that stops its trials itself has scheduler none.
        transfer: it is given the other pairs' rows, as `Game.sources`.
        reversed_prior: of these the best have the worst ones' scores.
        believes: with high confidence, of each parameter, that the best value is near that of the
            best configuration ("best"), or of the worst ("worst").
        bring: what a study with sources is made of, in its still empty folder.
        rank: its trials of full length by what it believes of them, the best first: that is what
            it would name, and the first ones are its finalists. It is asked whenever one has ended.
        rival: it is others' work, and counts as an opponent.
        slow: it races under the first few seeds only.
        package: the module that it needs.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    player: Callable[[Game], Player] = Ours
    transfer: bool = False
    reversed_prior: bool = False
    believes: str | None = None
    bring: Callable[[StudyConfig, Sequence[Source], Path], StudyConfig] = bring_best_points
    rank: Callable[[Sequence[RunRecord], StudyConfig, Sequence[Source]], Sequence[RunRecord]] = (
        rank_by_score
    )
    rival: bool = False
    slow: bool = False
    package: str | None = None


def usual_rungs(epochs: int) -> list[int]:
    """Geometric rungs below so many epochs: 1, 3, 9, ..."""
    return [3**k for k in range(9) if 3**k < epochs]


# Geometric rungs, by the last epoch's score, one in three kept.
USUAL = {
    "scheduler": "asha",
    "rungs": usual_rungs(EPOCHS),
    "reduction_factor": 3,
    "rung_score": "last",
}
NO_CHAMPIONS: dict[str, Any] = {"champions": []}  # which are this project's
CONTESTANTS = {
    "random": Contestant(settings={"sampler": "random", "scheduler": "none"}),
    "random+asha": Contestant(settings={"sampler": "random", "scheduler": "asha"}),
    "default": Contestant(rank=rank_by_expectation),
    "default+transfer": Contestant(
        transfer=True, bring=learn_from_sources, rank=rank_by_expectation
    ),
    "default+reversed": Contestant(
        transfer=True, reversed_prior=True, bring=learn_from_sources, rank=rank_by_expectation
    ),
    "tpe": Contestant(settings={"sampler": "tpe"}, rank=rank_by_expectation),
    "tpe+score": Contestant(settings={"sampler": "tpe"}),
    "tpe+points": Contestant(settings={"sampler": "tpe"}, transfer=True),
    "ray-adapter": Contestant(settings={**USUAL, **NO_CHAMPIONS}, player=RaysAdapter, rival=True),
    "optuna-gp": Contestant(
        settings={"sampler": "gp", "scheduler": "none", **NO_CHAMPIONS}, rival=True
    ),
}
# Who are told by a user; they race if they are named (--only).
TOLD = {
    "default+prior": Contestant(believes="best", rank=rank_by_expectation),
    "default+wrong-prior": Contestant(believes="worst", rank=rank_by_expectation),
    "tpe+prior": Contestant(settings={"sampler": "tpe"}, believes="best", rank=rank_by_expectation),
    "tpe+wrong-prior": Contestant(
        settings={"sampler": "tpe"}, believes="worst", rank=rank_by_expectation
    ),
}


@dataclass(frozen=True)
class _Trial:
    """All that a scheduler asks of a trial."""

    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch of a simulated trial: its score, and what the configuration is worth at its end;
    `last` if the trial stops after it."""

    trial: int
    epoch: int
    seen: float
    point: Point
    true: float
    last: bool


def play(
    landscape: Curves, player: Player, scheduler: Any, rng: np.random.Generator, *, seed: int = 0
) -> Iterator[Epoch]:
    """Epochs of a search by the clock, until its player suggests nothing more.

    Args:
        seed: of all its runs, which says what noise they have.
    """
    clock: list[tuple[float, int, int]] = []  # when, trial, epoch that it will have done
    begun: list[tuple[Point, list[float], float]] = []
    done: dict[int, int] = {}  # epochs, by trial
    idle = 0

    def begin(now: float) -> bool:
        asked = player.ask(f"t{len(begun)}")
        if asked is None:
            return False
        if isinstance(asked, int):
            number = asked
        else:
            number = len(begun)
            begun.append((asked, *landscape.curve(asked, seed)))
        heapq.heappush(clock, (now + rng.uniform(0.9, 1.1), number, done.get(number, 0) + 1))
        return True

    for _ in range(WORKERS):
        idle += not begin(0.0)
    while clock:
        now, number, epoch = heapq.heappop(clock)
        done[number] = epoch
        point, curve, true = begun[number]
        row = {"epoch": epoch, "training_iteration": epoch, METRIC: curve[epoch - 1]}
        stops = epoch == landscape.epochs
        if not stops:
            trial = _Trial({RUN: {"number": number}})
            stops = scheduler.on_trial_result(None, trial, row) == "STOP"
        told = player.tell(f"t{number}", {**row, "seconds": 1.0}, last=stops)
        stops = stops or bool(told)
        yield Epoch(
            trial=number, epoch=epoch, seen=curve[epoch - 1], point=point, true=true, last=stops
        )
        if not stops:
            heapq.heappush(clock, (now + rng.uniform(0.9, 1.1), number, epoch + 1))
            continue
        idle += 1
        # A worker that had nothing to do may have now.
        while idle and begin(now):
            idle -= 1


class Ledger:
    """A search's trials so far, and the one that it would name.

    What has trained longest is trusted most, then what has scored best; once there are trials of
    full length, the first of the contestant's `rank`.
    """

    def __init__(self, rank: Callable[[Sequence[RunRecord]], Sequence[RunRecord]]) -> None:
        self._rank = rank
        self.trials: dict[int, RunRecord] = {}
        self.true: dict[int, float] = {}
        self.named = -1
        self._held = (0, -np.inf)

    def add(self, done: Epoch, *, full: int) -> None:
        """Take an epoch into account; `full` is that of full length."""
        trial = self.trials.get(done.trial)
        if trial is None:
            trial = RunRecord(
                folder=Path(), stage=RunStage.SEARCH, name=f"trial {done.trial}",
                number=done.trial, params=dict(done.point),
            )  # fmt: skip
            self.true[done.trial] = done.true
        status = "running" if not done.last else "complete" if done.epoch == full else "pruned"
        row = {"epoch": done.epoch, METRIC: done.seen}
        self.trials[done.trial] = replace(trial, status=status, history=[*trial.history, row])
        if status == "complete":
            self.named = self.ranked()[0].number or 0
            self._held = (full, np.inf)
        elif (done.epoch, done.seen) > self._held:
            self._held, self.named = (done.epoch, done.seen), done.trial

    def ranked(self) -> Sequence[RunRecord]:
        """Its trials of full length, the best first."""
        return self._rank([*self.trials.values()])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The worth of a search.

    Attributes:
        regret, oracle: after 1, 2, ... epochs (infinite before the first).
        confirmed: regret of the confirmed winner, all epochs counted; `searched` of these were the
            search's, `confirming` the confirm stage's.
    """

    regret: list[float]
    oracle: list[float]
    confirmed: float
    searched: int
    confirming: int


def race(
    target: Target, contestant: Contestant, base: StudyConfig, *, seed: int, budget: int
) -> Outcome:
    """One search of so many epochs."""
    sources = target.sources if contestant.transfer else []
    if contestant.reversed_prior:
        sources = [reverse_source(source) for source in sources]
    config = base.replace(seed=seed, trials=budget, **contestant.settings)
    if contestant.believes:
        best, worst = target.landscape.extreme_points()
        config = with_priors(config, best if contestant.believes == "best" else worst)
    np.random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = contestant.bring(config, sources, Path(folder)) if sources else config
        player = contestant.player(Game(config=config, folder=Path(folder), sources=sources))
        scheduler = make_scheduler(config, chance=CHANCE)
        epochs = play(
            target.landscape, player, scheduler, np.random.default_rng(seed),
            seed=SEEDS_OF_A_SEARCH * seed,
        )  # fmt: skip
        ledger = Ledger(lambda trials: contestant.rank(trials, config, sources))
        return follow(itertools.islice(epochs, budget), ledger, target.landscape, config, budget)


def with_priors(config: StudyConfig, point: Point) -> StudyConfig:
    """The study whose user is confident that the best configuration is near a point."""
    space = {
        name: {**entry, "prior": {"center": point[name], "confidence": "high"}}
        for name, entry in (config.space or {}).items()
    }
    return config.replace(space=space)


def follow(
    epochs: Iterable[Epoch], ledger: Ledger, landscape: Landscape, config: StudyConfig, budget: int
) -> Outcome:
    """The worth of a search, from its epochs.

    For the confirmed figure it ends as early as the first seeds of all champions and finalists
    need, because these tell most, but has at least a third of the epochs.
    """
    known = champion_points(config)
    first = min(FIRST_SEEDS, config.most_seeds)
    searched = budget - landscape.epochs * first * (len(known) + config.confirm_top_k)
    searched = max(searched, budget // 3)
    regret: list[float] = []
    oracle: list[float] = []
    confirmed, confirming = float("inf"), 0
    for done in epochs:
        ledger.add(done, full=landscape.epochs)
        regret.append(landscape.best - ledger.true[ledger.named])
        oracle.append(landscape.best - max(ledger.true.values()))
        if len(regret) == searched:
            ranked = ledger.ranked()[: config.confirm_top_k] or [ledger.trials[ledger.named]]
            finalists = {trial.name: trial.params for trial in ranked}
            winner, confirming = confirm_points(
                landscape, config, known, finalists, budget - searched
            )
            confirmed = landscape.best - landscape.curve(winner)[1]
    missing = budget - len(regret)
    return Outcome(
        regret=[*regret, *[regret[-1]] * missing], oracle=[*oracle, *[oracle[-1]] * missing],
        confirmed=confirmed, searched=searched, confirming=confirming,
    )  # fmt: skip


def champion_points(config: StudyConfig) -> dict[str, Point]:
    """The champions of a study, as points of its space; equal ones once."""
    found: dict[str, Point] = {}
    for name, champion in champions(config, config.distill).items():
        values = champion.to_dict()
        point = {n: values[n] for n in config.space or {} if values.get(n) is not None}
        if point not in found.values():
            found[name] = point
    return found


def confirm_points(
    landscape: Landscape,
    config: StudyConfig,
    known: Mapping[str, Point],
    finalists: Mapping[str, Point],
    budget: int,
) -> tuple[Point, int]:
    """(the winner of the confirm stage, its epochs): who runs how often, and who wins, is decided
    by the functions of the product. It ends where the next seed of all would exceed the budget."""
    points: dict[str, Point] = {}
    rows: dict[tuple[float, ...], Row] = {}
    for role, given in (("champion", known), ("finalist", finalists)):
        for name, point in given.items():  # equal configurations once
            key = tuple(np.round(unit_coordinates(landscape.space, point), 9))
            rows.setdefault(key, Row(name=name, config=config.distill, entered_as=role))
            points[name] = point
    entries, spent = {row.name: row for row in rows.values()}, 0
    while wanted := wanted_seeds(list(entries.values()), config):
        done = min(len(entries[name].val) for name in wanted)
        for index in range(done, max(wanted.values())):
            due = [name for name, seeds in wanted.items() if seeds > index]
            if spent + landscape.epochs * len(due) > budget:
                wanted = {}
                break
            spent += landscape.epochs * len(due)
            for name in due:
                seed = SEEDS_OF_A_SEARCH * config.seed + 1 + index
                value = landscape.curve(points[name], seed)[0][-1]
                entries[name] = replace(entries[name], val=(*entries[name].val, value))
        if not wanted:
            break
    ranked = rank_contenders(list(entries.values()), config)
    return points[ranked[0].name if ranked else next(iter(finalists))], spent


def base_study(folder: Path) -> StudyConfig:
    """The study that is raced; what its trials share is legal anywhere, because nothing trains.

    Args:
        folder: where the weights of its teacher are written.
    """
    weights = folder / "teacher.safetensors"
    random_teacher("resnet8", "synthetic", weights)
    shared = resolve(
        DistillConfig(
            dataset="synthetic", teacher="resnet8", student="resnet8", epochs=EPOCHS,
            teacher_weights=str(weights),
        )
    )  # fmt: skip
    return recorded_study().replace(distill=shared, first_points=[])
