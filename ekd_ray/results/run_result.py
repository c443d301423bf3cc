"""`RunResult`: a finished training of one network on disk, as a user holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from ekd_ray.config import DistillConfig
from ekd_ray.config.arguments import checks_arguments
from ekd_ray.config.phrases import short_name
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.errors import UserError, spell_controls
from ekd_ray.files import read_json
from ekd_ray.models import load_model, read_metadata
from ekd_ray.results.html import facts_html
from ekd_ray.results.records import CANDIDATES, RunRecord, candidate_folder, read_record
from ekd_ray.results.words import figure_text, list_figures, metric_name


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A network that has been trained: its weights, its settings and its figures.

    Attributes:
        path: its folder.
        record: of the training, with environment and fingerprints; of several candidates that of
            the one that was chosen.
        candidates: of several trainings, seed, status and figures of each.
    """

    path: Path
    record: RunRecord
    candidates: list[dict[str, Any]]

    @classmethod
    @checks_arguments
    def load(cls, path: str | Path) -> Self:
        """Open the folder of a training that has ended.

        Raises:
            UserError: there is none, or it has not ended.
        """
        folder = chosen = Path(path)
        candidates: list[dict[str, Any]] = []
        if (folder / CANDIDATES).exists():
            found = read_json(folder / CANDIDATES)
            candidates = found.get("candidates", [])
            if found.get("chosen") is not None:
                chosen = candidate_folder(folder, found["chosen"])
        record = read_record(chosen)
        if record is None or record.status != "complete" or not (folder / WEIGHTS).is_file():
            raise UserError(f"{path} holds no finished training: give the folder of one.")
        return cls(path=folder, record=record, candidates=candidates)

    @property
    def weights(self) -> Path:
        """Its checkpoint, which `teacher_weights=` takes."""
        return self.path / WEIGHTS

    @property
    def config(self) -> DistillConfig:
        """Its resolved settings."""
        return DistillConfig.from_dict(self.record.config)

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures of the last epoch (`val_top1`, ...), and `test_...` where the test split was
        read; accuracies are fractions, losses in nats."""
        return self.record.metrics

    @property
    def history(self) -> list[dict[str, Any]]:
        """A row of figures for each epoch."""
        return self.record.history

    @property
    def log_prior(self) -> float | None:
        """The prior of an evidential network: the log of its mass per class."""
        return self.record.log_prior

    def model(self) -> nn.Module:
        """The network in evaluation mode: normalised images [B, 3, H, W] -> logits [B, C]."""
        classes = read_metadata(self.weights).num_classes
        return load_model(self.config.student, classes, self.weights)

    def __repr__(self) -> str:
        run = self.config
        return spell_controls(
            f"RunResult {self.path}: {run.student} by {run.method} on {short_name(run.dataset)}"
            f"{list_figures(self.metrics, ('val_top1', 'test_top1'))}"
        )

    def _repr_html_(self) -> str:
        shown = {n: v for n, v in self.metrics.items() if n.startswith(("val_", "test_"))}
        facts = {
            "network": f"{self.config.student}, by {self.config.method}",
            "data set": short_name(self.config.dataset),
            **{metric_name(name): figure_text(name, value) for name, value in shown.items()},
            "weights": str(self.weights),
        }
        return facts_html(f"Run {self.path}", facts)
