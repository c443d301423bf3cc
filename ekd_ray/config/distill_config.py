"""`DistillConfig`: every setting of one training run.

It is frozen, keyword-only and checked when built. The names are the ones used on the
command line (`--set name=value`), in recipes, in TensorBoard and in the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ekd_ray.config import method_settings
from ekd_ray.config.method_settings import REGISTRY, MethodSetting
from ekd_ray.config.plugins import SOURCES, check_stamps, current_origin, is_of, load_named
from ekd_ray.config.settings import COUNTS, MOST_EPOCHS, MOST_SEED, MOST_THREADS, Settings, setting
from ekd_ray.config.yaml_files import YamlFile
from ekd_ray.errors import UserError

# The data sets that are known by name (`ekd_ray.data`, which loads torch, has the rest of them).
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "imagenet", "digits", "synthetic")

# In the place of a file of student_weights: what the model's library has downloaded before.
CACHED = "cached"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """One training run: data, models, method, solver, numerics.

    A setting that is None takes the default of its method, data set or teacher when the
    run is planned (`ekd_ray.engine.resolve.resolve`); results record the resolved value.
    """

    retired: ClassVar[dict[str, Any]] = {"changes": (), "parallel": "ddp"}
    filled_in = ("data_fingerprint", "fitted", "student_sha256", "teacher_sha256")

    plugins: tuple[str, ...] = setting(
        (), "plugins that the run uses, each as NAME@SHA256 of its source; filled in", neutral=()
    )

    # Data
    dataset: str = setting("cifar100", f"data set: {', '.join(DATASETS)}, folder:PATH or hf:PATH")
    data_fingerprint: str | None = setting(None, "fingerprint of the training images; checked")
    check_images: bool = setting(
        False, "decode every picture before compute, not a sample alone", effect="free"
    )
    skip_damaged: bool = setting(
        False, "decode every picture before compute, and leave out those that are damaged",
        neutral=False,
    )  # fmt: skip
    exclude_duplicates: bool = setting(
        False, "leave out training pictures that are test pictures, or earlier training pictures, "
        "too, byte for byte", neutral=False,
    )  # fmt: skip
    train_subset: int | None = setting(
        None, "training images to draw (stratified)", low=1, high=10**9
    )
    validation_fraction: float = setting(
        0.1,
        "share of the training images held out for validation; 0 trains on all",
        low=0,
        high=0.5,
    )
    split_seed: int = setting(
        0, "seed of the subset and of the validation split", low=0, high=MOST_SEED
    )
    class_balance: float = setting(
        0.0,
        "how far an epoch evens the classes out: one of n images gets a share of the places "
        "proportional to n^(1 - class_balance); 0 as they are, 1 all alike",
        low=0, high=1, neutral=0.0,
    )  # fmt: skip
    augment: str | None = setting(
        None, "view scheme: crop_flip, crop8_flip, crop, resized_crop or none (data set's default)"
    )
    view_pool: int = setting(
        64,
        "views per image where they are drawn (resized_crop, strong views, auto_augment, "
        "random_erasing, mixes)",
        low=1, high=10_000,
    )  # fmt: skip
    view_seed: int = setting(
        0, "seed of the drawn views, shared by all runs of a study", low=0, high=MOST_SEED
    )
    auto_augment: str = setting(
        "none", "operations on every view before it is mixed, as torchvision has them",
        choices=("none", "randaugment", "trivialaugment"), neutral="none",
    )  # fmt: skip
    randaugment_ops: int = setting(2, "operations of randaugment", low=1, high=14, neutral=2)
    randaugment_magnitude: int = setting(
        9, "strength of randaugment's operations", low=0, high=30, neutral=9
    )
    random_erasing: float = setting(
        0.0, "share of the views in which a rectangle is erased", low=0, high=1, neutral=0.0
    )
    mixup_alpha: float = setting(
        0.0,
        "mixup of each view with that of another image, in shares of Beta(alpha, alpha); 0: none",
        low=0, high=1, neutral=0.0,
    )  # fmt: skip
    cutmix_alpha: float = setting(
        0.0, "CutMix in the place of mixup, with both in the place of every second; 0: none",
        low=0, high=1, neutral=0.0,
    )  # fmt: skip
    mix_share: float = setting(1.0, "share of the views that are mixed", low=0, high=1, neutral=1.0)
    image_size: int | None = setting(
        None, "side of the views in pixels (the data set's own)", low=8, high=1024
    )
    decode_threads: int | Literal["auto"] = setting(
        "auto",
        "threads that decode pictures; auto: the node's cores for each of its GPUs, without a GPU "
        "as many as compute",
        low=1, high=MOST_THREADS, effect="free", neutral="auto",
    )  # fmt: skip
    ood_dataset: str | None = setting(
        None, "second data set, out of distribution, for ood_auroc (unused by the training)"
    )

    # Models
    student: str = setting("resnet8x4", "student architecture, a name of the zoo")
    student_image_size: int | None = setting(
        None, "side to which the student's views are resized, e.g. 224 for a ViT", low=8, high=1024
    )
    student_weights: str | None = setting(
        None,
        "weights that the student starts from: a file, or `cached`, those that timm or torchvision "
        "has downloaded before; other classes get a new classifier",
        effect="free",
    )
    student_sha256: str | None = setting(
        None, "SHA-256 of the weights that the student starts from; checked", neutral=None
    )
    student_normalization: str | None = setting(
        None,
        "of the student's images, as teacher_normalization (that of the weights it starts from, "
        "else the data set's)",
        neutral=None,
    )
    teacher: str | None = setting(None, "teacher architecture, a name of the zoo")
    teacher_weights: str | None = setting(None, "the teacher's checkpoint", effect="free")
    teacher_sha256: str | None = setting(None, "SHA-256 of the teacher's checkpoint; checked")
    teacher_normalization: str | None = setting(
        None,
        "imagenet, cifar10, cifar100, half, or 'mean,mean,mean/std,std,std' (the weights' own)",
    )
    teacher_key: str | None = setting(
        None,
        "which of several sets of weights of the teacher's file, such as state_dict_ema (the one "
        "that was trained, not its averages)",
        neutral=None,
    )
    min_teacher_accuracy: float | None = setting(
        None, "stop before compute if the teacher has less on the validation images", low=0, high=1,
        effect="free", neutral=None,
    )  # fmt: skip
    compare_teacher: bool = setting(
        False, "hold the student's uncertainty against the teacher's on the validation images in "
        "every epoch: val_vacuity_corr, val_entropy_corr, val_teacher_kl", neutral=False,
    )  # fmt: skip

    teacher_cache: str = setting(
        "auto", "keep the teacher's logits on disk: on, off, or auto (where the disk has room)",
        choices=("auto", "on", "off"), effect="free",
    )  # fmt: skip
    teacher_top: int | None = setting(
        None, "keep this many of the teacher's logits per view, and the mass of the rest", low=1,
        high=10**6,
    )  # fmt: skip

    # Method
    method: str = setting("ekd", "distillation method: a name of METHODS (docs/methods.md)")
    # Here follow the settings of the methods: `add_method_settings`.

    # Solver
    epochs: int = setting(240, "epochs of the whole schedule", low=1, high=MOST_EPOCHS)
    batch_size: int = setting(64, "global batch, summed over workers", low=1, high=10**6)
    accumulation_steps: int = setting(
        1, "parts that a batch is computed in, one after the other, to save memory", low=1,
        high=10**6, neutral=1,
    )  # fmt: skip
    optimizer: str = setting("sgd", "optimizer", choices=("sgd", "adamw"))
    lr: float = setting(0.05, "peak learning rate", above=0, high=1000)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=1)
    nesterov: bool = setting(False, "Nesterov momentum (SGD)")
    weight_decay: float = setting(5e-4, "weight decay", low=0, high=100)
    label_smoothing: float = setting(
        0.0, "share of each label that is spread evenly over all classes, in the term ce",
        low=0, high=1, neutral=0.0,
    )  # fmt: skip
    max_grad_norm: float | None = setting(
        None, "norm to which a longer gradient of all weights is scaled down", above=0, high=10**6,
        neutral=None,
    )  # fmt: skip
    ema_decay: float = setting(
        0.0,
        "decay of moving averages of the weights, which are then evaluated and exported in their "
        "place; 0: none",
        low=0, high=0.999999, neutral=0.0,
    )  # fmt: skip
    schedule: str = setting("step", "learning-rate schedule", choices=("step", "cosine"))
    lr_milestones: tuple[float, ...] = setting(
        (0.625, 0.75, 0.875), "fractions of epochs after which lr is multiplied by lr_decay",
        above=0, high=1,
    )  # fmt: skip
    lr_decay: float = setting(0.1, "factor at each milestone", above=0, high=1)
    lr_min: float = setting(0.0, "final learning rate of the cosine schedule", low=0, high=1000)
    lr_warmup: int = setting(0, "epochs of linear learning-rate warm-up", low=0, high=MOST_EPOCHS)

    # Numerics
    precision: str = setting(
        "auto", "autocast precision; auto is bfloat16 where the hardware has it, else float16 on "
        "GPUs that have that",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    channels_last: bool = setting(True, "channels_last memory format")
    compile: str = setting(
        "auto", "torch.compile the training step, with one worker; auto: on GPUs, where it pays",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    deterministic: bool | None = setting(
        None, "refuse algorithms whose bits differ from run to run on a GPU; by default no in a "
        "search, yes in what it exports, in runs of no study and in `reproduce`",
        effect="pinned",
    )  # fmt: skip
    seed: int = setting(
        0, "one seed for the weights, the order and the views", low=0, high=MOST_SEED
    )
    fitted: tuple[str, ...] = setting(
        (), "what a recipe has fitted to the data and the batch, in words; filled in",
        effect="free", neutral=(),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stamps(self.plugins)
        if list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            got = list(self.lr_milestones)
            raise UserError(
                f"lr_milestones must increase, got {got}: sort them and name each once.",
                keys=("lr_milestones",),
            )
        if self.lr_min > self.lr:
            raise UserError(
                f"lr_min must be <= lr ({self.lr}), got {self.lr_min}.", keys=("lr_min",)
            )
        if self.batch_size % self.accumulation_steps:
            raise UserError(
                f"accumulation_steps must divide batch_size ({self.batch_size}), got "
                f"{self.accumulation_steps}: choose a divisor.",
                keys=("accumulation_steps",),
            )

    if TYPE_CHECKING:  # the settings of methods are known when the program runs

        def __init__(self, **settings: Any) -> None: ...

    else:  # a type checker would let every misspelt name pass

        def __new__(cls, **values: Any) -> DistillConfig:
            if not values.keys() <= cls.__dataclass_fields__.keys():
                method_settings.load()
            return super().__new__(cls, **values)

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("__"):
                method_settings.load()
                if name in type(self).__dataclass_fields__:
                    return getattr(self, name)
            raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    @property
    def mixes_pictures(self) -> bool:
        """Whether views are mixed with those of other images."""
        return bool((self.mixup_alpha or self.cutmix_alpha) and self.mix_share)

    @property
    def draws_views(self) -> bool:
        """Whether the views are `view_pool` drawn ones an image (`ekd_ray.data.drawn_views`)."""
        changed = self.auto_augment != "none" or self.random_erasing > 0
        return changed or self.mixes_pictures

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "configuration") -> Self:
        """As `Settings.from_dict`; a complete file from before `ekd_temperature` keeps its meaning.

        Its second order had the `temperature` of the first, and a run without a second order has
        the former default of `evidence`, which it does not use.
        """
        if isinstance(values, Mapping) and "ekd_temperature" not in values:
            counted = {field.name for field in cls.fields() if field.metadata["neutral"] is COUNTS}
            if counted - {*REGISTRY} <= values.keys():  # every release wrote all of these
                changes = {"evidence": REGISTRY["evidence"].unset}
                if values.get("ekd_weight") is not None:
                    changes = {"ekd_temperature": values.get("temperature") or 1.0}
                values = {**values, **changes}
        return super().from_dict(values, where=where)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """As `Settings.from_yaml`; plugins that the file names are loaded, if the user allows it.

        Their sources are looked for beside it, in `plugins/`.
        """
        stamps = YamlFile.read(path).values.get("plugins") or ()
        load_named(stamps, Path(path).parent / SOURCES, named_by=Path(path))
        return super().from_yaml(path)

    def to_dict(self) -> dict[str, Any]:
        """As `Settings.to_dict`, without unset settings of plugins that this run does not use.

        A process without these plugins can then read it.
        """
        values = super().to_dict()
        for name, origin in method_settings.ORIGINS.items():
            if values[name] == REGISTRY[name].unset and not is_of(self.plugins, origin):
                del values[name]
        return values

    def without_places(self) -> Self:
        """The run as others may see it, and as equal runs of other machines have it.

        Of a folder of images the last part of its path stays; what changes no result, such as the
        teacher's file, is unset.
        """
        unset = {field.name: field.default for field in self.fields()
                 if field.metadata["effect"] != "identity"}  # fmt: skip
        names = {"dataset": self.dataset, "ood_dataset": self.ood_dataset}
        for name, value in names.items():
            kind, colon, path = (value or "").partition(":")
            if colon and kind in ("folder", "hf"):
                unset[name] = f"{kind}:{Path(path).name}"
        return self.replace(**unset)

    def identity(self) -> dict[str, Any]:
        """As `Settings.identity`; `compile` counts as it did when it was true or false."""
        return {**super().identity(), "compile": self.compile == "on"}

    @classmethod
    def fields(cls) -> tuple[Field[Any], ...]:
        """All settings, those of the methods included."""
        method_settings.load()
        return super().fields()

    @classmethod
    def add_method_settings(cls, declared: Iterable[MethodSetting]) -> None:
        """Add settings that a method declares; one that another method has already is shared.

        Raises:
            UserError: two methods mean different things by a name, or a method by a name of
                another setting.
        """
        registry = method_settings.REGISTRY
        last = next(reversed(registry), "method")
        added = {}
        for entry in declared:
            known = registry.get(entry.name)
            if known is None and entry.name in cls.__dataclass_fields__:
                raise UserError(f"{entry.name} is a setting of every run already: rename it.")
            if known is not None and not known.is_same_as(entry):
                raise UserError(
                    f"{entry.name} is a setting of another method, with another type, default, "
                    "description or other bounds: rename it."
                )
            if known is None:
                added[entry.name] = (entry.kind, entry.field())
                registry[entry.name] = entry
                if origin := current_origin():
                    method_settings.ORIGINS[entry.name] = origin
        if added:
            cls.add_fields(added, after=last)
