"""The bounds of every setting, written here by hand: what is refused, and what just is not."""

import dataclasses

import jsonschema
import pytest

import ekd_ray.losses  # noqa: F401  (it registers the settings of the methods)
from ekd_ray.config import DistillConfig, StudyConfig, json_schema
from ekd_ray.config.settings import value_type
from ekd_ray.errors import UserError

INF = 10**9
# name: (refused, accepted); INF among the accepted says that there is no upper bound.
RUN = {
    "train_subset": ([0, -1], [1, INF]),
    "validation_fraction": ([-0.001, 0.501], [0.0, 0.5]),
    "split_seed": ([-1], [0, INF]),
    "view_pool": ([0], [1, INF]),
    "view_seed": ([-1], [0, INF]),
    "image_size": ([7, 1025], [8, 1024]),
    "student_image_size": ([7, 1025], [8, 1024]),
    "teacher_top": ([0], [1, INF]),
    "temperature": ([0, -1, 100.1], [1e-6, 100]),
    "ce_weight": ([-1e-6], [0, INF]),
    "kd_weight": ([-1e-6], [0, INF]),
    "kd_warmup": ([-1], [0, INF]),
    "ekd_weight": ([-1e-6], [0, INF]),
    "ekd_warmup": ([-1], [0, INF]),
    "dkd_alpha": ([-1e-6], [0, INF]),
    "dkd_beta": ([-1e-6], [0, INF]),
    "ctkd_t_start": ([0, -1], [1e-6, INF]),
    "ctkd_t_end": ([0, -1], [1e-6, INF]),
    "ctkd_warmup": ([-1], [0, INF]),
    "log_prior": ([-20.1, 20.1], [-20, 20]),
    "teacher_log_prior": ([-20.1, 20.1], [-20, 20]),
    "prior_kl_weight": ([-1e-6], [0, INF]),
    "prior_kl_warmup": ([-1], [0, INF]),
    "epochs": ([0], [1, INF]),
    "batch_size": ([0], [1, INF]),
    "accumulation_steps": ([0, -1], [1, 2]),  # divides batch_size
    "lr": ([0, -1], [1e-6, INF]),
    "momentum": ([-0.001, 1.001], [0, 1]),
    "weight_decay": ([-1e-6], [0, INF]),
    "lr_milestones": ([[0], [1.001]], [[1e-6], [1], []]),
    "lr_decay": ([0, 1.001], [1e-6, 1]),
    "lr_min": ([-1e-6], [0, 0.05]),  # at most lr
    "lr_warmup": ([-1], [0, INF]),
    "seed": ([-1, 2**63], [0, 2**63 - 1]),
    "teacher_cache": (["yes"], ["auto", "on", "off", True, False]),
    "decode_threads": ([0, -1, "all", 2.5], [1, INF, "auto"]),
    "ekd_temperature": ([0, -1, 101], [0.1, 100, None]),
    "evidence": (["tanh"], ["log1p_softplus", "softplus", "exp", "relu"]),
    "prior_kl_evidence": (["tanh"], ["log1p_softplus", "softplus", "exp", "relu"]),
    "optimizer": (["adam"], ["sgd", "adamw"]),
    "schedule": (["linear"], ["step", "cosine"]),
    "compile": (["yes", 1], ["auto", "on", "off", True, False]),
    "precision": (["float64"], ["auto", "float32", "bfloat16", "float16"]),
}
METRICS = ["val_top1", "val_nll", "val_ece", "val_aurc", "val_ood_auroc"]
STUDY = {
    "trials": ([0], [1, INF]),
    "budget_epochs": ([0], [1, INF]),
    "budget_hours": ([0, -1], [1e-6, INF]),
    "budget_gpu_hours": ([0, -1], [1e-6, INF]),
    "grace_epochs": ([0], [1, INF]),
    "rungs": ([[0], [3, 0]], [[1], [1, INF], []]),
    "reduction_factor": ([1, 0], [2, INF]),
    "seed": ([-1], [0, INF]),
    "confirm_top_k": ([0], [1, INF]),
    "confirm_seeds": ([0, "all", 2.5], [1, INF, "auto"]),
    "confirm_seeds_cap": ([1], [2, INF]),
    "max_concurrent": ([0], [1, INF]),
    "workers_per_trial": ([0], [1, INF]),
    "cpus_per_trial": ([0], [1, INF]),
    "gpus_per_trial": ([-0.001, "all"], [0, 0.25, INF, "auto"]),
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
    assert set(table) == numbers | chosen


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
