"""The exported winner: weights, configuration and evidence in one folder that checks itself.

best/  model.safetensors  distill.yaml  metrics.json  history.jsonl  environment.json
       README.md  MANIFEST, where asked for  model.pt2  model.onnx, and of plugins  plugins/*.py"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ekd_ray import __version__
from ekd_ray.config import DistillConfig
from ekd_ray.config.arguments import checks_arguments, made_by_load
from ekd_ray.config.phrases import short_name
from ekd_ray.config.plugins import files_trusted
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.environment import environment, same_arithmetic
from ekd_ray.engine.final import WEIGHTS, assess_model, own_outside
from ekd_ray.engine.history import HISTORY, read_history
from ekd_ray.engine.measure.assessment import COVERAGES as SHARES
from ekd_ray.engine.measure.calibration import Calibration
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.resolve import check_model, student_size
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.errors import UserError, spell_controls, unknown_name
from ekd_ray.files import check_name, expand_home
from ekd_ray.models import WeightsMetadata, load_model, read_metadata
from ekd_ray.remote.hub import PREFIX, fetch_folder, parse_hub_name, push_folder
from ekd_ray.results.bundle_files import (
    CARD,
    FILES,
    PATTERNS,
    damaged,
    list_names,
    manifest_problems,
    read_environment,
    read_metrics,
)
from ekd_ray.results.evaluation import check_options, find_outside
from ekd_ray.results.html import facts_html
from ekd_ray.results.inference import Classifier, Prediction, Preprocessing, classify
from ekd_ray.results.leaderboard import TESTED
from ekd_ray.results.prediction_table import PredictedFiles, list_pictures, write_predictions
from ekd_ray.results.records import BEST, MANIFEST
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.words import figure_text, list_figures, metric_name

# Another processor, GPU or torch rounds otherwise: a few images may change sides.
ELSEWHERE = 0.005


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
            below = path / BEST
            cure = f"give {below}" if (below / MANIFEST).is_file() else "export one first"
            raise UserError(f"{path} holds no bundle (no {MANIFEST}): {cure}.")
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
        """The arguments of `classify` and `write_predictions` that come of the calibration."""
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
            [MANIFEST, *list_names(self.path)],
            owned=PATTERNS,
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
            raise damaged(self.path / HISTORY)
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
    path = fetch_folder(parse_hub_name(name), PATTERNS)
    if not (path / MANIFEST).is_file():
        raise UserError(f"{name} holds no bundle (no {MANIFEST}): push one first.")
    if problems := manifest_problems(path, edited=(CARD,)):
        raise UserError(
            f"{name} is damaged: {' '.join(problems)} Push it again; if only the copy here is, "
            f"remove {path}."
        )
    return path
