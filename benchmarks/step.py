"""The training step: published manner and torchdistill against ours, cold and warm."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.measure import geometric_mean, ratio, spread
from benchmarks.peer import Torchdistill
from benchmarks.reference import (
    CE_WEIGHT,
    KD_WEIGHT,
    TEMPERATURE,
    Reference,
    random_teacher,
    training_pictures,
)
from ekd_ray.config import DistillConfig
from ekd_ray.data import ImageArrays, dataset_info, load_dataset, normalize
from ekd_ray.engine.distill import distill
from ekd_ray.engine.precision import autocast, pick_device, resolve_precision
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.models import build_model

PAIRS = ("resnet32x4-resnet8x4", "resnet56-resnet20", "wrn_40_2-wrn_16_2", "vgg13-vgg8")
DATASET, BATCH = "synthetic", 64  # generated 32 x 32 images: nothing to download

Epoch = Callable[[int], float]
Progress = Callable[[str], None]


class Stepper(Protocol):
    """A loop of somebody else: its batches, and a step on one of them."""

    def batches(self) -> Iterator[Any]: ...

    def step(self, *batch: Any) -> None: ...


def outside(stepper: Stepper, steps: int) -> Epoch:
    """Seconds per step of a loop that loads its batches by worker processes."""
    batches = stepper.batches()

    def epoch(_: int) -> float:
        stepper.step(*next(batches))
        started = time.perf_counter()
        for _ in range(steps):
            stepper.step(*next(batches))
        return (time.perf_counter() - started) / steps

    return epoch


def ours(
    pair: tuple[str, str],
    weights: Path,
    steps: int,
    threads: int,
    *,
    compiled: bool = False,
    method: str = "kd",
) -> Epoch:
    """Seconds per step of `distill`, by its own clock: a run of two epochs, of which the last.

    A seed draws its own views: its first run finds the teacher's table empty, a repetition of
    it finds everything.
    """
    info = dataset_info(DATASET)
    published = {"temperature": TEMPERATURE, "ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT}

    def epoch(seed: int) -> float:
        config = DistillConfig(
            dataset=DATASET,
            teacher=pair[0],
            student=pair[1],
            teacher_weights=str(weights),
            teacher_cache="on",
            batch_size=BATCH,
            train_subset=max(steps * BATCH, info.num_classes),
            validation_fraction=0.0,
            epochs=2,
            lr_warmup=0,
            compile="on" if compiled else "off",
            seed=seed,
        )
        config = with_method(config, method, **(published if method == "kd" else {}))
        return float(distill(config, threads=threads).history[-1]["seconds"]) / steps

    return epoch


def limit(student: nn.Module, steps: int, batch: int = BATCH) -> Epoch:
    """Seconds per step of the student alone, on inputs that are ready: forward, backward, SGD."""
    arrays, info = load_dataset(DATASET, "train"), dataset_info(DATASET)
    assert isinstance(arrays, ImageArrays)
    device = pick_device()
    precision = resolve_precision("auto", device)
    student = student.to(device).to(memory_format=torch.channels_last).train()
    images = torch.from_numpy(arrays.images[:batch].copy()).to(device)
    inputs = normalize(images, info.mean, info.std, channels_last=True)
    target = torch.from_numpy(arrays.labels[:batch].copy()).to(device)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def step() -> None:
        with autocast(precision, device):
            logits = student(inputs)
        loss = nn.functional.cross_entropy(logits.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def epoch(_: int) -> float:
        step()
        wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        return (time.perf_counter() - started) / steps

    return epoch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_pair(
    pair: str,
    folder: Path,
    *,
    steps: int,
    rounds: int,
    threads: int,
    peer: bool,
    compiled: bool,
    note: Progress,
) -> dict[str, list[float]]:
    """Seconds per step of every variant, one figure a round; the variants take turns.

    Args:
        peer, compiled: with torchdistill's step; with our own under `compile=on`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    names = tuple(pair.split("-"))
    info = dataset_info(DATASET)
    weights = folder / f"{pair}.safetensors"
    teacher = random_teacher(names[0], DATASET, weights)
    student = build_model(names[1], info.num_classes)
    pictures = training_pictures(DATASET, info.num_train, None)
    made = {
        "reference": outside(
            Reference(copy.deepcopy(student), teacher, pictures, batch_size=BATCH), steps
        ),
        "cold": ours((names[0], names[1]), weights, steps, threads),
        "limit": limit(copy.deepcopy(student), steps),
    }
    if peer:
        box = Torchdistill(copy.deepcopy(student), teacher, pictures, batch_size=BATCH)
        made["torchdistill"] = outside(box, steps)
    made["warm"] = made["cold"]  # the same run again
    if compiled:
        made["compiled"] = ours((names[0], names[1]), weights, steps, threads, compiled=True)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for index in range(rounds + 1):
        for name, epoch in made.items():
            found = epoch(index)
            if index:  # the first round fills allocators and loads what is loaded once
                seconds[name].append(found)
        if index:
            shown = "  ".join(f"{name} {1e3 * v[-1]:.0f}" for name, v in seconds.items())
            note(f"{pair} round {index}/{rounds}: ms a step: {shown}")
    return seconds


def measure_methods(
    pair: str, folder: Path, *, steps: int, rounds: int, threads: int, note: Progress
) -> tuple[dict[str, Any], dict[str, float]]:
    """A step under every method with a teacher of one view, its table full, and under KD.

    The methods take turns; returns the spreads of the milliseconds and of the ratios to KD of the
    same round by method, and the medians of the ratios.
    """
    teacher, student = pair.split("-")
    weights = folder / f"{pair}-methods.safetensors"
    random_teacher(teacher, DATASET, weights)
    names = [name for name, m in METHODS.items() if m.needs_teacher and not m.strong_view]
    made = {m: ours((teacher, student), weights, steps, threads, method=m) for m in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        made["kd"](index)  # fills the table
        for name, epoch in made.items():
            found = epoch(index)
            if index:  # as in `measure_pair`
                seconds[name].append(found)
        note(f"methods round {index}/{rounds}")
    details = {
        name: {"ms": spread([1e3 * v for v in s]), "over_kd": ratio(s, seconds["kd"])}
        for name, s in seconds.items()
    }
    return details, {f"step_over_kd/{name}": d["over_kd"]["median"] for name, d in details.items()}


def summary(found: dict[str, dict[str, list[float]]]) -> tuple[dict[str, Any], dict[str, float]]:
    """(details by pair, flat ratios) of `measure_pair`'s results by pair."""
    details: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    compared = {
        "reference_over_warm": ("reference", "warm"),
        "reference_over_cold": ("reference", "cold"),
        "warm_over_limit": ("warm", "limit"),
        "torchdistill_over_warm": ("torchdistill", "warm"),
        "reference_over_compiled": ("reference", "compiled"),
        "warm_over_compiled": ("warm", "compiled"),
    }
    for pair, seconds in found.items():
        details[pair] = {name: spread([1e3 * v for v in s]) for name, s in seconds.items()}
        for name, (above, below) in compared.items():
            if above in seconds and below in seconds:
                spreads = ratio(seconds[above], seconds[below])
                details[pair][name] = spreads
                ratios[f"{name}/{pair}"] = spreads["median"]
    for name in compared:
        medians = [value for key, value in ratios.items() if key.startswith(f"{name}/")]
        if medians:
            ratios[f"{name}/geomean"] = geometric_mean(medians)
    return details, ratios
