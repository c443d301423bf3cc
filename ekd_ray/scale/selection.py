"""How many seeds each champion and finalist is given: a function of the scores so far."""

from __future__ import annotations

from collections.abc import Sequence

from ekd_ray.config import StudyConfig
from ekd_ray.config.study_config import FIRST_SEEDS
from ekd_ray.config.targets import as_loss
from ekd_ray.results.leaderboard import Row, find_lead
from ekd_ray.results.paired import clearly_worse


def wanted_seeds(rows: Sequence[Row], config: StudyConfig) -> dict[str, int]:
    """How many seeds the entries that go on are to have next, by name; empty at the end.

    All are given two. Further ones are given one by one to those that can still win, champions or
    finalists: that are not clearly worse than the best (`clearly_worse`, by the same seeds), up to
    `confirm_seeds`, or with `auto` until the two best are told apart or the cap is reached. So
    the winner has the most seeds of all. Under several objectives or constraints no single metric
    decides, and all go on.

    Args:
        rows: the entries; `val` of each has the metric under the first seeds. One that failed
            goes on no more.
    """
    standing = [row for row in rows if not row.failed]
    done = max((len(row.val) for row in standing), default=0)
    racing = [row for row in standing if len(row.val) == done]
    if done < min(FIRST_SEEDS, config.most_seeds):
        return dict.fromkeys((row.name for row in racing), min(FIRST_SEEDS, config.most_seeds))
    auto = config.confirm_seeds == "auto"
    lead = find_lead(racing, config)
    if done == config.most_seeds or (auto and (lead is None or lead.settled)):
        return {}
    if not config.confirm_elimination or config.objectives or config.constraints:
        return dict.fromkeys((row.name for row in racing), done + 1 if auto else config.most_seeds)
    scores = {row.name: [-as_loss(value, config.metric) for value in row.val] for row in racing}
    worse = clearly_worse(scores)
    return {row.name: done + 1 for row in racing if row.name not in worse}
