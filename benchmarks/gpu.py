"""Whether the GPU paths do what is said of them, and what a step costs there: `make gpu`.

Every check is a function of a `Site` that returns what it found, or raises: one that fails stops
no other. Nothing is downloaded: images are generated and teachers have random weights. Where there
is no GPU nothing is checked. Tests run the same functions on a CPU, with tiny sizes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.measure import geometric_mean, machine, ratio, spread
from benchmarks.reference import Reference, random_teacher, training_pictures
from benchmarks.step import DATASET, PAIRS, Progress, limit, outside, wait
from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.distill import TrainedStudent, distill, start_run, train_epoch
from ekd_ray.engine.gpu_share import return_memory, share_of_gpu
from ekd_ray.engine.precision import local_cpus, pick_device
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.fill import fill_tables
from ekd_ray.losses.method_checks import draw_cosines
from ekd_ray.losses.methods import METHODS, with_method
from ekd_ray.losses.objective import Objective
from ekd_ray.models import build_model
from ekd_ray.results.records import failure_reason, single_run
from ekd_ray.scale.worker import TrainOptions, train_run

SECONDS = 6 * 60.0  # of the whole; what is not measured by then is left out
CPU = torch.device("cpu")
LOADER_WORKERS = 8  # of the published code for CIFAR
COMPILED = ("ekd", "mlkd+ekd", "ctkd")  # ramps, two views, a learned temperature
# Graphs and eager, one worker and several: float32, rounded in other orders.
RTOL, ATOL = 1e-3, 3e-4


class LeftOut(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the checks are made, and how large they are.

    Attributes:
        folder: for teachers and runs.
        workers: processes that train one student together, each on a GPU of its own.
        settings: of the runs that are compared.
        pairs, batches, rounds, most_steps: what is timed; a round is an epoch of `most_steps`.
        deadline: of `time.monotonic`, after which nothing is begun.
    """

    device: torch.device
    folder: Path
    workers: int
    settings: dict[str, Any]
    pairs: tuple[str, ...] = PAIRS
    batches: tuple[int, ...] = (64, 256)
    rounds: int = 7
    most_steps: int = 30
    deadline: float = float("inf")

    def config(self, method: str, **values: Any) -> DistillConfig:
        """A run of a method, in float32 and not compiled unless `values` say otherwise."""
        plain = {"dataset": DATASET, "precision": "float32", "compile": "off"}
        given = {**plain, **self.settings, **values}
        if METHODS[method].needs_teacher:
            given |= {"teacher_weights": str(self.teacher(given["teacher"])), "teacher_cache": "on"}
        else:
            del given["teacher"]
        return with_method(DistillConfig(**given), method)

    def teacher(self, name: str) -> Path:
        """The checkpoint of a teacher that has learned nothing."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            random_teacher(name, DATASET, path)
        return path


def gpu_site(folder: Path) -> Site:
    """The one of this machine's GPUs."""
    return Site(
        device=pick_device(),
        folder=folder,
        workers=torch.cuda.device_count(),
        settings={
            "teacher": "resnet20", "student": "resnet8", "epochs": 2, "batch_size": 64,
            "train_subset": 640, "validation_fraction": 0.2, "view_pool": 4, "lr": 0.01,
        },
        deadline=time.monotonic() + SECONDS,
    )  # fmt: skip


# ---- checks


def check_losses(site: Site) -> str:
    """Every method's loss and gradient in float32 there, and in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = 3 * torch.randn(4, 64, 100, generator=generator)
    target = torch.randint(100, (64,), generator=generator)
    worst = {"loss": 0.0, "gradient": 0.0}
    for name in METHODS:
        learned = {"learn_log_prior": True} if METHODS[name].evidential else {}
        objective = Objective(with_method(DistillConfig(), name, **learned))
        loss, gradient = _loss_and_gradient(objective.to(site.device), drawn, target, site.device)
        exact, slope = _loss_and_gradient(objective.double().cpu(), drawn.double(), target, CPU)
        for what, found, known in (("loss", loss, exact), ("gradient", gradient, slope)):
            error = float((found.double().cpu() - known).norm() / known.norm())
            assert error < 1e-3, f"{name}: the {what} is off by {error:.1e} of it"
            worst[what] = max(worst[what], error)
    return f"{len(METHODS)} methods: " + ", ".join(f"{k} to {v:.0e}" for k, v in worst.items())


def _loss_and_gradient(
    objective: Objective, drawn: Tensor, target: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The total, and its gradient to the student's logits and to what the objective learns, in
    the dtype of `drawn` [4, B, C]."""
    logits = drawn.to(device).requires_grad_()
    student, teacher, student_strong, teacher_strong = logits
    given = {}
    if objective.method.strong_view:
        given = {"student_strong": student_strong, "teacher_strong": teacher_strong}
    if objective.method.class_cosines:
        given["class_cosines"] = draw_cosines(drawn.shape[2])
    asked = teacher if objective.method.needs_teacher else None
    loss, _ = objective(student, asked, target.to(device), 1, **given)
    slopes = torch.autograd.grad(loss, [logits, *objective.parameters()])
    return loss.detach(), torch.cat([slope.flatten() for slope in slopes])


def check_workers(site: Site) -> str:
    """The weights that one process trains, and several."""
    if site.workers < 2:
        raise LeftOut("one GPU")
    config = site.config("ekd", learn_log_prior=True, batch_size=30)
    expected = distill(config).model.state_dict()
    start_processes(
        _work, args=(site.workers, config.to_dict(), str(site.folder)), nprocs=site.workers,
        start_method="spawn",
    )  # fmt: skip
    found = torch.load(site.folder / "weights.pt", weights_only=True)
    return f"{site.workers} workers: weights within {_assert_close(found, expected):.0e}"


def _work(rank: int, world: int, settings: dict[str, Any], folder: str) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
        world_size=world,
    )  # fmt: skip
    try:
        result = distill(DistillConfig.from_dict(settings), threads=1)
        if rank == 0:
            torch.save(_weights(result), f"{folder}/weights.pt")
    finally:
        dist.destroy_process_group()


def _weights(result: TrainedStudent) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in result.model.state_dict().items()}


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two networks' weights, which must be close."""
    largest = 0.0
    for name, value in expected.items():
        one, other = found[name].cpu().float(), value.cpu().float()
        say = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL, msg=say)
        largest = max(largest, float((one - other).abs().max()))
    return largest


def check_graphs(site: Site) -> str:
    """The weights that eager steps train, and compiled ones."""
    largest = 0.0
    for method in COMPILED:
        eager = distill(site.config(method))
        compiled = distill(site.config(method, compile="on"))
        assert compiled.compiled, f"{method} has fallen back to eager steps"
        largest = max(largest, _assert_close(_weights(compiled), _weights(eager)))
    return f"{', '.join(COMPILED)}: weights within {largest:.0e}"


def check_deterministic(site: Site) -> str:
    """Two runs under `deterministic`, bit for bit."""
    for method in ("ekd", "mlkd+ekd"):
        config = site.config(method, deterministic=True, precision="auto")
        one, other = (distill(config) for _ in range(2))
        weights = _weights(other)
        differ = [k for k, v in _weights(one).items() if not torch.equal(v, weights[k])]
        assert not differ, f"{method}: {len(differ)} tensors differ, first {differ[0]}"
        rows = [[{**row, "seconds": 0} for row in result.history] for result in (one, other)]
        assert rows[0] == rows[1], f"{method}: the histories differ"
    return "2 methods: weights and histories are equal"


def check_float16(site: Site) -> str:
    """Training under float16 with a scaled loss, and in float32."""
    expected, found = (
        distill(site.config("ekd", precision=precision)).metrics["train_loss"]
        for precision in ("float32", "float16")
    )
    assert abs(found - expected) < 0.05 * abs(expected), f"loss {found:.4f}, not {expected:.4f}"
    return f"loss {found:.4f}, in float32 {expected:.4f}"


def check_fractions(site: Site) -> str:
    """Memory beyond a process's fraction of the GPU is refused to it, and what is within is not."""
    return apart(_take_fraction, 0.25)


def _take_fraction(share: float) -> str:
    with share_of_gpu(share):
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        _allocate(0.4 * share * total)
        try:
            _allocate(share * total)
        except torch.OutOfMemoryError:
            return f"of {total / 2**30:.0f} GiB {share:g} and no more"
    raise AssertionError(f"a process took {share * total:.0f} bytes, its fraction, and CUDA's part")


def _allocate(size: float) -> None:
    torch.empty(int(size), dtype=torch.uint8, device="cuda")


def check_memory(site: Site) -> str:
    """A run whose memory is refused says so and what helps; its process can train again."""
    config = site.config("kd", batch_size=512, epochs=1)
    small = site.config("kd", batch_size=16, epochs=1)
    return apart(_run_out, config.to_dict(), small.to_dict(), str(site.folder / "refused"))


def _run_out(settings: dict[str, Any], small: dict[str, Any], folder: str) -> str:
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(2**27 / total)
    run = single_run(DistillConfig.from_dict(settings), Path(folder))
    Path(folder).mkdir()
    try:
        result = train_run(run, lambda row: None, options=TrainOptions(data_root=None, threads=1))
    except MemoryError:
        result = None
    assert result is None, "128 MiB were enough"
    reason = failure_reason(Path(folder))
    assert "batch_size" in reason, reason
    torch.cuda.set_per_process_memory_fraction(1.0)
    return_memory()
    distill(DistillConfig.from_dict(small), threads=1)
    return reason.partition(" (")[0]


def check_waits(site: Site) -> str:
    """An epoch of every method, its table full: the host waits for nothing in it."""
    for method in METHODS:
        config = resolve(site.config(method, precision="auto"))
        if METHODS[method].needs_teacher:
            fill_tables(config, data_root=None, seeds=[config.seed])
        with arithmetic(deterministic=False):
            run = start_run(config, None)
            train_epoch(run)  # what is cached on the device is there in the second
            run.end_epoch({})
            torch.cuda.set_sync_debug_mode("error")
            try:
                train_epoch(run)
            except RuntimeError as error:
                raise AssertionError(f"{method}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return f"{len(METHODS)} methods"


CHECKS: dict[str, Callable[[Site], str]] = {
    "losses against float64": check_losses,
    "sync-free epochs": check_waits,
    "compiled against eager": check_graphs,
    "deterministic twice": check_deterministic,
    "float16 against float32": check_float16,
    "one worker against all": check_workers,
    "memory of a fraction": check_fractions,
    "out of memory": check_memory,
}


def apart(function: Callable[..., str], *arguments: Any) -> str:
    """The function's result from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- times of a step


def time_pair(site: Site, pair: str, batch: int) -> Iterator[tuple[str, list[float]]]:
    """Yield (variant, seconds a step by rounds): the published manner, with the table filled,
    the student alone."""
    teacher, student = pair.split("-")
    info = dataset_info(DATASET)
    steps = min(site.most_steps, info.num_train // batch)
    torch.manual_seed(0)
    model = build_model(student, info.num_classes)
    pictures = training_pictures(DATASET, info.num_train, None)
    published = Reference(
        copy.deepcopy(model), build_model(teacher, info.num_classes), pictures, batch_size=batch,
        device=site.device, loader_workers=min(LOADER_WORKERS, local_cpus()),
    )  # fmt: skip
    makers = {
        "published": lambda: outside(published, steps),
        "alone": lambda: limit(copy.deepcopy(model), steps, batch),
    }
    for name, make in makers.items():
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as the published code
            epoch = make()
            found = [epoch(index) for index in range(site.rounds + 1)]
        yield name, found[1:]
    yield "warm", time_epochs(site, pair, batch, compile="off")


def time_epochs(site: Site, pair: str, batch: int, **values: Any) -> list[float]:
    """Seconds a step of our own epochs, the teacher's table filled, the first left out."""
    teacher, student = pair.split("-")
    steps = min(site.most_steps, dataset_info(DATASET).num_train // batch)
    config = resolve(
        site.config(
            "kd", teacher=teacher, student=student, precision="auto", batch_size=batch,
            train_subset=steps * batch, validation_fraction=0.0, epochs=site.rounds + 1, **values,
        )
    )  # fmt: skip
    fill_tables(config, data_root=None, seeds=[config.seed])
    found = []
    with arithmetic(deterministic=False):
        run = start_run(config, None)
        for _ in range(config.epochs):
            wait(site.device)
            began = time.perf_counter()
            train_epoch(run)
            wait(site.device)
            found.append((time.perf_counter() - began) / steps)
            run.end_epoch({})
    if values["compile"] == "on":
        assert run.compiled, "it has fallen back to eager steps"
    return found[1:]


RATIOS = {
    "published_over_warm": ("published", "warm"),
    "published_over_compiled": ("published", "compiled"),
    "warm_over_alone": ("warm", "alone"),
    "warm_over_compiled": ("warm", "compiled"),
}


# ---- all of it


def run_checks(site: Site, note: Progress) -> dict[str, Any]:
    """`checks` (name, state, seconds, found), `steps` and `ratios` of a site.

    The checks come first, then all that needs no compilation, then that, as far as time allows.
    """
    times: dict[str, dict[str, list[float]]] = {}
    jobs = {name: functools.partial(check, site) for name, check in CHECKS.items()}
    for compiled in (False, True):
        for batch in site.batches:
            for pair in site.pairs:
                case = f"{pair}, batch {batch}"
                jobs[f"{'compiled ' * compiled}steps of {case}"] = functools.partial(
                    _time, site, pair, batch, compiled, times.setdefault(case, {})
                )
    checks = []
    for name, job in jobs.items():
        checks.append(_attempt(site, name, job))
        note(f"{checks[-1]['state']:8s} {name}: {checks[-1]['found']}")
    steps, ratios = summary(times)
    states = [entry["state"] for entry in checks]
    return {
        "passed": states.count("passed"), "failed": states.count("failed"), "checks": checks,
        "steps": steps, "ratios": ratios,
    }  # fmt: skip


def _time(site: Site, pair: str, batch: int, compiled: bool, times: dict[str, list[float]]) -> str:
    """Add the variants of a pair's step to `times`; returns their fastest rounds."""
    if compiled:
        found = {"compiled": time_epochs(site, pair, batch, compile="on")}
    else:
        found = dict(time_pair(site, pair, batch))
    times.update(found)
    return ", ".join(f"{name} {1e3 * min(v):.2f} ms" for name, v in found.items())


def _attempt(site: Site, name: str, check: Callable[[], str]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        if began > site.deadline:
            raise LeftOut(f"{SECONDS:g} s were over")
        state, found = "passed", check()
    except LeftOut as reason:
        state, found = "left out", str(reason)
    except Exception as error:  # whatever it is, the others go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:400] or type(error).__name__
        state, found = "failed", f"{text} ({Path(place.filename).name}:{place.lineno})"
    with contextlib.suppress(RuntimeError):  # of a GPU that an error has left unusable
        return_memory()
    return {"name": name, "state": state, "seconds": time.monotonic() - began, "found": found}


def summary(
    times: dict[str, dict[str, list[float]]],
) -> tuple[dict[str, Any], dict[str, float]]:
    """(spreads of milliseconds a step and of ratios by case, medians of the ratios)."""
    details: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for case, seconds in times.items():
        details[case] = {name: spread([1e3 * v for v in s]) for name, s in seconds.items()}
        for name, (above, below) in RATIOS.items():
            if above in seconds and below in seconds:
                details[case][name] = ratio(seconds[above], seconds[below])
                ratios[f"{name}/{case}"] = details[case][name]["median"]
    for name in RATIOS:
        if found := [value for key, value in ratios.items() if key.startswith(f"{name}/")]:
            ratios[f"{name}/geomean"] = geometric_mean(found)
    return details, ratios


def print_table(result: dict[str, Any], console: Console) -> None:
    """Checks, and milliseconds and ratios of the steps with their quartiles."""
    table = Table("check", "state", "s", "found", box=None)
    for entry in result["checks"]:
        table.add_row(entry["name"], entry["state"], f"{entry['seconds']:.0f}", entry["found"])
    if result["checks"]:
        console.print(table, markup=False)
    figures = Table("steps", "", "n", "median", "quartiles", box=None)
    for case, found in result["steps"].items():
        for name, s in found.items():
            unit = "" if name in RATIOS else " (ms)"
            row = (f"{s['n']}", f"{s['median']:.3g}", f"{s['low']:.3g} to {s['high']:.3g}")
            figures.add_row(case, f"{name}{unit}", *row)
    if result["steps"]:
        console.print(figures, markup=False)
    console.print(f"{result['passed']} passed, {result['failed']} failed", markup=False)


def measure(folder: Path, note: Progress) -> dict[str, Any]:
    """The findings of `run_checks` on this machine's GPU; without one, nothing is checked."""
    if not torch.cuda.is_available():
        note("there is no GPU here: nothing is checked")
        found = {"passed": 0, "failed": 0, "checks": [], "steps": {}, "ratios": {}}
    else:
        found = run_checks(gpu_site(folder), note)
    return {"machine": machine(torch.get_num_threads()), **found}
