"""The exported winner: weights, configuration and evidence in one folder that checks itself.

best/  model.safetensors  distill.yaml  metrics.json  history.jsonl  environment.json
       README.md  MANIFEST, and where asked for  model.pt2  model.onnx
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ekd_ray.config import DistillConfig
from ekd_ray.engine.evaluate import evaluate_model
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.precision import environment, pick_device
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.engine.runlog import HISTORY, read_history
from ekd_ray.errors import UserError
from ekd_ray.files import write_json, write_text
from ekd_ray.models import WeightsMetadata, build_model, load_weights, read_metadata
from ekd_ray.results.card import model_card
from ekd_ray.results.evidence import evidence, read_environment, read_evidence
from ekd_ray.results.exports import EXPORTS, check_exports, export_programs
from ekd_ray.results.inference import (
    Classifier,
    Prediction,
    Preprocessing,
    classify,
    input_size,
)
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.manifest import MANIFEST, manifest_problems, write_manifest
from ekd_ray.results.records import CONFIRMED, RESULT
from ekd_ray.results.study import Study

FILES = (WEIGHTS, "distill.yaml", "metrics.json", HISTORY, "environment.json", "README.md")
# Another processor, GPU or torch rounds otherwise: a few images may change sides.
ELSEWHERE = 0.005


@dataclass(frozen=True)
class Verification:
    """What `Bundle.verify` found: `ok`, or the `problems` in sentences."""

    problems: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing was found wrong."""
        return not self.problems


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk. `config` is the complete run, `metrics` its evidence."""

    path: Path
    config: DistillConfig
    metrics: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a bundle; raises `UserError` if it is incomplete, foreign or newer."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} holds no bundle (no {MANIFEST}): export one first.")
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise UserError(f"bundle {path} lacks {', '.join(missing)}: export it again.")
        metrics = read_evidence(path / "metrics.json")
        config = DistillConfig.from_yaml(path / "distill.yaml")
        if config.image_size is None:
            raise UserError(f"{path / 'distill.yaml'} lacks image_size: export it again.")
        return cls(path=path, config=config, metrics=metrics)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by index."""
        return tuple(self.metrics["class_names"])

    def model(self) -> nn.Module:
        """The student in evaluation mode: normalised images [B, 3, H, W] -> logits [B, C]."""
        model = build_model(self.config.student, len(self.class_names))
        load_weights(model, self.path / WEIGHTS)
        return model.eval()

    @cached_property
    def weights(self) -> WeightsMetadata:
        """What the header of the weights says: normalisation and prior among it."""
        return read_metadata(self.path / WEIGHTS)

    def preprocessing(self) -> Preprocessing:
        """Images `[B, 3, H, W]` in [0, 1] -> what `model` takes."""
        if self.weights.mean is None or self.weights.std is None:
            raise UserError(f"{self.path / WEIGHTS} says no normalisation: export it again.")
        size = input_size(self.config)
        return Preprocessing(self.weights.mean, self.weights.std, size=size)

    def classifier(self) -> Classifier:
        """Images `[B, 3, H, W]` in [0, 1] -> (logits, probabilities, uncertainty)."""
        prior = self.weights.log_prior
        return Classifier(self.model(), self.preprocessing(), log_prior=prior).eval()

    @cached_property
    def _classifier(self) -> Classifier:
        return self.classifier()

    def predict(self, images: Any) -> Prediction:
        """Class probabilities and uncertainty of pictures, on the CPU in float32.

        Args:
            images: uint8 [B, H, W, 3] (array or tensor), a PIL image, a path, or a sequence of
                the latter two; any size, cut and resized as for the test split.

        Raises:
            UserError: something else, or a file that is no picture.
        """
        return classify(self._classifier, images, self.config, self.class_names)

    def history(self) -> list[dict[str, Any]]:
        """The rows of every epoch of the run that made the weights."""
        return read_history(self.path)

    def environment(self) -> dict[str, Any]:
        """What the weights were trained on; raises `UserError` if the file is damaged."""
        return read_environment(self.path / "environment.json")

    def evaluate(self, *, data_root: str | None = None) -> dict[str, float]:
        """Metrics of the stored weights on the test split, as `test_<name>`."""
        device = pick_device()
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        data = load_test_data(self.config, data_root=data_root, device=device)
        found = evaluate_model(
            self.model().to(device).to(memory_format=layout),
            data,
            data.validation_ids,
            config=self.config,
            precision=self.config.precision,
            log_prior=self.weights.log_prior,
        )
        return {f"test_{name}": value for name, value in found.metrics.items()}

    def verify(self, *, evaluate: bool = False, data_root: str | None = None) -> Verification:
        """Check every file against the manifest; with `evaluate`, the test accuracy too.

        On the kind of machine that made the bundle the accuracy must be the stated one to the
        last digit, elsewhere within half a point.

        Returns:
            `.ok` and `.problems`; `.metrics` holds the test metrics where they were computed.
        """
        problems = manifest_problems(self.path, FILES, EXPORTS.values())
        if problems or not evaluate:
            return Verification(tuple(problems))
        found = self.evaluate(data_root=data_root)
        stated = self.metrics["model"]["test_top1"]
        allowed = 0.0 if same_arithmetic(self.environment(), environment()) else ELSEWHERE
        if abs(found["test_top1"] - stated) > allowed:
            problems.append(
                f"test_top1 of the stored weights is {found['test_top1']}, "
                f"metrics.json says {stated}."
            )
        return Verification(tuple(problems), found)


def same_arithmetic(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two environments round alike: processor, GPUs and torch are the same."""
    names = ("processor", "gpus", "cuda", "cudnn")
    torches = [place.get("packages", {}).get("torch") for place in (there, here)]
    return torches[0] == torches[1] and all(there.get(n) == here.get(n) for n in names)


def export_bundle(
    study: Study, out: Path, *, formats: Sequence[str] = (), normalized_input: bool = False
) -> Bundle:
    """Write the confirmed winner of a study to the folder `out`, all of it or nothing.

    The weights are those of the first confirm seed: choosing the best seed would choose
    on the test split. A bundle already there is replaced; any other content is refused.

    Args:
        formats: further forms of the model, of `EXPORTS`; normalized_input: they take
            normalised images instead of images in [0, 1].

    Raises:
        UserError: the study has no confirmed winner yet, `out` holds something else, or a
            format is unknown, lacks its packages or fails.
    """
    check_exports(formats)
    board = study.leaderboard()
    if not board or not board[0].test:
        raise UserError(
            f"{study.path} has no confirmed winner yet: finish it with --resume, then export."
        )
    winner = board[0]
    if winner.failed:
        raise UserError(f"the winner of {study.path}, {winner.name}, failed: {winner.failed}")
    if out.exists() and not (out / MANIFEST).exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no bundle: choose another --out.")
    table = study.confirmed()
    assert table is not None
    final = [r for r in table.to_pylist() if r["stage"] == "final" and r["name"] == winner.name]
    first = study.path / final[0]["folder"]
    if not first.resolve().is_relative_to(study.path.resolve()):
        raise UserError(
            f"{study.path / CONFIRMED} is damaged: it names {final[0]['folder']!r}, which lies "
            "outside of the study: run the study again with --resume."
        )
    lost = [name for name in (WEIGHTS, HISTORY, RESULT) if not (first / name).is_file()]
    if lost:
        raise UserError(f"{first} lacks {', '.join(lost)}: run the study again with --resume.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        _fill(temporary, study, board, first, final)
        if formats:
            _add_programs(temporary, formats, board, normalized_input)
        write_manifest(
            temporary, [n for n in (*FILES, *EXPORTS.values()) if (temporary / n).exists()]
        )
        temporary.chmod(0o755)
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.load(out)


def _swap(new: Path, out: Path) -> None:
    """Put `new` in the place of `out`; a rename cannot replace a folder that is not empty."""
    old = new.with_suffix(".old.tmp")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(
    folder: Path, study: Study, board: list[Row], first: Path, final: list[dict[str, Any]]
) -> None:
    result = json.loads((first / RESULT).read_text(encoding="utf-8"))
    config = DistillConfig.from_dict(json.loads(final[0]["config"])).replace(
        seed=final[0]["seed"],
        precision=result["precision"],
        data_fingerprint=result["data_fingerprint"],
    )
    metrics = evidence(study, board, result, final, read_metadata(first / WEIGHTS))
    for name in (WEIGHTS, HISTORY):
        shutil.copyfile(first / name, folder / name)
    # The teacher is named by its hash: a path of this machine says nothing on another.
    write_text(folder / "distill.yaml", config.replace(teacher_weights=None).to_yaml())
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "environment.json", result["environment"])
    card = model_card(config, read_metadata(folder / WEIGHTS), metrics, board)
    write_text(folder / "README.md", card)


def _add_programs(
    folder: Path, formats: Sequence[str], board: list[Row], normalized_input: bool
) -> None:
    """Export what was just written, and say so in the metrics and on the card."""
    config = DistillConfig.from_yaml(folder / "distill.yaml")
    bundle = Bundle(path=folder, config=config, metrics=read_evidence(folder / "metrics.json"))
    exported = export_programs(
        folder, formats, bundle.classifier(), config, normalized_input=normalized_input
    )
    metrics = {**bundle.metrics, "exports": exported}
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "README.md", model_card(config, bundle.weights, metrics, board))
