"""The stages that a training run may belong to, and which of them may open the test split."""

from __future__ import annotations

from enum import StrEnum


class RunStage(StrEnum):
    """The part of a study that a run belongs to; its value is what files say."""

    TEACHER = "teacher"
    SEARCH = "search"
    SELECT = "select"  # finalists over fresh seeds, judged on the validation split
    FINAL = "final"  # the winner and the baselines on all training data
    SINGLE = "single"  # a run of no study

    @property
    def exports(self) -> bool:
        """Whether the weights are for use, and not only for a comparison."""
        return self not in (RunStage.SEARCH, RunStage.SELECT)

    def check_may_test(self) -> None:
        """Raise `ValueError` unless this stage may open the test split.

        Final runs do; a single run does where its user asks for it. Nothing of a study is
        decided after either.
        """
        if self not in (RunStage.FINAL, RunStage.SINGLE):
            raise ValueError(f"a run of the {self} stage must not open the test split")
