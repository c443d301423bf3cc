"""The exported winner: weights, configuration and evidence in one folder that checks itself.

best/  model.safetensors  distill.yaml  metrics.json  history.jsonl  environment.json
       README.md  MANIFEST, where asked for  model.pt2  model.onnx, and of plugins  plugins/*.py
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ekd_ray import __version__
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.arguments import checks_arguments, made_by_load
from ekd_ray.config.phrases import joined, short_name
from ekd_ray.config.plugins import SOURCES, files_trusted, write_sources
from ekd_ray.config.study_config import TESTED_AT
from ekd_ray.data import check_class_names, dataset_info, load_dataset
from ekd_ray.engine.data_pin import check_pinned
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.final import WEIGHTS, assess_model, own_outside
from ekd_ray.engine.history import HISTORY, read_history
from ekd_ray.engine.measure.assessment import COVERAGES as SHARES
from ekd_ray.engine.measure.calibration import Calibration, measure_sets
from ekd_ray.engine.measure.metrics import (
    class_recalls,
    classification_metrics,
    log_probabilities,
)
from ekd_ray.engine.measure.predictions import FILE as PREDICTIONS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.precision import environment, pick_device
from ekd_ray.engine.resolve import check_model, describe_images, student_size
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.errors import UserError, spell_controls, unknown_name
from ekd_ray.files import (
    MOST_TEXT,
    check_format,
    check_name,
    expand_home,
    read_bytes,
    read_json,
    sha256_file,
    temporary_folder,
    write_json,
    write_text,
)
from ekd_ray.models import WeightsMetadata, load_model, read_metadata
from ekd_ray.remote.hub import PREFIX, fetch_folder, parse_hub_name, push_folder
from ekd_ray.results.card import UNKNOWN_LICENSE, check_license, model_card
from ekd_ray.results.evaluation import check_options, find_outside
from ekd_ray.results.exports import EXPORTS, check_exports, export_programs
from ekd_ray.results.html import facts_html
from ekd_ray.results.inference import Classifier, Prediction, Preprocessing, classify
from ekd_ray.results.leaderboard import (
    TESTED,
    Leaderboard,
    Row,
    gain_values,
    mean_sd,
    select_metrics,
)
from ekd_ray.results.prediction_table import (
    COVERAGES,
    PredictedFiles,
    coverage_thresholds,
    list_pictures,
    write_predictions,
)
from ekd_ray.results.records import (
    CONFIRMED,
    DATA,
    FORMAT_VERSION,
    RESULT,
    RunRecord,
    read_record,
)
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import figure_text, list_figures, metric_name, resume_command

MANIFEST = "MANIFEST"  # the files of a bundle, and the SHA-256 of each
CARD = "README.md"
FILES = (WEIGHTS, "distill.yaml", "metrics.json", HISTORY, "environment.json", CARD)
_SOURCE = re.compile(rf"{SOURCES}/(\w+/)*\w+\.py")  # a plugin's
# The files of a bundle on the hub; whatever else is there is somebody's own.
_PATTERNS = (MANIFEST, *FILES, *EXPORTS.values(), f"{SOURCES}/*.py")
# Another processor, GPU or torch rounds otherwise: a few images may change sides.
ELSEWHERE = 0.005
MOST_THREADS = 4096
STATED_COVERAGES = (0.9, 0.95)  # of sets of classes, which the card has


@dataclass(frozen=True)
class Verification:
    """The findings of `Bundle.verify`: `ok`, or the `problems` in sentences."""

    problems: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing was found wrong."""
        return not self.problems


@made_by_load
@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk. `config` is the complete run, `metrics` its evidence."""

    path: Path
    config: DistillConfig
    metrics: dict[str, Any]

    @classmethod
    @checks_arguments
    def load(cls, path: str | Path, *, trust_plugins: bool = False) -> Self:
        """Open a bundle: a folder, or `hf:owner/name[@revision]` of the Hugging Face hub.

        The latter is fetched into the hub's cache and compared with its manifest; a card that was
        edited there is no fault.

        Args:
            trust_plugins: run the plugins in it, where they were not loaded before.

        Raises:
            UserError: it is incomplete, foreign, newer, (from the hub) damaged or not there, or has
                plugins that are not trusted.
        """
        path = _fetch(str(path)) if str(path).startswith(PREFIX) else check_name(path)
        if not path.exists():
            raise UserError(
                f"there is no folder {path}: give the bundle that ekd-ray export wrote."
            )
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} holds no bundle (no {MANIFEST}): export one first.")
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise UserError(f"bundle {path} lacks {', '.join(missing)}: export it again.")
        metrics = read_metrics(path / "metrics.json")
        with files_trusted(trust_plugins):
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
        classes, stated = len(self.class_names), self.weights.num_classes
        if classes != stated:
            raise UserError(
                f"{self.path} names {classes} classes, and its weights have {stated}: export it "
                "again."
            )
        student = self.config.student
        model = load_model(student, classes, self.path / WEIGHTS)
        check_model(student, classes, student_size(self.config), "image_size")
        return model

    @cached_property
    def weights(self) -> WeightsMetadata:
        """The header of the weights: normalisation and prior among it."""
        return read_metadata(self.path / WEIGHTS)

    def preprocessing(self) -> Preprocessing:
        """Images `[B, 3, H, W]` in [0, 1] -> what `model` takes."""
        if self.weights.mean is None or self.weights.std is None:
            raise UserError(f"{self.path / WEIGHTS} says no normalisation: export it again.")
        size = student_size(self.config)
        return Preprocessing(self.weights.mean, self.weights.std, size=size)

    def classifier(self) -> Classifier:
        """Images `[B, 3, H, W]` in [0, 1] -> (logits, probabilities, uncertainty)."""
        prior = self.weights.log_prior
        return Classifier(self.model(), self.preprocessing(), log_prior=prior).eval()

    @cached_property
    def _classifier(self) -> Classifier:
        return self.classifier()

    @cached_property
    def calibration(self) -> Calibration:
        """Temperature and thresholds of sets, fitted on validation images.

        By a run of the same configuration and seed that was not trained on these, because the
        bundle's weights were.

        Raises:
            UserError: the bundle has none, as those of an older ekd_ray.
        """
        values = self.metrics.get("calibration")
        if values is None:
            raise UserError(
                f"{self.path} has no calibration, because its study was confirmed by an older "
                "ekd_ray: confirm it anew, or predict without calibration and sets."
            )
        return Calibration.from_dict(values)

    @checks_arguments
    def predict(
        self, images: Any, *, calibrated: bool = False, coverage: float | None = None
    ) -> Prediction:
        """Class probabilities and uncertainty of pictures, on the CPU in float32.

        Args:
            images: a PIL image, a path, an array or tensor, or a sequence of them; any size, cut
                and resized as for the test split. The path of a folder stands for its pictures,
                those of folders in it included, by path. Arrays and tensors are one image
                ([H, W, 3] or [3, H, W]; grey [H, W] or with one channel) or a batch of them,
                uint8, or floating in [0, 1].
            calibrated: probabilities by the temperature that was fitted on validation images; the
                classes predicted and the uncertainty stay as they are.
            coverage: also give each picture a set of classes, which holds the true one for this
                share of pictures like those of the data set, 0.5 to 0.995. No picture abstains:
                that is `predict_files(coverage=...)`.

        Raises:
            UserError: something else, a file that is not a picture, or a bundle without a
                calibration.
        """
        return classify(
            self._classifier, images, self.config, self.class_names,
            **self._calibrate(calibrated, coverage),
        )  # fmt: skip

    def _calibrate(self, calibrated: bool, set_coverage: float | None) -> dict[str, Any]:
        """What `classify` and `write_predictions` take of the calibration."""
        return {
            "temperature": self.calibration.temperature if calibrated else 1.0,
            "set_threshold": (
                None if set_coverage is None else self.calibration.threshold(set_coverage)
            ),
        }

    @checks_arguments
    def predict_files(
        self,
        pictures: Sequence[str | Path],
        out: str | Path,
        *,
        coverage: float | None = None,
        calibrated: bool = False,
        set_coverage: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PredictedFiles:
        """Write the predictions of picture files to a table; see `write_predictions`.

        Args:
            pictures: files, or folders of them. out: ends with `.parquet` or `.csv`.
            coverage: the share of pictures like the test split's that is kept; others abstain.
            calibrated: probabilities by the fitted temperature, see `predict`.
            set_coverage: the share of pictures whose class is in the set of classes that each then
                has; `coverage` of `predict`.
            progress: called with the pictures done and in all.
        """
        return write_predictions(
            self.classifier, self.config, self.class_names, list_pictures(pictures), out,
            coverage=coverage, thresholds=self.metrics.get("coverage_thresholds"),
            about={"study": self.metrics.get("study"), "set_coverage": set_coverage},
            progress=progress, **self._calibrate(calibrated, set_coverage),
        )  # fmt: skip

    @checks_arguments
    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = True,
        revision: str | None = None,
        message: str | None = None,
    ) -> str:
        """Upload the bundle as it is to the Hugging Face hub, as a model in one commit.

        Args:
            name: `owner/name`; private: who may see a repository that is made here (one that is
                there stays as it is); revision: the branch, made if it is not there (main);
                message: of the commit.

        Returns:
            The address of the commit. `Bundle.load("hf:owner/name")` opens what was pushed.

        Raises:
            UserError: the bundle is damaged, or the hub cannot be reached or refuses.
        """
        target = parse_hub_name(f"{name}@{revision}" if revision else name)
        if problems := manifest_problems(self.path, edited=(CARD,)):
            raise UserError(f"{self.path} is not pushed: {' '.join(problems)}")
        return push_folder(
            self.path,
            target,
            [MANIFEST, *_listed(self.path)],
            owned=_PATTERNS,
            private=private,
            message=message or f"{self.config.student}, distilled by ekd_ray {__version__}",
        )

    def __repr__(self) -> str:
        run = self.config
        return spell_controls(
            f"Bundle {self.path}: {run.student} by {run.method} on {short_name(run.dataset)}"
            f"{list_figures(self.metrics['model'], TESTED)}"
        )

    def _repr_html_(self) -> str:
        teacher = self.config.teacher or "no teacher"
        facts = {
            "student": f"{self.config.student}, by {self.config.method} from {teacher}",
            "data set": f"{short_name(self.config.dataset)}, {len(self.class_names)} classes",
            **{metric_name(name): figure_text(name, value)
               for name, value in self.metrics["model"].items() if name in TESTED},
        }  # fmt: skip
        return facts_html(f"Bundle {self.path}", facts)

    def history(self) -> list[dict[str, Any]]:
        """The rows of every epoch of the run that made the weights."""
        rows = read_history(self.path)
        if not all(isinstance(row, dict) for row in rows):
            raise _damaged(self.path / HISTORY)
        return rows

    def environment(self) -> dict[str, Any]:
        """The machine and packages of the training; raises `UserError` if the file is damaged."""
        return read_environment(self.path / "environment.json")

    @checks_arguments
    def evaluate(
        self,
        *,
        dataset: str | None = None,
        data_root: str | None = None,
        ood_datasets: Sequence[str] | None = None,
        scores: Sequence[str] = (),
        coverages: Sequence[float] = SHARES,
        resamples: int = 0,
        calibrated: bool = False,
        set_coverages: Sequence[float] = (),
    ) -> dict[str, float]:
        """Metrics of the stored weights on a test split, as `test_<name>`, see `assess`.

        Args:
            dataset: where the bundle's own is, or another one, whose classes are among the bundle's
                by name; images of another size are resized as the student needs them.
            ood_datasets: out-of-distribution sets: data sets by name (their test split),
                `folder:PATH` also of pictures without classes, `noise` and `constant`, which are
                generated; by default those and the one of the study.
            scores: further ones that rank the images, such as `entropy`, or `all`.
            coverages: shares of the images, the most certain, on which accuracy is given.
            resamples: of the images, for the 95 % intervals; 0 gives none.
            calibrated: probabilities by the fitted temperature, see `predict`.
            set_coverages: of sets of classes (`coverage` of `predict`): what they hold here.

        Raises:
            UserError: there are no such data, one of its classes is none of the bundle's, a set
                is none from outside, or the bundle has no calibration.
        """
        device = pick_device()
        precision, log_prior = self.config.precision, self.weights.log_prior
        scores = check_options(scores, coverages, resamples, log_prior)
        temperature = self.calibration.temperature if calibrated else 1.0
        thresholds = {share: self.calibration.threshold(share) for share in set_coverages}
        own = dataset is None or self._is_own(dataset, data_root)
        config = self.locate_data(dataset) if own else self._config_on(str(dataset))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        data = load_test_data(config, stage=RunStage.FINAL, data_root=data_root, device=device)
        classes = None
        if not own:
            classes = self._classes_of(data.class_names, str(dataset))
            mean, std = (
                tuple(values.flatten().tolist())
                for values in (self.preprocessing().mean, self.preprocessing().std)
            )
            data = replace(data, num_classes=len(self.class_names), mean=mean, std=std)
        if ood_datasets is None:
            outside = own_outside(config, data)
        else:
            prints = (data.fingerprint, self.config.data_fingerprint)
            outside = find_outside(
                ood_datasets, self.config, self.class_names, prints, size=data.images.image_size,
                data_root=data_root, device=device,
            )  # fmt: skip
        model = self.model().to(device).to(memory_format=layout)
        with arithmetic(deterministic=self.environment().get("deterministic", False)):
            metrics = assess_model(
                model, data, outside, config=config, precision=precision, log_prior=log_prior,
                classes=classes, scores=scores, coverages=coverages, resamples=resamples,
                temperature=temperature, set_thresholds=thresholds,
            ).metrics  # fmt: skip
        return {f"test_{name}": value for name, value in metrics.items()}

    def locate_data(self, dataset: str | None = None) -> DistillConfig:
        """The run with its data where they are here: a bundle has of a folder the name alone.

        Args:
            dataset: their name here; None for where the study around the bundle has them.

        Raises:
            UserError: they are a folder that nothing leads to.
        """
        config = self.config if dataset is None else self.config.replace(dataset=dataset)
        folders = [name for name in ("dataset", "ood_dataset") if ":" in str(getattr(config, name))]
        if folders:
            with contextlib.suppress(UserError):
                study = StudyReader.load(self.path.absolute().parent).config.distill
                names = study.without_places()
                here = [n for n in folders if getattr(names, n) == getattr(config, n)]
                config = config.replace(**{name: getattr(study, name) for name in here})
        kind, colon, path = config.dataset.partition(":")
        if colon and not expand_home(path).exists():
            raise UserError(
                f"{self.path} says of its data only that they are {config.dataset}, which is not "
                f"here: give --dataset {kind}:PATH."
            )
        return config

    def _is_own(self, dataset: str, data_root: str | None) -> bool:
        """Whether a data set is the bundle's, perhaps in another place."""
        if dataset == self.config.dataset:
            return True
        name = self.config.replace(dataset=dataset).without_places().dataset
        if name != self.config.dataset:
            return False
        there = load_dataset(dataset, "train", data_root=data_root).fingerprint
        return there == self.config.data_fingerprint

    def _config_on(self, dataset: str) -> DistillConfig:
        """The settings by which this student looks at the images of another data set."""
        info = dataset_info(dataset)
        return self.config.replace(
            dataset=dataset, data_fingerprint=None, augment=None, ood_dataset=None,
            image_size=self.config.image_size if info.encoded else None,
            student_image_size=student_size(self.config),
        )  # fmt: skip

    def _classes_of(self, names: Sequence[str], dataset: str) -> torch.Tensor:
        """The index here, int64, of each class of another data set."""
        known = {name: index for index, name in enumerate(self.class_names)}
        strange = [name for name in names if name not in known]
        if strange:
            raise unknown_name(f"class of {dataset} for {self.path}:", strange[0], known)
        return torch.tensor([known[name] for name in names])

    @checks_arguments
    def verify(
        self,
        *,
        evaluate: bool = False,
        data_root: str | None = None,
        dataset: str | None = None,
    ) -> Verification:
        """Check every file against the manifest; with `evaluate`, the test accuracy too.

        On the kind of machine that made the bundle the accuracy must be the stated one to the
        last digit, elsewhere within half a point. `dataset` says where a folder of images is.

        Returns:
            `.ok` and `.problems`; `.metrics` holds the test metrics where they were computed.
        """
        problems = manifest_problems(self.path)
        if problems or not evaluate:
            return Verification(tuple(problems))
        found = self.evaluate(dataset=dataset, data_root=data_root)
        stated = self.metrics["model"]["test_top1"]
        allowed = 0.0 if same_arithmetic(self.environment(), environment()) else ELSEWHERE
        if abs(found["test_top1"] - stated) > allowed:
            problems.append(
                f"test_top1 of the stored weights is {found['test_top1']}, "
                f"metrics.json says {stated}."
            )
        return Verification(tuple(problems), found)


def _fetch(name: str) -> Path:
    """A bundle of the hub in the hub's cache, compared with its manifest."""
    path = fetch_folder(parse_hub_name(name), _PATTERNS)
    if not (path / MANIFEST).is_file():
        raise UserError(f"{name} holds no bundle (no {MANIFEST}): push one first.")
    if problems := manifest_problems(path, edited=(CARD,)):
        raise UserError(
            f"{name} is damaged: {' '.join(problems)} Push it again; if only the copy here is, "
            f"remove {path}."
        )
    return path


def same_arithmetic(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two environments round alike: processor, GPUs and torch are the same."""
    old, new = (compared(found) for found in (there, here))
    return all(old[name] == new[name] for name in ("processor", "torch", *GPU_FACTS))


# How many GPUs of a kind there are changes no bit. Before `float32` was recorded, a GPU computed it
# as torch does by itself.
GPU_FACTS = ("gpus", "cuda", "cudnn", "float32")


def compared(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with its packages beside the rest, and each kind of GPU once."""
    found = {**dict.fromkeys(("processor", "torch", *GPU_FACTS)), **environment}
    found |= found.get("packages", {})
    found["gpus"] = sorted({*(found["gpus"] or ())})
    if not found["gpus"]:
        found["float32"] = None
    return found


def export_bundle(
    study: StudyReader,
    out: Path,
    *,
    formats: Sequence[str] | None = None,
    normalized_input: bool = False,
    license: str = UNKNOWN_LICENSE,
    force: bool = False,
) -> Bundle:
    """Write the confirmed winner of a study to the folder `out`, all of it or nothing.

    The weights are those of the first confirm seed: choosing the best seed would choose
    on the test split. A bundle of this study that is there is replaced; any other content is
    refused.

    Args:
        formats: further forms of the model, of `EXPORTS`; None: those of the bundle of this study
            that is replaced, if any. normalized_input: they take normalised images instead of
            images in [0, 1]; license: of the weights, for the card,
            by its name on the hub ("mit", "cc-by-nc-4.0"); force: also replace the bundle of
            another study, and one that holds further files.

    Raises:
        UserError: the study has no confirmed winner yet, `out` holds something else, or a
            format is unknown, lacks its packages or fails.
    """
    if formats is None:
        formats, normalized_input = _programs_in(out, study)
    check_exports(formats)
    check_license(license)
    board = study.leaderboard()
    if not board or not board[0].test:
        raise UserError(
            f"{study.path} has no confirmed winner yet: finish it with "
            f"`{resume_command(study.config, study.place)}`, then export."
        )
    winner = board[0]
    if winner.failed:
        raise UserError(f"the winner of {study.path}, {winner.name}, failed: {winner.failed}")
    check_replaceable(out, study, force=force)
    check_pinned(
        study.path, study.header.get(DATA), study.config.distill, study.config.data_root,
        cure="begin another study with them",
    )  # fmt: skip
    final = [
        run for run in study.confirm_runs if run.stage is RunStage.FINAL and run.name == winner.name
    ]
    run = _read_finished(final[0], study)
    temporary = temporary_folder(out)
    try:
        config = _write_run(temporary, run)
        metrics = bundle_metrics(study, board, run, seeds=[run.seed for run in final])
        if formats:
            classifier = Bundle(path=temporary, config=config, metrics=metrics).classifier()
            metrics["exports"] = export_programs(
                temporary, formats, classifier, config, metrics["class_names"],
                normalized_input=normalized_input,
            )  # fmt: skip
        write_json(temporary / "metrics.json", metrics)
        weights = read_metadata(temporary / WEIGHTS)
        card = model_card(config, weights, metrics, board, license=license)
        write_text(temporary / CARD, card)
        sources = write_sources(temporary, config.plugins)
        names = (name for name in (*FILES, *EXPORTS.values()) if (temporary / name).exists())
        write_manifest(temporary, [*names, *sources])
        _swap(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.load(out)


def _programs_in(out: Path, study: StudyReader) -> tuple[list[str], bool]:
    """The formats of the programs in a study's bundle, and whether they take normalised images."""
    there: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # no bundle, or a damaged one
        metrics = _read_mapping(out / "metrics.json")
        if metrics.get("study") == study.config.fingerprint():
            there = metrics.get("exports") or {}
    found = []
    for name in (name for name, file in EXPORTS.items() if isinstance(there.get(file), dict)):
        try:
            check_exports([name])
            found.append(name)
        except UserError as error:  # no reason for a study to fail at its end
            warnings.warn(f"{out / EXPORTS[name]} is not made again: {error}", stacklevel=2)
    return found, any(bool(there[EXPORTS[name]].get("normalized_input")) for name in found)


def check_replaceable(out: Path, study: StudyReader, *, force: bool) -> None:
    """Raise `UserError` if a folder holds what an export of this study may not remove."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is not a bundle: choose another --out.")
    if force:
        return
    cure = "choose another --out, or give --force to replace it with all that it holds."
    metrics = out / "metrics.json"
    if not metrics.is_file() or _read_mapping(metrics).get("study") != study.config.fingerprint():
        raise UserError(f"{out} holds the bundle of another study: {cure}")
    hidden = {path.name for path in out.iterdir() if path.name.startswith(".")}  # such as .git
    if further := sorted({*_unlisted(out), *hidden}):
        raise UserError(f"{out} holds {joined(further[:3])} beside its bundle: {cure}")


def _read_finished(run: RunRecord, study: StudyReader) -> RunRecord:
    """The full record of a final run; raises `UserError` if its files are not there."""
    folder = run.folder
    if not folder.resolve().is_relative_to(study.path.resolve()):
        raise UserError(
            f"{study.path / CONFIRMED} is damaged: it names {str(folder)!r}, which lies "
            f"outside of the study: run `{resume_command(study.config, study.place)}`."
        )
    lost = [name for name in (WEIGHTS, HISTORY, RESULT) if not (folder / name).is_file()]
    if lost:
        again = resume_command(study.config, study.place)
        raise UserError(f"{folder} lacks {', '.join(lost)}: run `{again}`.")
    found = read_record(folder, run)
    assert found is not None
    return found


def _write_run(folder: Path, run: RunRecord) -> DistillConfig:
    """Write to a bundle what its run is and has left; returns its complete configuration."""
    for name in (WEIGHTS, HISTORY):
        shutil.copyfile(run.folder / name, folder / name)
    config = DistillConfig.from_dict(run.config).replace(
        precision=run.precision,
        compile="on" if run.compiled else "off",
        data_fingerprint=run.data_fingerprint,
    )
    # The teacher is named by its hash, data by their fingerprint.
    config = config.without_places()
    write_text(folder / "distill.yaml", config.to_yaml())
    write_json(folder / "environment.json", run.environment)
    return config


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


# metrics.json and environment.json


def bundle_metrics(
    study: StudyReader, board: Leaderboard, run: RunRecord, *, seeds: Sequence[int]
) -> dict[str, Any]:
    """The content of `metrics.json`.

    Args:
        board: the leaderboard, the winner first; run: the run that made the weights; seeds: of
            all final runs of the winner.
    """
    winner, config, teacher = board[0], study.config, study.teacher()
    arrays = load_dataset(winner.config.dataset, "train", data_root=config.data_root)
    searched = next((t for t in study.ranked() if t.number == winner.number), None)
    front = study.pareto() if config.objectives else []
    said = _read_predictions(run.folder)
    return {
        "format_version": FORMAT_VERSION,
        "ekd_ray": __version__,
        "study": config.fingerprint(),
        "class_names": list(arrays.class_names),
        DATA: study.header.get(DATA),  # of the study's splits
        "pictures": describe_images(config.distill, config.data_root),  # skipped, left out, odd
        "log_prior": read_metadata(run.folder / WEIGHTS).log_prior,
        # The labels of the test images have no part in them.
        "coverage_thresholds": None if said is None else coverage_thresholds(said.uncertainty),
        "calibration": _find_calibration(study, winner, run, said),
        "seeds": list(seeds),
        TESTED_AT: study.header.get(TESTED_AT, []),
        "workers": config.workers_per_trial,
        "seconds": run.seconds,
        "teacher": asdict(teacher) if teacher else None,  # on the validation split
        # These weights, and their recall by class; then the winner in the search (one seed, the
        # validation split), over fresh seeds on the same split, and over these seeds on the test
        # split, read once each.
        "model": select_metrics(run.metrics, "test_", "train_"),
        "classes": [] if said is None else _list_classes(said),
        "search": select_metrics(searched.last, "val_") if searched else {},
        "validation": _spreads(winner.val_metrics),
        "test": _spreads(winner.test_metrics),
        "leaderboard": [_board_entry(row, config) for row in board],
        # Search scores: of one seed each, on the validation split.
        "pareto_front": [
            {"trial": t.number, **{n: t.last[n] for n in config.watched}, "params": t.params}
            for t in front
        ],
        # The winner's lead on validation; its gain over what needs no search; its metric on
        # validation minus each champion's; its test top-1 minus each champion's and baseline's.
        "lead": asdict(board.lead) if board.lead else None,
        "gain": gain_values(board),
        "validation_differences": {
            name: asdict(found) for name, found in study.validation_differences().items()
        },
        "differences": {name: asdict(found) for name, found in study.differences().items()},
    }


def _read_predictions(folder: Path) -> Predictions | None:
    """A final run's predictions of the test images; None where they are lost or damaged."""
    with contextlib.suppress(UserError):
        return Predictions.load(folder / PREDICTIONS)
    return None


def _find_calibration(
    study: StudyReader, winner: Row, run: RunRecord, said: Predictions | None
) -> dict[str, Any] | None:
    """That of the run of the same configuration and seed that has held the validation images out
    (another seed's where its file is lost), and what it gives on the test images of which the
    logits were kept; None without one."""
    twins = [
        other for other in study.confirm_runs
        if other.stage is RunStage.SELECT and other.name == winner.name
    ]  # fmt: skip
    for twin in sorted(twins, key=lambda other: other.seed != run.seed):
        with contextlib.suppress(UserError, OSError):
            found = Calibration.load(twin.folder)
            measured = None if said is None else _measure_calibration(found, said, run)
            return {**asdict(found), "seed": twin.seed, "measured": measured}
    return None


def _measure_calibration(found: Calibration, said: Predictions, run: RunRecord) -> dict[str, float]:
    prior, labels = read_metadata(run.folder / WEIGHTS).log_prior, said.labels[said.kept]
    logits = said.logits.float()
    measured: dict[str, float] = {"images": len(labels)}
    for suffix, temperature in (("", 1.0), ("_calibrated", found.temperature)):
        figures = classification_metrics(logits, labels, log_prior=prior, temperature=temperature)
        measured |= {f"{name}{suffix}": figures[name] for name in ("nll", "ece")}
    log_probs = log_probabilities(logits, prior)
    for share in STATED_COVERAGES:
        with contextlib.suppress(UserError):  # too few validation images for that
            threshold = found.threshold(share)
            measured |= measure_sets(log_probs, labels, {share: threshold})
    return measured


def _list_classes(found: Predictions) -> list[dict[str, Any]]:
    """The `recall` of each class that the test split has, by `name`, with its `images`."""
    count = len(found.class_names)
    recalls = class_recalls(found.predicted == found.labels, found.labels, count)
    images = torch.bincount(found.labels, minlength=count)
    rows = zip(found.class_names, images.tolist(), recalls.tolist(), strict=True)
    return [{"name": n, "images": i, "recall": r} for n, i, r in rows if i]


def _spreads(seeds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and n of every metric that all seeds have."""
    names = seeds[0] if seeds else {}
    return {n: _spread([found[n] for found in seeds]) for n in names if all(n in s for s in seeds)}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, deviation, count = mean_sd(values)
    return {"mean": mean, "sd": deviation, "n": count}


def _board_entry(row: Row, config: StudyConfig) -> dict[str, Any]:
    further = {name: row.figures(name) for name in config.watched if name != config.metric}
    figures = {"val": row.val, **further, "test_top1": row.test}
    spreads = {name: {**_spread(v), "values": list(v)} for name, v in figures.items() if v}
    names = {"name": row.name, "role": row.role, "equals": row.equals, "winner": row.winner}
    return {**names, **spreads}


def read_metrics(path: Path) -> dict[str, Any]:
    """Read `metrics.json` of a bundle; raises `UserError` if it is damaged, foreign or newer."""
    metrics = _read_mapping(path)
    check_format(path, metrics.get("format_version", 1), FORMAT_VERSION)
    names: Any = metrics.get("class_names")
    model: Any = metrics.get("model")
    test, exports = metrics.get("test"), metrics.get("exports") or {}
    thresholds: Any = metrics.get("coverage_thresholds")
    sound = (
        isinstance(names, list)
        and len(names) > 1
        and all(isinstance(name, str) for name in names)
        and _are_figures(model)
        and 0 <= model.get("test_top1", -1) <= 1
        and isinstance(test, dict)
        and all(_are_figures(entry) for entry in test.values())
        and isinstance(exports, dict)
        and all(isinstance(entry, dict) for entry in exports.values())
        and type(metrics.get("workers")) is int
        and (thresholds is None or _are_thresholds(thresholds))
        and _is_calibration(metrics.get("calibration"))
    )
    if not sound:
        raise _damaged(path)
    check_class_names(str(path), names)
    return metrics


def _are_figures(found: Any) -> bool:
    """Whether it is a mapping to numbers."""
    return isinstance(found, dict) and all(type(v) in (int, float) for v in found.values())


def _is_calibration(found: Any) -> bool:
    """Whether it is one, or None, which bundles of an older ekd_ray have."""
    if found is None:
        return True
    try:
        Calibration.from_dict(found)
    except ValueError:
        return False
    return found.get("measured") is None or _are_figures(found["measured"])


def _are_thresholds(found: Any) -> bool:
    return (
        isinstance(found, list)
        and len(found) == len(COVERAGES)
        and all(isinstance(value, float) for value in found)
    )


def read_environment(path: Path) -> dict[str, Any]:
    """Read `environment.json` of a bundle; raises `UserError` if it is damaged."""
    found = _read_mapping(path)
    threads, gpus = found.get("threads"), found.get("gpus") or []
    sound = (
        type(threads) is int
        and 0 < threads <= MOST_THREADS
        and isinstance(found.get("packages"), dict)
        and isinstance(gpus, list)
        and all(isinstance(name, str) for name in gpus)
        and isinstance(found.get("deterministic", False), bool)
    )
    if not sound:
        raise _damaged(path)
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        json.dumps(found, allow_nan=False)  # refuses 1e999, too
    except (UserError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: copy or export the bundle again.")


# MANIFEST


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """List files of a folder with their SHA-256, in the form that `sha256sum --check` reads."""
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names]
    write_text(folder / MANIFEST, "".join(lines))


def _listed(folder: Path) -> list[str]:
    """The names in a manifest."""
    lines = read_bytes(folder / MANIFEST, most=MOST_TEXT).decode(errors="replace").splitlines()
    return [line.partition("  ")[2] for line in lines]


def manifest_problems(folder: Path, *, edited: Sequence[str] = ()) -> list[str]:
    """The faults of a bundle's files, a sentence each; empty without any.

    Nothing outside the folder is read, whatever the manifest says. Files that begin with a
    dot, which clones of repositories have, are left out. Those of `edited` may hold anything.
    """
    known = {*FILES, *EXPORTS.values()}
    problems, listed = [], set()
    for line in read_bytes(folder / MANIFEST, most=MOST_TEXT).decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name not in known and not _SOURCE.fullmatch(name):
            problems.append(f"{MANIFEST} lists {name!r}, which does not belong to a bundle.")
            continue
        listed.add(name)
        if name not in edited or not (folder / name).is_file():
            problems += _file_problems(folder, name, digest)
    problems += [f"{MANIFEST} does not list {name}." for name in FILES if name not in listed]
    return problems + [
        f"{name} is there, but {MANIFEST} does not list it." for name in _unlisted(folder)
    ]


def _unlisted(folder: Path) -> list[str]:
    """The files and folders in a bundle's folder that are no part of it."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {SOURCES}
    sources = filter(Path.is_file, (folder / SOURCES).rglob("*"))
    there |= {path.relative_to(folder).as_posix() for path in sources}
    return sorted(there - {*_listed(folder), *FILES, MANIFEST})


def _file_problems(folder: Path, name: str, digest: str) -> list[str]:
    if not (folder / name).is_file():
        return [f"{name} is missing."]
    same = sha256_file(folder / name) == digest
    return [] if same else [f"{name} was changed: its SHA-256 is not the one in {MANIFEST}."]
