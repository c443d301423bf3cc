"""Full runs: a study ends with at least `confirm_top_k` trials of full length.

Where early stops left fewer, the most promising trials that were stopped run again in full, as
trials of their own. They are no repetitions and count against no number of trials, but against
the study's budget; in Optuna they end as COMPLETE.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import as_loss, total_violation
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.scale.budget import Budget
from ekd_ray.scale.optuna_private import reopen_trial
from ekd_ray.scale.schedulers import ACCURACY, Chance, rung_score
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.storage import FULL_RUN, REPEATED


class FullRuns(OptunaSearcher):
    """Suggests stopped trials that are to run in full, once the search itself is over.

    A full run that fails is followed by that of the next trial.

    Args:
        run, config, base, budget: as the search had them.
        chance: the accuracy of guessing, see `promise`.
    """

    def __init__(
        self, run: Path, config: StudyConfig, base: DistillConfig, *, budget: Budget, chance: Chance
    ) -> None:
        super().__init__(run, config, base, budget)
        trials = self.study.get_trials(deepcopy=False)
        begun = {trial.user_attrs.get(FULL_RUN) for trial in trials}
        stopped = [
            record
            for trial in trials
            if trial.state == TrialState.PRUNED
            and trial.number not in begun
            and not {FULL_RUN, REPEATED} & trial.user_attrs.keys()
            and (record := self._found.get(trial.number))
        ]
        self._stopped = deque(sorted(stopped, key=lambda trial: promise(trial, config, chance)))

    def _is_own(self, trial: FrozenTrial) -> bool:
        return FULL_RUN in trial.user_attrs

    @property
    def remaining(self) -> int:
        """Full runs that are still to start: interrupted ones and new ones."""
        interrupted = len(self._interrupted)
        if self.budget.is_spent():
            return interrupted
        complete = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if REPEATED not in trial.user_attrs
        ]
        kept = sum(all(v <= 0 for v in trial.constraints.values()) for trial in complete)
        bounds = self.config.bounds
        keeping = sum(not total_violation(bounds, trial.last) for trial in self._stopped)
        wanted = self.config.confirm_top_k - len(self._running) - interrupted
        # Those that break a constraint make up for no trial that may yet keep them all.
        new = max(min(wanted - len(complete), len(self._stopped)), min(wanted - kept, keeping))
        return interrupted + max(0, new)

    def _draw_point(self) -> tuple[Trial, dict[str, Any]] | None:
        if not self.remaining:
            return None
        number = self._interrupted.popleft() if self._interrupted else self._begin_next()
        trial = reopen_trial(self.study, number)
        return trial, self.space(trial)

    def _begin_next(self) -> int:
        """Begin the full run of the most promising trial in Optuna; its own number."""
        stopped = self._stopped.popleft().number
        trials = self.study.get_trials(deepcopy=False)
        first = next(trial for trial in trials if trial.number == stopped)
        # At once: one that a kill left without its mark would be ended as a repetition.
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING, params=first.params, distributions=first.distributions,
                user_attrs={FULL_RUN: stopped},
            )
        )  # fmt: skip
        return self.study.get_trials(deepcopy=False)[-1].number


def promise(
    trial: RunRecord, config: StudyConfig, chance: Chance
) -> tuple[float, bool, int, float, int]:
    """How promising a stopped trial is, the smaller the more.

    First those that break the constraints least; of these, those that do not guess (which pass
    rungs uncompared); then those that came to the highest rung, by their score there.
    """
    rows = {row["epoch"]: row for row in trial.history}
    rungs = [epoch for epoch in milestone_epochs(config) if epoch in rows]
    epoch, mean = max(rungs or rows), config.rung_score == "mean"
    score = rung_score(rows, config.metric, epoch, config.distill, mean=mean)
    guesses = chance.explains(rung_score(rows, ACCURACY, epoch, config.distill, mean=mean))
    return (
        total_violation(config.bounds, trial.last),
        guesses,
        -epoch,
        as_loss(score, config.metric),
        trial.number or 0,
    )
