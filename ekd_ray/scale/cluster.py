"""The Ray that runs the trials: joining or starting it, and what its nodes have room for."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import several, size_text
from ekd_ray.config.study_config import LEAST_SHARE, Gpus
from ekd_ray.engine.control_groups import memory_limit
from ekd_ray.engine.precision import local_cpus as local_cpus
from ekd_ray.errors import SAME_COMMAND, UserError, continuing_command, end_process
from ekd_ray.scale.assumed_nodes import assumed_nodes
from ekd_ray.scale.ray_folder import discard_folder, private_folder
from ekd_ray.scale.ray_private import (
    dead_vital_processes,
    kill_own_ray,
    loopback_only,
    notices_on_stderr,
)
from ekd_ray.scale.session_end import ended_with_driver

# Tune's own tables and per-trial loggers are switched off: a study has its own.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its snapshots are never read: they hold every trial, and writing them halts the search.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    # A trial that fails in its first epoch, or is resumed at its end, reports no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A trial's traceback is for `failure.log`: its user reads the reason.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Activations come and go by megabytes: in huge pages a step on a CPU takes a tenth less.
    # Read by a process at its start: only those that a Ray of our own starts have it from here.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

ADDRESS = "RAY_ADDRESS"
# What a Ray of our own and its driver take of memory, and what a process of a trial does with a
# small network (docs/reliability.md has the figures).
RAY_BYTES, WORKER_BYTES = 5 * 2**28, 2**29
LEAST_FILES = 4096  # that a process of Ray may have open
WATCH_SECONDS = 1.0  # between two looks at the processes of a Ray of our own
EXIT_WITHOUT_RAY = 1
REACH_SECONDS = 10.0  # until an address counts as unreachable
ANSWER_SECONDS = 60.0  # for a node to say whether it sees a file
_DEFAULT_PORT = 6379
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
# CPUs and GPUs of one node.
Node = tuple[float, float]


def on_cluster() -> bool:
    """Whether trials run on a cluster that is there already, named by RAY_ADDRESS."""
    return assumed_nodes() is None and os.environ.get(ADDRESS, "local") not in ("", "local")


@contextlib.contextmanager
def connected(*configs: StudyConfig, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Ray for the duration: the cluster named by RAY_ADDRESS, or a local one of our own.

    A connection that is there already is used and left open. Every study must fit.

    Args:
        say: told what is waited for, before it is.

    Raises:
        UserError: no cluster at the address, or a study that does not fit.
    """
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ |= added
    try:
        import ray

        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                own = not on_cluster()
                say("starting Ray ..." if own else f"joining Ray at {os.environ[ADDRESS]} ...")
                folder = stack.enter_context(private_folder()) if own else None
                if folder:
                    stack.enter_context(ended_with_driver(folder))
                    stack.enter_context(_token_kept(folder))
                stack.enter_context(_ray_started(folder))
            for config in configs:
                check_fits(config)
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _token_kept(folder: Path) -> Iterator[None]:
    """A place for the token of a Ray of our own, where Ray's (`~/.ray`) cannot be written."""
    given = {_TOKEN_PATH, "RAY_AUTH_TOKEN"} & os.environ.keys()
    try:
        (Path.home() / ".ray").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody knows the home
        if not given:
            file = folder.parent / "auth_token"  # Ray makes its own folder, and this one is private
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(16))
            os.environ[_TOKEN_PATH] = str(file)
    try:
        yield
    finally:
        if not given:
            os.environ.pop(_TOKEN_PATH, None)


@contextlib.contextmanager
def _ray_started(folder: Path | None) -> Iterator[None]:
    """Ray for the duration; `folder` is for the files of one of our own, None on a cluster."""
    import ray

    check_address()
    if not on_cluster():
        _allow_open_files()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not on_cluster():
        # By itself Ray would join whatever else was last started on this machine.
        # It may also see GPUs that torch, and so a trial, cannot use.
        ((cpus, gpus),) = local_nodes()
        options |= {"address": "local", "num_cpus": cpus, "num_gpus": gpus}
        options["_temp_dir"] = str(folder)
        # Without the dashboard, placement groups of stopped nested trials are never freed.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.nullcontext() if on_cluster() else loopback_only():
            ray.init(**options)
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None  # Ray's handler, there already while Ray starts
    except Exception as error:
        if type(error) is Exception:  # its raylet or its dashboard was not there in time
            raise UserError(
                "Ray did not start in time: this machine is too busy, or short of memory; when it "
                f"is not, run {continuing_command() or 'the same command'} again, and if that does "
                "not help, with --keep-ray-logs."
            ) from error
        if isinstance(error, ValueError) and not on_cluster():  # of its store of objects
            raise UserError(
                f"Ray does not start here ({str(error).strip().splitlines()[0].rstrip('.')}): this "
                f"machine, or container, of {size_text(memory_limit())} is short of memory; free "
                "some, or give it more."
            ) from error
        kinds = (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError)
        if not (on_cluster() and isinstance(error, kinds)):
            raise
        raise _unreachable(str(error) or type(error).__name__) from error
    # Ray's own handler prints native traces of a launcher that is asked to end.
    if callable(terminated) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)
    with notices_on_stderr():
        try:
            with contextlib.nullcontext() if on_cluster() else _watch_ray():
                yield
        finally:
            ray.shutdown()


def _allow_open_files() -> None:
    """Raise the limit of open files to what Ray's processes, which inherit it, need.

    Raises:
        UserError: the hard limit is lower: Ray would hang, or its workers die, without saying why.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < LEAST_FILES:
        raise UserError(
            f"a process may open {hard} files here, and Ray's need >= {LEAST_FILES}: raise the "
            f"limit (ulimit -Hn {LEAST_FILES}, or --ulimit nofile={LEAST_FILES} of a container)."
        )
    if soft != unlimited and soft < LEAST_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (LEAST_FILES, hard))


@contextlib.contextmanager
def _watch_ray() -> Iterator[None]:
    """End this process soon after its own Ray: without its raylet or GCS, Tune would wait for
    ever, or Ray would end this process after a minute and without a word."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            end_without_ray()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def end_without_ray() -> None:
    """End this process, which can do nothing more, if a vital process of its own Ray has died.

    As after a SIGKILL, nothing that was finished is lost. Ray's other processes, which would
    go on for a minute, end first. What fails meanwhile says nothing of a trial: it must not be
    recorded.
    """
    if on_cluster():
        return
    dead = dead_vital_processes()
    if dead:
        with contextlib.suppress(Exception):
            kill_own_ray()
            discard_folder()
        end_process(
            f"error: Ray's {' and '.join(dead)} died, and with it what was running; continue with: "
            f"{continuing_command() or SAME_COMMAND}",
            EXIT_WITHOUT_RAY,
        )


def joined_address() -> dict[str, str]:
    """The variable that has a child process join the Ray to which this one is connected, if any."""
    import ray

    return {ADDRESS: ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}


def check_address() -> None:
    """Raise `UserError` within `REACH_SECONDS` if RAY_ADDRESS names nothing that listens."""
    address = os.environ.get(ADDRESS, "")
    if not on_cluster() or address == "auto":  # Ray knows where it has started one here
        return
    if "://" in address:
        raise _unreachable(
            "it must be HOST:PORT of the head, or auto on one of the cluster's nodes; from "
            "elsewhere use ray job submit"
        )
    host, _, port = address.rpartition(":") if ":" in address else (address, "", "")
    try:
        target = (host.strip("[]"), int(port or _DEFAULT_PORT))
        socket.create_connection(target, timeout=REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(str(error)) from None


def _unreachable(reason: str) -> UserError:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return UserError(
        f"cannot join the Ray cluster at {os.environ.get(ADDRESS)} ({lines[0].rstrip('.')}): check "
        f"--address (or {ADDRESS}), that its head runs, and that its token is here "
        "(RAY_AUTH_MODE=token, and ray get-auth-token shows it)."
    )


def known_nodes() -> list[Node] | None:
    """The nodes that trials would run on; None before a connection to a cluster elsewhere."""
    if (nodes := assumed_nodes()) is not None:
        return nodes
    import ray

    if ray.is_initialized():
        return list(live_nodes().values())
    return None if on_cluster() else local_nodes()


def gpus_per_worker(asked: Gpus, nodes: Iterable[Node]) -> float:
    """The GPUs of a worker on these nodes, where `auto` is one if any of them has a GPU."""
    if isinstance(asked, str):
        return 1.0 if any(gpus >= 1 for _, gpus in nodes) else 0.0
    return asked


def with_gpus(config: StudyConfig) -> StudyConfig:
    """The study with a number for `gpus_per_trial`, from the nodes that are there now."""
    nodes = known_nodes()
    assert nodes is not None, "join the cluster first"
    return config.replace(gpus_per_trial=gpus_per_worker(config.gpus_per_trial, nodes))


def describe_gpus(asked: Gpus, nodes: Iterable[Node] | None) -> str:
    """The GPUs of a worker in words."""
    if asked == 0:
        hides = nodes is None or any(gpus for _, gpus in nodes)
        return "no GPU (all are hidden, as asked)" if hides else "no GPU (0, as asked)"
    if isinstance(asked, str) and nodes is None:
        return "1 GPU (none if the cluster has none)"
    gpus = gpus_per_worker(asked, nodes or ())
    return several(gpus, "GPU") if gpus else "no GPU (there is none)"


def _gpus_flag(workers: int) -> str:
    """The name of the flag for GPUs per worker: each command takes both."""
    return "--gpus-per-worker" if workers > 1 else "--gpus-per-trial"


def check_gpus(gpus: Gpus, workers: int) -> None:
    """Raise `UserError` for GPUs per worker with which that many workers of a run cannot work."""
    if isinstance(gpus, str):
        return
    flag = _gpus_flag(workers)
    if workers > 1 and 0 < gpus < 1:
        raise UserError(
            f"{workers} workers of a run cannot share GPUs, because NCCL takes no GPU for two of "
            f"them, got {several(gpus, 'GPU')} per worker: give {flag} 1 (0: on CPUs), or one "
            "worker."
        )
    if 0 < gpus < LEAST_SHARE:
        raise UserError(f"{flag} must be 0 or >= {LEAST_SHARE:g}, got {gpus:g}.")
    if gpus > 1 and not gpus.is_integer():
        raise UserError(f"{flag} must be a fraction of one or a whole number, got {gpus:g}.")


def refuse_misfit(
    need: str, nodes: Collection[Node], *, cpus: int, gpus: float, workers: int, workers_flag: str
) -> UserError:
    """The refusal of workers for which these nodes have no room.

    Args:
        need: they in words, as the beginning of a sentence.
        cpus, gpus: of each worker.
        workers_flag: the flag that says how many they are.
    """
    flag = _gpus_flag(workers)
    if gpus and not any(node_gpus for _, node_gpus in nodes):
        where = "the cluster" if on_cluster() or assumed_nodes() else "this machine"
        return UserError(f"{where} has no GPU: leave {flag} out (auto) or give 0, got {gpus:g}.")
    there = "there is no node"
    if nodes:
        all_cpus, all_gpus = (sum(amounts) for amounts in zip(*nodes, strict=True))
        there = f"there are {several(all_cpus, 'CPU')} and {several(all_gpus, 'GPU')}"
    if len(nodes) > 1:
        largest = max(nodes)
        there += f" on {len(nodes)} nodes, {largest[0]:g} and {largest[1]:g} on the largest"
    # Each flag that asks for more than the least.
    asked = {workers_flag: workers > 1, flag.replace("gpus", "cpus"): cpus > 1, flag: gpus > 0}
    flags = [name for name, more in asked.items() if more]
    remedy = f": lower {' or '.join(flags)}" if flags else ""
    return UserError(f"{need} ({there}){remedy}.")


def count_workers(node: Node, *, cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs each fit on a node at once."""
    node_cpus, node_gpus = node
    workers = int(node_cpus // cpus)
    if gpus:
        # A worker's GPUs, or its share of one, are of one node.
        workers = min(workers, int(node_gpus / gpus + 1e-9))
    return workers


def count_room(nodes: Iterable[Node], *, cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs each fit on these nodes; each is on one."""
    return sum(count_workers(node, cpus=cpus, gpus=gpus) for node in nodes)


def count_trials(config: StudyConfig, nodes: Collection[Node]) -> int:
    """How many trials run at once on these nodes (0: not one).

    The workers of a trial may be on several nodes; a worker is on one.
    """
    cpus, gpus = config.cpus_per_trial, gpus_per_worker(config.gpus_per_trial, nodes)
    slots = count_room(nodes, cpus=cpus, gpus=gpus) // config.workers_per_trial
    return min(slots, config.max_concurrent or slots)


def count_at_once(config: StudyConfig, nodes: Collection[Node]) -> int:
    """How many trials run at once on these nodes, at least 1.

    Of this machine no more than its memory, or that of the container, has room for, unless the
    study says how many.
    """
    count = max(1, count_trials(config, nodes))
    if config.max_concurrent or on_cluster() or assumed_nodes() is not None:
        return count
    room = (memory_limit() - RAY_BYTES) // WORKER_BYTES // config.workers_per_trial
    return max(1, min(count, room))


def local_nodes() -> list[Node]:
    """The nodes that a Ray of our own would have: this machine."""
    return [(local_cpus(), torch.cuda.device_count())]


def live_nodes() -> dict[str, Node]:
    """Node id -> (CPUs, GPUs) of the connected cluster."""
    import ray

    return {
        node["NodeID"]: (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    }


def cores_of_share(node: Node, gpus: float) -> int:
    """The CPUs of a node that go with so many of its GPUs, at least 1."""
    node_cpus, node_gpus = node
    return max(1, int(node_cpus * min(1.0, gpus / node_gpus)))


def own_cores() -> int | None:
    """The CPUs that go with the GPUs of this Ray process; None where it has none, as a driver."""
    import ray

    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    gpus = context.get_assigned_resources().get("GPU", 0.0)
    return cores_of_share(live_nodes()[context.get_node_id()], gpus) if gpus else None


def check_fits(config: StudyConfig) -> None:
    """Raise `UserError` if not one trial fits: it would wait for ever.

    Before a connection to a cluster elsewhere its size is unknown, and not checked.
    """
    check_gpus(config.gpus_per_trial, config.workers_per_trial)
    nodes = known_nodes()
    if nodes is not None and count_trials(config, nodes) < 1:
        workers, cpus = config.workers_per_trial, config.cpus_per_trial
        gpus = gpus_per_worker(config.gpus_per_trial, nodes)
        share = f"{several(cpus, 'CPU')} and {several(gpus, 'GPU')}"
        raise refuse_misfit(
            f"one trial needs {share}" + (f" for each of {workers} workers" * (workers > 1)),
            nodes, cpus=cpus, gpus=gpus, workers=workers, workers_flag="--workers-per-trial",
        )  # fmt: skip


def check_visible(folder: Path) -> None:
    """Raise `UserError` if a node on which trials may run does not see the study's folder.

    Trials write their files where they run, and the driver reads them. One node, or the
    driver's alone, needs no asking.
    """
    import ray

    if not ray.is_initialized():
        return
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }
    nodes.pop(ray.get_runtime_context().get_node_id(), None)
    if nodes:
        check_seen(folder, nodes, _node_sees)


def check_seen(folder: Path, nodes: Mapping[str, str], sees: Callable[[str, str], bool]) -> None:
    """Leave a file in the folder and ask each node whether it is there.

    Args:
        nodes: id -> address.
        sees: (node's id, path) -> whether that node sees the file.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        blind = [address for node, address in nodes.items() if not sees(node, str(probe))]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{folder} is not visible on {len(blind)} node(s) of the cluster ({', '.join(blind)}), "
            "where trials would write their files: choose an --out on a file system that all "
            "nodes share, or for a URI set EKD_STUDIES_DIR to a folder on one."
        )


def begin_on_node(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Ray's reference to what a function will return on a node, on none of its CPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=1)(function)
    return task.options(scheduling_strategy=strategy).remote(*arguments)


def ask_node(
    node: str, function: Callable[..., Any], *arguments: Any, seconds: float = ANSWER_SECONDS
) -> Any:
    """The result of a function on a node. Raises `ray.exceptions.RayError`."""
    import ray

    return ray.get(begin_on_node(node, function, *arguments), timeout=seconds)


def _node_sees(node: str, path: str) -> bool:
    import ray

    try:
        return bool(ask_node(node, file_is_seen, path))
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:  # a node that dies meanwhile runs no trial
        return True


def file_is_seen(path: str) -> bool:
    """Whether a file is there, also where a network file system has an old listing."""
    folder = Path(path).parent
    if folder.is_dir():
        list(folder.iterdir())
    return Path(path).exists()
