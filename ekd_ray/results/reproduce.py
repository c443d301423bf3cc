"""Train a bundle's run again, and say how alike the two came out."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ekd_ray.config import DistillConfig
from ekd_ray.engine.data_pin import check_pinned
from ekd_ray.engine.determinism import decide_determinism
from ekd_ray.engine.distill import OnEpoch, distill
from ekd_ray.engine.environment import GPU_FACTS, compared, environment
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.precision import cpu_threads
from ekd_ray.engine.resolve import resolve
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.losses.methods import method_of
from ekd_ray.models import cached_weights
from ekd_ray.results.bundle import Bundle
from ekd_ray.results.finish import finish_run
from ekd_ray.results.leaderboard import select_metrics
from ekd_ray.results.records import DATA, single_run
from ekd_ray.results.study_reader import StudyReader

IDENTICAL, WITHIN, DIFFERENT = "bit-identical", "within-tolerance", "different"
# Two runs that differ by rounding alone drift apart like two seeds: their difference has sqrt(2)
# times a seed's standard deviation, and 1.96 of those hold 19 of 20. At least half a point.
LEAST_TOLERANCE = 0.005
DEVIATIONS = 1.96 * math.sqrt(2)
# Times are of the machine, and no result.
_NOT_COMPARED = ("seconds", "latency_ms")


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The findings of `reproduce`.

    `verdict` is one of bit-identical (every figure of every epoch, every tensor and every
    test metric), within-tolerance (`test_top1` differs from `stated` by no more than
    `tolerance`) and different. `promised` is the first or the second of these, see `promise`.
    `first` says where the two runs parted first. `elsewhere` lists what of the environment is not
    as it was, each as "name: X recorded, Y here".
    """

    verdict: str
    promised: str
    first: str | None
    test_top1: float
    stated: float
    tolerance: float
    elsewhere: tuple[str, ...]
    metrics: dict[str, float]


def prepare(
    bundle: Bundle,
    *,
    data_root: str | None = None,
    teacher_weights: str | None = None,
    student_weights: str | None = None,
    dataset: str | None = None,
) -> DistillConfig:
    """The bundle's run as it can be trained here: checked, with its teacher and its data.

    Args:
        teacher_weights: the teacher's file; without it the study in which the bundle lies is
            searched for a file of the recorded hash. student_weights: what the student starts
            from, likewise; its library's cache is searched too. dataset: another name for the same
            data (`folder:PATH` elsewhere).

    Raises:
        UserError: the bundle was changed, or its teacher or data are not there.
    """
    problems = bundle.verify().problems
    if problems:
        raise UserError(f"{bundle.path} is not as it was exported: {' '.join(problems)}")
    bundle.environment()
    bundle.model()  # a student that its weights do not fit is not worth a training
    config = bundle.locate_data(dataset)
    if isinstance(pinned := bundle.metrics.get(DATA), dict):  # before a teacher is blamed
        sides = {split: pinned[split] for split in ("train", "test") if split in pinned}
        cure = "name their folder with --data-root or --dataset"
        check_pinned(bundle.path, sides, config, data_root, cure=cure)
    if method_of(config).needs_teacher:
        found = teacher_weights or _own_teacher(bundle)
        config = config.replace(teacher_weights=str(Path(found).absolute()))
    if config.student_sha256 is not None:
        found = student_weights or _own_start(bundle)
        config = config.replace(student_weights=str(Path(found).absolute()))
    return resolve(config, data_root=data_root)


def reproduce(
    bundle: Bundle,
    config: DistillConfig,
    out: Path,
    *,
    data_root: str | None = None,
    threads: int | None = None,
    tolerance: float | None = None,
    on_epoch: OnEpoch | None = None,
) -> Reproduction:
    """Train the run of a bundle again, under its seed and precision, and compare.

    Args:
        config: what `prepare` returned; out: folder of the run, in which an interrupted one
            continues; its weights are left there.
        threads: CPU threads, by default the recorded number, which equal bits need.
        tolerance: of test_top1, by default what chance explains: 2.8 standard deviations of
            the winner's seeds, half a point at least.
    """
    recorded = bundle.environment()
    with cpu_threads(threads or recorded["threads"]):
        train = functools.partial(distill, data_root=data_root, out=out, on_epoch=on_epoch)
        result = decide_determinism(config, train, wanted=recorded.get("deterministic", True))
        record = finish_run(single_run(config, out), result, data_root=data_root, test=True)
        elsewhere = _elsewhere(bundle, recorded)  # with the threads that the run used
    metrics = record.metrics
    stated = bundle.metrics["model"]
    first = (
        first_difference(bundle.history(), result.history)
        or first_tensor(load_file(bundle.path / WEIGHTS), load_file(out / WEIGHTS))
        or _first_of("the test split", select_metrics(stated, "test_"), metrics)
    )
    allowed = default_tolerance(bundle) if tolerance is None else tolerance
    close = abs(metrics["test_top1"] - stated["test_top1"]) <= allowed
    verdict = IDENTICAL if first is None else WITHIN if close else DIFFERENT
    return Reproduction(
        verdict=verdict,
        promised=promise(recorded, elsewhere),
        first=first,
        test_top1=metrics["test_top1"],
        stated=stated["test_top1"],
        tolerance=allowed,
        elsewhere=elsewhere,
        metrics=metrics,
    )


def promise(recorded: Mapping[str, Any], elsewhere: Sequence[str]) -> str:
    """The least that a second run must be here: bit-identical, or within-tolerance.

    Bits repeat on the same hardware with the same versions, revision, threads and workers: on a
    CPU always, on a GPU if the run was deterministic. Elsewhere sums are rounded in another order.

    Args:
        recorded: environment of the bundle; elsewhere: what of it is not so here.
    """
    repeats = recorded.get("deterministic", False) or not recorded.get("gpus")
    return IDENTICAL if repeats and not elsewhere else WITHIN


def default_tolerance(bundle: Bundle) -> float:
    """The difference in test_top1, a fraction, that two runs of one configuration may have."""
    deviation = bundle.metrics["test"].get("test_top1", {}).get("sd", 0.0)
    return max(LEAST_TOLERANCE, DEVIATIONS * float(deviation))


def first_difference(there: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> str | None:
    """The first epoch and metric in which two histories differ, in words; None if in none."""
    for old, new in zip(there, here, strict=False):
        found = _first_of(f"epoch {old.get('epoch')}", old, new)
        if found:
            return found
    if len(there) != len(here):
        return f"the number of epochs: {len(there)} there, {len(here)} here"
    return None


def _first_of(where: str, there: dict[str, Any], here: dict[str, Any]) -> str | None:
    for name, old in there.items():
        if name not in _NOT_COMPARED and (name not in here or here[name] != old):
            return f"{where}, {name}: {old} there, {here.get(name)} here"
    return None


def first_tensor(there: dict[str, Tensor], here: dict[str, Tensor]) -> str | None:
    """The first tensor in which two models differ, in words; None if in none."""
    for name, old in there.items():
        new = here.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            return f"tensor {name}: not of the same kind"
        if not torch.equal(old, new):
            gap = (old.double() - new.double()).abs().max()
            return f"tensor {name}: largest difference {float(gap):.2g}"
    return None


def _elsewhere(bundle: Bundle, recorded: dict[str, Any]) -> tuple[str, ...]:
    old, new = (compared(found) for found in (recorded, environment()))
    names = ("processor", *GPU_FACTS, "driver", "threads", "git_revision", "ekd_ray", "torch",
             "numpy")  # fmt: skip
    changed = [name for name in names if old.get(name) != new.get(name)]
    lines = [f"{name}: {old.get(name)} recorded, {new.get(name)} here" for name in changed]
    if new["git_dirty"] and not old.get("git_dirty"):
        lines.append("git_dirty: False recorded, True here")
    if bundle.metrics["workers"] > 1:
        lines.append(f"workers: {bundle.metrics['workers']} recorded, 1 here")
    return tuple(lines)


def own_data_root(bundle: Bundle) -> str | None:
    """The folder of the data sets of the study around the bundle; None without one."""
    with contextlib.suppress(UserError):
        return StudyReader.load(bundle.path.absolute().parent).config.data_root
    return None


def _own_teacher(bundle: Bundle) -> str:
    """The teacher's file in the study around the bundle, known by its hash."""
    inside = sorted((bundle.path.absolute().parent / "teacher").glob("*.safetensors"))
    what = f"the teacher of {bundle.path} ({bundle.config.teacher}"
    # A bundle has no paths of the machine that made it.
    facts = bundle.metrics.get("teacher")
    hint = "; study.yaml of the study that made the bundle names it (teacher_weights)"
    if isinstance(facts, dict) and facts.get("candidates"):
        hint = "; in the folder of the study that made the bundle it is teacher/teacher.safetensors"
    return _find_weights(bundle, "teacher", inside, what, hint)


def _own_start(bundle: Bundle) -> str:
    """The weights that the student has started from: those of the study, or of its library."""
    cached = cached_weights(bundle.config.student)
    what = f"what the student of {bundle.path} starts from ({bundle.config.student}"
    return _find_weights(bundle, "student", [cached] if cached else [], what)


def _find_weights(
    bundle: Bundle, side: str, candidates: list[Path], what: str, hint: str = ""
) -> str:
    """The first of the candidates, and of the file in the study's settings, with the hash; `hint`
    says where to look for it if none has it."""
    wanted = getattr(bundle.config, f"{side}_sha256")
    with contextlib.suppress(UserError):
        study = StudyReader.load(bundle.path.absolute().parent)
        candidates = [*candidates, Path(getattr(study.config.distill, f"{side}_weights") or "")]
    for path in candidates:
        if path.is_file() and sha256_file(path) == wanted:
            return str(path)
    raise UserError(
        f"{what}, SHA-256 {wanted}) is not beside it: give --{side}-weights FILE{hint}."
    )
