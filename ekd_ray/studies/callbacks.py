"""Callbacks that follow a study or a training while it goes on, and the progress bar."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ekd_ray.config.targets import as_loss
from ekd_ray.errors import UserError, shorten, spell_controls
from ekd_ray.scale.tracking import Observer


class Callback:
    """Base of callbacks, every method of which does nothing; an object with some will do.

    They are called in the process of the study, some of them from another thread. What one raises
    ends the study, which can be resumed.
    """

    def filled(self, done: int, total: int) -> None:
        """So many parts of the teacher's logits, of all that the next stage needs, are there."""

    def stage(self, title: str, total: int, epochs: int) -> None:
        """A stage of `total` runs of at most `epochs` epochs begins; 0: it is a single step."""

    def note(self, text: str) -> None:
        """Something became known that could not be said before."""

    def started(self, name: str, number: int, settings: dict[str, Any]) -> None:
        """A run begins; `settings` is its whole configuration."""

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        """A run has finished an epoch; `row` has `epoch`, the losses and the metrics."""

    def ended(self, number: int, *, failure: str | None) -> None:
        """A run has ended: all epochs done, stopped early, or failed for the reason `failure`."""


class ProgressBar(Callback):
    """A bar for each stage, in epochs, as a notebook or a terminal shows it.

    Args:
        metric: whose best value stands beside the bar.
    """

    def __init__(self, metric: str = "val_top1") -> None:
        with warnings.catch_warnings():
            # Without ipywidgets a notebook gets the bar in letters, which needs no word.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
        self._tqdm, self._metric = tqdm, metric
        self._bar: Any = None
        self._open("", 0)

    def _open(self, title: str, total: int, unit: str = "epoch") -> None:
        self.close()
        self._title, self._epochs = title, 0
        self._done: dict[int, int] = {}
        self._best: float | None = None
        if total:
            self._bar = self._tqdm(total=total, desc=title, unit=unit)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def filled(self, done: int, total: int) -> None:
        if self._title != "teacher logits":
            self._open("teacher logits", total, "part")
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def stage(self, title: str, total: int, epochs: int) -> None:
        self._open(title, total * epochs)
        self._epochs = epochs

    def note(self, text: str) -> None:
        self._tqdm.write(spell_controls(text), file=sys.stderr)

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        self._advance(number, row["epoch"])
        value = row.get(self._metric)
        if value is not None and self._bar is not None:
            known = [self._best] if self._best is not None else []
            self._best = min([*known, value], key=lambda v: as_loss(v, self._metric))
            self._bar.set_postfix_str(f"best {self._metric} {self._best:.4f}", refresh=False)

    def ended(self, number: int, *, failure: str | None) -> None:
        self._advance(number, self._epochs)  # what an early stop spares is done too

    def _advance(self, number: int, epoch: int) -> None:
        more = epoch - self._done.get(number, 0)
        if more > 0 and self._bar is not None:  # a run that was restarted repeats some epochs
            self._done[number] = epoch
            self._bar.update(more)


class Together:
    """An `Observer` that passes all on to several callbacks, each as far as it listens."""

    def __init__(self, callbacks: Sequence[object]) -> None:
        self._callbacks = tuple(callbacks)

    def _tell(self, event: str, *values: Any, **named: Any) -> None:
        for callback in self._callbacks:
            if listen := getattr(callback, event, None):
                listen(*values, **named)

    def filled(self, done: int, total: int) -> None:
        self._tell("filled", done, total)

    def stage(self, title: str, total: int, epochs: int) -> None:
        self._tell("stage", title, total, epochs)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def started(self, name: str, number: int, settings: dict[str, Any]) -> None:
        self._tell("started", name, number, settings)

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        self._tell("epoch", number, row)

    def ended(self, number: int, *, failure: str | None) -> None:
        self._tell("ended", number, failure=failure)

    def close(self) -> None:
        """Close what shows something."""
        self._tell("close")


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise `UserError` unless each is an object with some of the methods of `Callback`."""
    events = [name for name in vars(Callback) if not name.startswith("_")]
    for callback in callbacks:
        heard = any(callable(getattr(callback, event, None)) for event in events)
        if isinstance(callback, type) or not heard:
            raise UserError(
                "a callback must be an object with at least one of the methods "
                f"{', '.join(events)}, got {shorten(callback)}."
            )


def listening(callbacks: Sequence[object], *, progress: bool, metric: str) -> Together:
    """The observer of a study: its callbacks, and a bar where one is wanted."""
    bar: list[Observer] = [ProgressBar(metric)] if progress else []
    return Together([*bar, *callbacks])
