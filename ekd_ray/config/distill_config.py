"""`DistillConfig`: every setting of one training run.

It is frozen, keyword-only and checked when built. The names are the ones used on the
command line (`--set name=value`), in recipes, in TensorBoard and in the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ekd_ray.config.settings import Settings, setting
from ekd_ray.errors import UserError

# The data sets that are known by name (`ekd_ray.data`, which loads torch, has the rest of them).
DATASETS = ("cifar10", "cifar100", "tiny_imagenet", "imagenet", "digits", "synthetic")
EVIDENCE = ("log1p_softplus", "softplus", "exp", "relu")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """One training run: data, models, method, solver, numerics.

    A setting that is None takes the default of its method, data set or teacher when the
    run is planned (`ekd_ray.engine.resolve.resolve`); results record the resolved value.
    """

    retired: ClassVar[dict[str, Any]] = {"changes": (), "parallel": "ddp"}

    # Data
    dataset: str = setting("cifar100", f"data set: {', '.join(DATASETS)} or folder:PATH")
    data_fingerprint: str | None = setting(None, "fingerprint of the training images; checked")
    train_subset: int | None = setting(None, "training images to draw (stratified)", low=1)
    validation_fraction: float = setting(
        0.1,
        "share of the training images held out for validation; 0 trains on all",
        low=0,
        high=0.5,
    )
    split_seed: int = setting(0, "seed of the subset and of the validation split", low=0)
    augment: str | None = setting(
        None, "view scheme: crop_flip, crop8_flip, crop, resized_crop or none (data set's default)"
    )
    view_pool: int = setting(
        64, "views per image of a drawn scheme (resized_crop, strong views)", low=1
    )
    view_seed: int = setting(0, "seed of the drawn views, shared by all runs of a study", low=0)
    image_size: int | None = setting(
        None, "side of the views in pixels (the data set's own)", low=8, high=1024
    )
    ood_dataset: str | None = setting(
        None, "second data set, out of distribution, for ood_auroc (unused by the training)"
    )

    # Models
    student: str = setting("resnet8x4", "student architecture, a name of the zoo")
    student_image_size: int | None = setting(
        None, "side to which the student's views are resized, e.g. 224 for a ViT", low=8, high=1024
    )
    teacher: str | None = setting(None, "teacher architecture, a name of the zoo")
    teacher_weights: str | None = setting(None, "the teacher's checkpoint", identity=False)
    teacher_sha256: str | None = setting(None, "SHA-256 of the teacher's checkpoint; checked")
    teacher_normalization: str | None = setting(
        None,
        "imagenet, cifar10, cifar100, half, or 'mean,mean,mean/std,std,std' (the weights' own)",
    )

    teacher_cache: str = setting(
        "auto", "keep the teacher's logits on disk: on, off, or auto (where the disk has room)",
        choices=("auto", "on", "off"), identity=False,
    )  # fmt: skip
    teacher_top: int | None = setting(
        None, "keep this many of the teacher's logits per view, and the mass of the rest", low=1
    )

    # Method (METHODS.md, section 1)
    method: str = setting("ekd", "distillation method: a name of METHODS (docs/methods.md)")
    temperature: float | None = setting(None, "softening T of both logits", above=0, high=100)
    ce_weight: float | None = setting(None, "weight of the (evidential) cross-entropy", low=0)
    kd_weight: float | None = setting(None, "weight of KD / first-order expectation KD", low=0)
    kd_warmup: int | None = setting(None, "epochs over which DKD's kd_weight ramps up", low=0)
    ekd_weight: float | None = setting(None, "weight of second-order distribution KD", low=0)
    ekd_warmup: int | None = setting(None, "epochs over which ekd_weight ramps up linearly", low=0)
    standardize: bool = setting(False, "standardise logits per row before KD (softmax methods)")
    dkd_alpha: float = setting(1.0, "DKD: weight of the (target, rest) part", low=0)
    dkd_beta: float = setting(8.0, "DKD: weight of the part among the other classes", low=0)
    ctkd_t_start: float = setting(1.0, "CTKD: lower end of the learned temperature", above=0)
    ctkd_t_end: float = setting(20.0, "CTKD: width of the learned temperature's range", above=0)
    ctkd_warmup: int | None = setting(
        None, "CTKD: epochs over which the gradient reversal grows to full strength", low=0
    )
    log_prior: float | None = setting(
        None, "log of the prior mass per class (the teacher's learned one)", low=-20, high=20
    )
    learn_log_prior: bool = setting(
        False, "train log_prior with the student, from its value or 1.0"
    )
    teacher_log_prior: float | None = setting(
        None, "log_prior of the teacher's Dirichlet, where it differs", low=-20, high=20
    )
    evidence: str = setting("log1p_softplus", "second-order evidence function", choices=EVIDENCE)
    prior_kl_weight: float = setting(0.0, "weight of the evidential regularisation", low=0)
    prior_kl_warmup: int = setting(10, "epochs over which prior_kl_weight ramps up", low=0)
    prior_kl_evidence: str = setting(
        "softplus", "evidence function of the evidential regularisation", choices=EVIDENCE
    )

    # Solver
    epochs: int = setting(240, "epochs of the whole schedule", low=1)
    batch_size: int = setting(64, "global batch, summed over workers", low=1)
    accumulation_steps: int = setting(
        1, "parts that a batch is computed in, one after the other, to save memory", low=1
    )
    optimizer: str = setting("sgd", "optimizer", choices=("sgd", "adamw"))
    lr: float = setting(0.05, "peak learning rate", above=0)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=1)
    nesterov: bool = setting(False, "Nesterov momentum (SGD)")
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    schedule: str = setting("step", "learning-rate schedule", choices=("step", "cosine"))
    lr_milestones: tuple[float, ...] = setting(
        (0.625, 0.75, 0.875), "fractions of epochs after which lr is multiplied by lr_decay",
        above=0, high=1,
    )  # fmt: skip
    lr_decay: float = setting(0.1, "factor at each milestone", above=0, high=1)
    lr_min: float = setting(0.0, "final learning rate of the cosine schedule", low=0)
    lr_warmup: int = setting(0, "epochs of linear learning-rate warm-up", low=0)

    # Numerics
    precision: str = setting(
        "auto", "autocast precision; auto is bfloat16 where the hardware has it",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    channels_last: bool = setting(True, "channels_last memory format")
    compile: bool = setting(
        False, "torch.compile the student's training step: a start-up of up to minutes"
    )
    seed: int = setting(0, "one seed for the weights, the order and the views", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def identity(self) -> dict[str, Any]:
        """See `Settings.identity`; a run whose batches are not computed in parts is the run that it
        was before there was such a setting."""
        kept = super().identity()
        if self.accumulation_steps == 1:
            del kept["accumulation_steps"]
        return kept
