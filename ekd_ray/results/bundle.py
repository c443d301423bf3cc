"""The exported winner: weights, configuration and evidence in one folder that checks itself.

best/  model.safetensors  distill.yaml  metrics.json  environment.json  README.md  MANIFEST
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ekd_ray import __version__
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.evaluate import evaluate_model
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file, write_json, write_text
from ekd_ray.models import build_model, load_weights, read_metadata
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.study import CONFIRMED, RESULT, Study, TrialRecord

FORMAT_VERSION = 1
MANIFEST = "MANIFEST"
FILES = (WEIGHTS, "distill.yaml", "metrics.json", "environment.json", "README.md")


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
        try:
            metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
            version = int(metrics["format_version"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path / 'metrics.json'} is damaged: export it again.") from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"bundle {path} has format version {version}, this ekd_ray reads <= "
                f"{FORMAT_VERSION}: upgrade ekd_ray."
            )
        config = DistillConfig.from_yaml(path / "distill.yaml")
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

    def evaluate(self, *, data_root: str | None = None) -> dict[str, float]:
        """Metrics of the stored weights on the test split, as `test_<name>`."""
        device = pick_device()
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        data = load_test_data(self.config, data_root=data_root, device=device)
        metrics = evaluate_model(
            self.model().to(device).to(memory_format=layout),
            data,
            data.validation_ids,
            config=self.config,
            precision=self.config.precision,
            log_prior=read_metadata(self.path / WEIGHTS).log_prior,
        )
        return {f"test_{name}": value for name, value in metrics.items()}

    def verify(self, *, evaluate: bool = False, data_root: str | None = None) -> Verification:
        """Check every file against the manifest; with `evaluate`, the test accuracy too.

        Returns:
            `.ok` and `.problems`; `.metrics` holds the test metrics where they were computed.
        """
        problems = _manifest_problems(self.path)
        if problems or not evaluate:
            return Verification(tuple(problems))
        found = self.evaluate(data_root=data_root)
        stated = self.metrics["model"]["test_top1"]
        if found["test_top1"] != stated:
            problems.append(
                f"test_top1 of the stored weights is {found['test_top1']}, "
                f"metrics.json says {stated}."
            )
        return Verification(tuple(problems), found)


def _manifest_problems(path: Path) -> list[str]:
    problems, listed = [], set()
    for line in (path / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name not in FILES:
            problems.append(f"{MANIFEST} lists {name!r}, which is no file of a bundle.")
            continue
        listed.add(name)
        if not (path / name).is_file():
            problems.append(f"{name} is missing.")
        elif sha256_file(path / name) != digest:
            problems.append(f"{name} was changed: its SHA-256 is not the one in {MANIFEST}.")
    problems += [f"{MANIFEST} does not list {name}." for name in FILES if name not in listed]
    return problems


def export_bundle(study: Study, out: Path) -> Bundle:
    """Write the confirmed winner of a study to the folder `out`, all of it or nothing.

    The weights are those of the first confirm seed: choosing the best seed would choose
    on the test split. A bundle already there is replaced; any other content is refused.

    Raises:
        UserError: the study has no confirmed winner yet, or `out` holds something else.
    """
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
    lost = [name for name in (WEIGHTS, RESULT) if not (first / name).is_file()]
    if lost:
        raise UserError(f"{first} lacks {', '.join(lost)}: run the study again with --resume.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        _fill(temporary, study, board, first, final)
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
    metrics = _metrics(study, board, result, final)
    shutil.copyfile(first / WEIGHTS, folder / WEIGHTS)
    # The teacher is named by its hash: a path of this machine says nothing on another.
    write_text(folder / "distill.yaml", config.replace(teacher_weights=None).to_yaml())
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "environment.json", result["environment"])
    write_text(folder / "README.md", _card(config, metrics, board))
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in FILES]
    write_text(folder / MANIFEST, "".join(lines))


def _metrics(
    study: Study, board: list[Row], result: dict[str, Any], final: list[dict[str, Any]]
) -> dict[str, Any]:
    config = board[0].config
    arrays = load_dataset(config.dataset, "train", data_root=study.config.data_root)
    return {
        "format_version": FORMAT_VERSION,
        "ekd_ray": __version__,
        "study": study.config.fingerprint(),
        "class_names": list(arrays.class_names),
        "seeds": [row["seed"] for row in final],
        "model": {k: v for k, v in result["metrics"].items() if k.startswith(("test_", "train_"))},
        "leaderboard": [_board_entry(row, study.config) for row in board],
        # Search scores: of one seed each, on the validation split.
        "pareto_front": [
            _front_entry(record, study.config)
            for record in (study.pareto() if study.config.objectives else ())
        ],
        # The winner's test top-1 minus each baseline's.
        "differences": {name: asdict(found) for name, found in study.differences().items()},
    }


def _front_entry(record: TrialRecord, config: StudyConfig) -> dict[str, Any]:
    figures = {name: record.last[name] for name in config.watched}
    return {"trial": record.number, **figures, "params": record.params}


def _board_entry(row: Row, config: StudyConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": row.name, "winner": row.winner}
    further = [(name, row.figures(name)) for name in config.watched if name != config.metric]
    for name, values in (("val", row.val), *further, ("test_top1", row.test)):
        if values:
            mean, deviation, count = mean_sd(values)
            entry[name] = {"mean": mean, "sd": deviation, "n": count, "values": list(values)}
    return entry


def _card(config: DistillConfig, metrics: dict[str, Any], board: list[Row]) -> str:
    info = dataset_info(config.dataset)
    mean, deviation, count = mean_sd(board[0].test)
    stated = metrics["model"]["test_top1"]
    rows = [
        f"| {row.name} | {mean:.2%} | {deviation:.2%} | {count} |"
        for row, (mean, deviation, count) in ((r, mean_sd(r.test)) for r in board if r.test)
    ]
    return "\n".join(
        [
            "---",
            "library_name: ekd_ray",
            "pipeline_tag: image-classification",
            "tags: [knowledge-distillation, evidential-deep-learning]",
            "---",
            f"# {config.student} distilled from {config.teacher or 'no teacher'}",
            "",
            f"Data set {config.dataset} ({info.num_classes} classes), method `{config.method}`. "
            f"Top-1 on the test split: **{stated:.2%}** (these weights, seed {config.seed}); "
            f"mean {mean:.2%}, standard deviation {deviation:.2%} over {count} seed(s).",
            "",
            "The configuration was chosen on a validation split; the test split was read once,",
            "after the choice. All rows have the same budget.",
            "",
            "| configuration | test top-1 | sd | n |",
            "|---|---|---|---|",
            *rows,
            "",
            "```python",
            "from ekd_ray.results import Bundle",
            'bundle = Bundle.load("best")',
            "model = bundle.model()  # normalised images [B, 3, H, W] -> logits",
            "```",
            "",
            f"Images in [0, 1] are normalised with mean {info.mean} and std {info.std}.",
            "The complete configuration is in `distill.yaml`, the evidence in `metrics.json`.",
            "",
        ]
    )
