"""The bounds of every setting, written here by hand: what is refused, and what just is not."""

import dataclasses
import math

import jsonschema
import pytest

import ekd_ray.losses  # noqa: F401  (it registers the settings of the methods)
from ekd_ray.config import DistillConfig, StudyConfig, json_schema
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.config.settings import value_type
from ekd_ray.errors import UserError

EPOCHS, SEED = 100_000, 2**63 - 1
# name: (refused, accepted): what is just beyond each bound, and what is on it.
RUN = {
    "train_subset": ([0, -1, 10**9 + 1], [1, 10**9]),
    "validation_fraction": ([-0.001, 0.501], [0.0, 0.5]),
    "class_balance": ([-0.001, 1.001], [0.0, 1.0]),
    "split_seed": ([-1, SEED + 1], [0, SEED]),
    "view_pool": ([0, 10000 + 1], [1, 10000]),
    "view_seed": ([-1, SEED + 1], [0, SEED]),
    "auto_augment": (["autoaugment"], ["none", "randaugment", "trivialaugment"]),
    "randaugment_ops": ([0, 15], [1, 14]),
    "randaugment_magnitude": ([-1, 31], [0, 30]),
    "random_erasing": ([-0.001, 1.001], [0, 1]),
    "mixup_alpha": ([-0.001, 1.001], [0, 1]),
    "cutmix_alpha": ([-0.001, 1.001], [0, 1]),
    "mix_share": ([-0.001, 1.001], [0, 1]),
    "image_size": ([7, 1025], [8, 1024]),
    "student_image_size": ([7, 1025], [8, 1024]),
    "teacher_top": ([0, 10**6 + 1], [1, 10**6]),
    "min_teacher_accuracy": ([-0.1, 1.1], [0, 1]),
    "temperature": ([0, -1, 1e-300, 0.009, 100.1], [0.01, 100]),
    "ce_weight": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "kd_weight": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "kd_warmup": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "ekd_weight": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "ekd_warmup": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "dkd_alpha": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "dkd_beta": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "ctkd_t_start": ([0, -1, 0.009, 101], [0.01, 100]),
    "ctkd_t_end": ([0, -1, 0.009, 1001], [0.01, 1000]),
    "ctkd_warmup": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "rld_alpha": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "rld_beta": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "rld_confidence_temperature": ([0, -1, 0.009, 101], [0.01, 100]),
    "ttm_exponent": ([0, -1, 0.009, 10.1], [0.01, 10]),
    "dist_inter": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "dist_intra": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "wkd_weight": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "wkd_decay": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "wkd_sharpen": ([0, -1, 0.009, 101], [0.01, 100]),
    "wkd_epsilon": ([0, -1, 0.0049, 10.1], [0.005, 10]),
    "wkd_iterations": ([0, -1, 1001], [1, 1000]),
    "log_prior": ([-20.1, 20.1], [-20, 20]),
    "teacher_log_prior": ([-20.1, 20.1], [-20, 20]),
    "prior_kl_weight": ([-1e-6, 10**6 + 1], [0, 10**6]),
    "prior_kl_warmup": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "epochs": ([0, EPOCHS + 1], [1, EPOCHS]),
    "batch_size": ([0, 10**6 + 1], [1, 10**6]),
    "accumulation_steps": ([0, -1, 10**6 + 1], [1, 2]),  # divides batch_size
    "lr": ([0, -1, 1000 + 1], [1e-6, 1000]),
    "momentum": ([-0.001, 1.001], [0, 1]),
    "weight_decay": ([-1e-6, 100 + 1], [0, 100]),
    "label_smoothing": ([-0.001, 1.001], [0, 1]),
    "max_grad_norm": ([0, -1, 10**6 + 1], [1e-6, 10**6]),
    "ema_decay": ([-0.001, 1], [0, 0.999999]),
    "lr_milestones": ([[0], [1.001]], [[1e-6], [1], []]),
    "lr_decay": ([0, 1.001], [1e-6, 1]),
    "lr_min": ([-1e-6, 1001], [0, 0.05]),  # at most lr
    "lr_warmup": ([-1, EPOCHS + 1], [0, EPOCHS]),
    "seed": ([-1, 2**63], [0, 2**63 - 1]),
    "teacher_cache": (["yes"], ["auto", "on", "off", True, False]),
    "decode_threads": ([0, -1, 1024 + 1, "all", 2.5], [1, 1024, "auto"]),
    "ekd_temperature": ([0, -1, 0.009, 101], [0.01, 100, None]),
    "evidence": (["tanh"], ["log1p_softplus", "softplus", "exp", "relu"]),
    "prior_kl_evidence": (["tanh"], ["log1p_softplus", "softplus", "exp", "relu"]),
    "optimizer": (["adam"], ["sgd", "adamw"]),
    "schedule": (["linear"], ["step", "cosine"]),
    "compile": (["yes", 1], ["auto", "on", "off", True, False]),
    "precision": (["float64"], ["auto", "float32", "bfloat16", "float16"]),
}
METRICS = [
    "val_top1",
    "val_balanced_top1",
    "val_worst_recall",
    "val_nll",
    "val_ece",
    "val_aurc",
    "val_ood_auroc",
]
STUDY = {
    "trials": ([0, 10**6 + 1], [1, 10**6]),
    "stop_below": ([0.0, 1.1e6], [1e-9, 1e6]),
    "budget_epochs": ([0, 10**11 + 1], [1, 10**11]),
    "budget_hours": ([0, -1, 10**6 + 1], [1e-6, 10**6]),
    "budget_gpu_hours": ([0, -1, 10**9 + 1], [1e-6, 10**9]),
    "grace_epochs": ([0, EPOCHS + 1], [1, EPOCHS]),
    "rungs": ([[0], [3, 0], [EPOCHS + 1]], [[1], [1, EPOCHS], []]),
    "reduction_factor": ([1, 0, 1000 + 1], [2, 1000]),
    "seed": ([-1, SEED + 1], [0, SEED]),
    "confirm_top_k": ([0, 1000 + 1], [1, 1000]),
    "confirm_seeds": ([0, 1000 + 1, "all", 2.5], [1, 1000, "auto"]),
    "confirm_seeds_cap": ([1, 1000 + 1], [2, 1000]),
    "max_concurrent": ([0, 10**6 + 1], [1, 10**6]),
    "workers_per_trial": ([0, 10000 + 1], [1, 10000]),
    "cpus_per_trial": ([0, 1024 + 1], [1, 1024]),
    "gpus_per_trial": ([-0.001, 1024 + 1, "all"], [0, 0.25, 1024, "auto"]),
    "baselines": ([["ekd"]], [["none"], ["kd", "ekd-softmax"], []]),
    "champions": ([["kd"]], [["authors"], ["warm-start", "defaults"], []]),
    "metric": (["test_top1", "flops"], METRICS),
    "objectives": (
        [["test_top1"]], [[name] for name in (*METRICS[1:], "parameters", "flops", "latency_ms")]
    ),
    "sampler": (["bohb"], ["tpe", "gp", "cmaes", "qmc", "random", "grid", "nsga2", "nsga3"]),
    "scheduler": (["pbt", "pb2"], ["auto", "asha", "hyperband", "median", "none"]),
    "rung_score": (["best"], ["mean", "last"]),
    "teacher_fill": (["never"], ["eager", "lazy"]),
}  # fmt: skip
TABLES = ((DistillConfig, RUN), (StudyConfig, STUDY))
CASES = [(cls, name, *row) for cls, table in TABLES for name, row in table.items()]


def is_valid(cls, values):
    return jsonschema.Draft202012Validator(json_schema(cls)).is_valid(values)


@pytest.mark.parametrize(("cls", "table"), TABLES)
def test_every_setting_with_limits_has_its_row(cls, table):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    numbers = {name for name in fields if value_type(cls, name) in (int, float)}
    chosen = {name for name, field in fields.items() if field.metadata["choices"]}
    # The documentation's method stays registered in a process whose tests have used it.
    assert set(table) == (numbers | chosen) - {"at_weight"}


@pytest.mark.parametrize("cls", [cls for cls, _ in TABLES])
def test_every_number_has_a_finite_bound_at_each_end(cls):
    numbers = [f for f in cls.fields() if value_type(cls, f.name) in (int, float)]
    ends = {f.name: (f.metadata["low"], f.metadata["above"], f.metadata["high"]) for f in numbers}
    for name, (low, above, high) in ends.items():
        assert math.isfinite(above if low is None else low) and math.isfinite(high), name


@pytest.mark.parametrize("in_epochs", [False, True])
def test_a_number_of_a_plugin_without_bounds_has_them_all_the_same(in_epochs):
    limits = MethodSetting(name="own", kind=float | None, doc="", in_epochs=in_epochs).field()
    assert limits.metadata["low"] == -(10**6)
    assert limits.metadata["high"] == (EPOCHS if in_epochs else 10**6)


def test_a_share_of_a_gpu_that_holds_nothing_is_refused():
    with pytest.raises(UserError, match=r"gpus_per_trial must be 0 or >= 0\.001"):
        StudyConfig(gpus_per_trial=1e-300)


LONG = [{"lr_milestones": [0.5] * 1001}, {"student": "x" * 4097}, {"rungs": [*range(1, 1002)]},
        {"space": {"lr": {"choices": [0.1] * 1001}}}, {"space": {str(i): {} for i in range(1001)}},
        {"first_points": [{"lr": 0.1}] * 1001}]  # fmt: skip


@pytest.mark.parametrize("values", LONG, ids=lambda values: next(iter(values)))
def test_long_lists_and_texts_are_refused_in_short(values):
    cls = DistillConfig if next(iter(values)) in DistillConfig.names() else StudyConfig
    with pytest.raises(UserError) as refused:
        cls.from_dict(values)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("value", ["a\0b", "a\nb", "\x1b[2J", "\x9b2J", "\ud800"])
def test_control_characters_are_refused_and_shown(value):
    places = {"student": value}, {"space": {value: {}}}, {"authors": {"student": value}}
    for cls, values in zip((DistillConfig, StudyConfig, StudyConfig), places, strict=True):
        with pytest.raises(UserError, match="control character") as refused:
            cls.from_dict(values)
        assert str(refused.value).isprintable()


ENORMOUS = {"10**30": 10**30, "10**5000": 10**5000, "-1e300": -1e300, "nan": math.nan}


@pytest.mark.parametrize("value", ENORMOUS.values(), ids=ENORMOUS)
def test_every_number_refuses_what_no_number_may_be(value):
    for cls in (DistillConfig, StudyConfig):
        for field in cls.fields():
            if value_type(cls, field.name) in (int, float):
                with pytest.raises(UserError) as refused:
                    cls.from_dict({field.name: value})
                assert len(str(refused.value)) < 200


def test_a_mapping_without_end_is_refused():
    endless = {}
    endless["again"] = endless
    with pytest.raises(UserError, match="nested deeper"):
        StudyConfig(authors=endless)


@pytest.mark.parametrize(("cls", "name", "refused", "accepted"), CASES)
def test_bounds_of_class_and_schema(cls, name, refused, accepted):
    choices = cls.__dataclass_fields__[name].metadata["choices"] or ()
    for value in refused:
        with pytest.raises(UserError, match=f"^{name} must be .*, got ") as raised:
            cls.from_dict({name: value})
        assert "\n" not in str(raised.value)
        assert all(choice in str(raised.value) for choice in choices), value
        assert not is_valid(cls, {name: value}), value
    for value in accepted:
        cls.from_dict({name: value})
        assert is_valid(cls, {name: value}), value
