"""Say what there is to compute with, and whether it works; the table can go into a bug report.

It holds no values of environment variables, no names of users or hosts, and no addresses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ekd_ray.cli import flags
from ekd_ray.cli.output import print_json, print_text, set_up_ray, show_passing
from ekd_ray.config import DistillConfig
from ekd_ray.config.phrases import several, size_text
from ekd_ray.files import default_cache_dir

EXAMPLES = ("ekd-ray doctor", "ekd-ray doctor --address auto")
FIRST = ()
EXIT_UNSOUND = 1
# 10 classes in a batch, so that the stratified subset has its validation images.
STEP = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", epochs=1, train_subset=100,
    batch_size=90, precision="auto",
)  # fmt: skip
_OWN_VARIABLES = re.compile(r"(EKD|RAY|CUDA|TORCH|OMP|MKL|NCCL|OPENBLAS|XDG_CACHE)_")
_SHORTEST_VALUE = 8  # of an environment variable, to be taken for it where it occurs


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: a topic, what was found, and whether that is as it should be."""

    topic: str
    found: str
    ok: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_common(parser, "--address", "--json")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if something does not work."""
    set_up_ray(args.address)
    findings = []
    for topic, check in CHECKS.items():
        if not args.json:
            show_passing(f"{topic} ...")
        findings += _examine(topic, check)
    if not args.json:
        show_passing("")
    wrong = [finding.topic for finding in findings if not finding.ok]
    if args.json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            print_text(f"{'' if finding.ok else '!!':2s} {finding.topic:{width}s}  {finding.found}")
        print_text(f"does not work: {', '.join(wrong)}" if wrong else "all of it works")
    return EXIT_UNSOUND if wrong else 0


def _examine(topic: str, check: Callable[[], Iterable[str]]) -> list[Finding]:
    """The findings of a check; its error is a finding too."""
    try:
        return [Finding(topic=topic, found=hide_secrets(text)) for text in check()]
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Finding(topic=topic, found=hide_secrets(reason), ok=False)]


def hide_secrets(text: str) -> str:
    """A text without what tells whose machine it is of.

    `~` stands for homes, `$NAME` for the value of an environment variable, USER, HOST and IP for
    these.
    """
    homes = {str(Path.home()), os.path.realpath(Path.home())} - {"/"}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    values = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_VALUE and name != "OLDPWD"  # by chance the present one
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f"${values[value]}")
    text = re.sub(r"/(?:home|Users)/[^/\s]+", "~", text)
    with contextlib.suppress(Exception):  # a user without a name
        text = re.sub(rf"(?<=/){re.escape(getpass.getuser())}(?![\w.-])", "USER", text)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text)
    return re.sub(r"\b(?!127\.0\.0\.1\b)\d{1,3}(?:\.\d{1,3}){3}\b", "IP", text)


def _versions() -> Iterator[str]:
    from ekd_ray.engine.environment import environment  # loads torch

    found = environment()
    changed = ", changed" if found["git_dirty"] else ""
    revision = f" (git {found['git_revision'][:10]}{changed})" if found["git_revision"] else ""
    yield f"ekd_ray {found['packages'].pop('ekd_ray')}{revision}"
    yield f"python {found['python']} on {platform.platform()}"
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    for start in range(0, len(packages), 4):
        yield ", ".join(packages[start : start + 4])
    missing = [name for name, version in found["packages"].items() if not version]
    if missing:
        yield f"not installed: {', '.join(missing)}"


def _variables() -> Iterator[str]:
    names = sorted(name for name in os.environ if _OWN_VARIABLES.match(name))
    yield f"set: {', '.join(names)}" if names else "none of EKD_*, RAY_*, CUDA_*, OMP_* is set"


def _processor() -> Iterator[str]:
    from ekd_ray.engine.control_groups import cpu_quota
    from ekd_ray.engine.environment import environment
    from ekd_ray.engine.precision import local_cpus

    found = environment()
    cpus = f"{local_cpus()} of {found['cores']} CPUs"
    yield f"{found['processor']}; {cpus}, {found['threads']} threads"
    if (quota := cpu_quota()) < found["cores"]:
        yield f"this container has the time of {quota:.1f} CPUs"


def _gpus() -> Iterator[str]:
    import torch

    from ekd_ray.engine.environment import environment

    found = environment()
    for index, name in enumerate(found["gpus"]):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        yield f"{name}, {size_text(properties.total_memory)}, compute capability {capability}"
    if found["gpus"]:
        yield f"CUDA {found['cuda']}, cuDNN {found['cudnn']}, driver {found['driver']}"
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        yield f"none ({built or 'torch is built without CUDA'})"


def _precision() -> Iterator[str]:
    from ekd_ray.engine.precision import describe_slowness, pick_device, resolve_precision

    device = pick_device()
    taken = resolve_precision("auto", device)
    slow = describe_slowness(taken, on_gpu=device.type == "cuda")
    yield f"auto is {taken} on the {device.type}" + (f"; {slow}" if slow else "")


def _memory() -> Iterator[str]:
    from ekd_ray.engine.control_groups import memory_limit

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            available = f", {size_text(1024 * int(found[1]))} available"
    yield f"{size_text(total)}{available}"
    if (limit := memory_limit()) < total:
        yield f"this container may use {size_text(limit)}"


def _shared_memory() -> Iterator[str]:
    if Path("/dev/shm").is_dir():
        yield f"/dev/shm: {_room(Path('/dev/shm'))}"
    else:
        yield "no /dev/shm"


def _disks() -> Iterator[str]:
    for what, folder in (("cache", default_cache_dir()), ("this folder", Path.cwd()),
                         ("temporary files", Path(tempfile.gettempdir()))):  # fmt: skip
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not os.access(there, os.W_OK):
            raise PermissionError(f"{what}: {folder} cannot be written to")
        yield f"{what}: {folder}, {_room(there)}"


def _room(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{size_text(usage.free)} of {size_text(usage.total)} free"


def _teacher_tables() -> Iterator[str]:
    from ekd_ray.engine.teacher.table import list_tables

    tables = list(list_tables())
    size = sum(table.bytes_used for table in tables)
    yield f"{len(tables)} in the cache, {size_text(size)} on disk"


def _ray() -> Iterator[str]:
    from ekd_ray.scale.cluster import connected, live_nodes, on_cluster

    started = time.monotonic()
    with connected():
        seconds, nodes = time.monotonic() - started, live_nodes().values()
    done = "joined" if on_cluster() else "started"
    cpus, gpus = (sum(amounts) for amounts in zip(*nodes, strict=True))
    yield f"{done} in {seconds:.1f} s: {several(len(nodes), 'node')}, {cpus:g} CPUs, {gpus:g} GPUs"


def _step() -> Iterator[str]:
    from ekd_ray.engine.distill import distill

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = distill(STEP, out=Path(folder))
    seconds, loss = time.monotonic() - started, result.metrics["train_loss"]
    yield (
        f"{STEP.student} on generated pictures: a step, a validation and a checkpoint in "
        f"{seconds:.1f} s in {result.precision}, loss {loss:.3f}"
    )


CHECKS: dict[str, Callable[[], Iterable[str]]] = {
    "versions": _versions,
    "environment": _variables,
    "CPU": _processor,
    "GPU": _gpus,
    "precision": _precision,
    "memory": _memory,
    "shared memory": _shared_memory,
    "disk": _disks,
    "teacher tables": _teacher_tables,
    "training": _step,
    "Ray": _ray,
}
