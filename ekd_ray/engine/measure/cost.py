"""The costs of a network: parameters, FLOPs, latency, and how fast this CPU computes it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Collection

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info
from ekd_ray.engine.precision import autocast, cpu_threads, pick_device
from ekd_ray.engine.resolve import student_size
from ekd_ray.models import build_model, is_of_library

_WARM_UP, _PASSES = 5, 30
BACKWARD = 3.0  # forward and backward pass, in forward passes
_PASS_FLOPS, _PASS_IMAGES = 7e8, (2, 64)  # of a measured pass: about so many, in these bounds
_MOST_FLOPS = 7e9  # of the smallest pass that is measured, because a plan is not to wait


def model_cost(name: str, num_classes: int, image_size: int) -> tuple[int, int]:
    """(parameters, forward FLOPs per image) of a model, a large one's without computing."""
    # Inside: it loads triton, which no other part of a run needs.
    from torch.utils.flop_counter import FlopCounterMode

    device = "meta" if is_of_library(name) else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        model = build_model(name, num_classes).eval()
        image = torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


@functools.cache
def latency_ms(name: str, num_classes: int, image_size: int, threads: int) -> float:
    """Median milliseconds of a forward pass of one image in float32 on this device.

    Measured once per process: with other trials beside it, it is what such a machine gives.

    Args:
        threads: CPU threads in use, which another measurement belongs to.
    """
    device = pick_device()
    model = build_model(name, num_classes).eval().to(device)
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(_WARM_UP + _PASSES):
            _wait(device)
            began = time.perf_counter()
            model(image)
            _wait(device)
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[_WARM_UP:])


@functools.cache
def core_rate(name: str, num_classes: int, image_size: int, precision: str) -> float | None:
    """FLOP/s at which one CPU core of this machine computes a model, measured over half a second.

    Of forward passes in training mode: the backward pass takes about as long for each of its FLOPs.
    None for a model of which two images take seconds, and for float16, which CPUs emulate.

    Args:
        precision: as `resolve_precision` gives it.
    """
    flops = model_cost(name, num_classes, image_size)[1]
    images = min(max(round(_PASS_FLOPS / flops), _PASS_IMAGES[0]), _PASS_IMAGES[1])
    if precision == "float16" or images * flops > _MOST_FLOPS:
        return None
    seconds: list[float] = []
    with torch.random.fork_rng(devices=[]), cpu_threads(1), torch.no_grad():
        model = build_model(name, num_classes)
        batch = torch.rand(images, 3, image_size, image_size)
        while len(seconds) < 3 or sum(seconds[1:]) < 0.5:
            began = time.perf_counter()
            with autocast(precision, torch.device("cpu")):
                model(batch)
            seconds.append(time.perf_counter() - began)
    # The first pass warms up; the least time is the one that other processes took least of.
    return images * flops / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def student_costs(
    config: DistillConfig, names: Collection[str], data_root: str | None = None
) -> dict[str, float]:
    """Those costs that `names` has: `parameters`, `flops` (forward, per image), `latency_ms`."""
    if not names:
        return {}
    classes = dataset_info(config.dataset, data_root=data_root).num_classes
    model = (config.student, classes, student_size(config, data_root))
    parameters, flops = model_cost(*model)
    found: dict[str, float] = {"parameters": parameters, "flops": flops}
    if "latency_ms" in names:
        found["latency_ms"] = latency_ms(*model, torch.get_num_threads())
    return {name: found[name] for name in names}
