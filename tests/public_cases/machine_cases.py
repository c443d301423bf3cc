"""Machines that are not like ours, and numbers and names as people write them."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import Answer, Case, Hands
from folder_cases import study

from ekd_ray.cli import plan_text
from ekd_ray.cli.main import run as run_main
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.control_groups import cpu_quota, memory_limit
from ekd_ray.engine.environment import environment
from ekd_ray.errors import UserError, user_error
from ekd_ray.scale import cluster
from ekd_ray.scale.ray_folder import private_folder

KIND = "machine"
WORDS = "words"
PLAN = ("--dataset", "digits", "--pair", "resnet20-resnet8", "--train-subset", "560", "--dry-run")


def plan_in(**variables: str | None) -> Callable[[Hands], Answer]:
    """The plan of a study in another environment."""

    def hand_in(hands: Hands) -> Answer:
        for name, value in variables.items():
            if value is None:
                hands.patch.delenv(name, raising=False)
            else:
                hands.patch.setenv(name, value)
        return hands.launch("tune", *PLAN)

    return hand_in


def plan_of_2_gib(hands: Hands) -> Answer:
    for module in (cluster, plan_text):
        hands.patch.setattr(module, "memory_limit", lambda: 2 * 2**30)
        hands.patch.setattr(module, "local_nodes", lambda: [(64, 0)])
    return hands.launch("tune", *PLAN)


def ray_without_memory(hands: Hands) -> None:
    """What Ray says where less than 250 MB are free."""
    import ray

    def init(**_: Any) -> None:
        raise ValueError("Attempting to cap object store memory usage at 1 bytes, but ...")

    hands.patch.setattr(ray, "init", init)
    hands.patch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="short of memory"), cluster.connected():
        pass


def plan_with(*flags: str) -> Callable[[Hands], Answer]:
    return lambda hands: hands.launch("tune", *PLAN, *flags)


def no_utf8(hands: Hands) -> Answer:
    name = os.fsdecode(b"caf\xe9")
    (hands.folder / name).mkdir()
    return hands.launch("show", hands.folder / name)


def no_git(hands: Hands) -> None:
    hands.patch.setenv("PATH", str(hands.folder))
    found = environment()
    assert found["git_revision"] is None and found["packages"]["torch"]


def long_tmpdir(hands: Hands) -> None:
    """Sockets lie elsewhere, because the path of one has 107 characters at most."""
    folder = hands.folder / ("x" * 100)
    folder.mkdir()
    hands.patch.delenv("RAY_TMPDIR", raising=False)
    hands.patch.setattr(tempfile, "tempdir", str(folder))
    with private_folder() as found:
        assert len(str(found)) < 60 and not list(folder.iterdir())


def long_ray_tmpdir(hands: Hands) -> None:
    hands.patch.setenv("RAY_TMPDIR", str(hands.folder / ("x" * 100)))
    with pytest.raises(UserError, match=r"characters.*shorter path"), private_folder():
        pass


def no_ray_tmpdir(hands: Hands) -> None:
    hands.patch.setenv("RAY_TMPDIR", "/proc/ekd")
    with pytest.raises(UserError, match="cannot write to RAY_TMPDIR"), private_folder():
        pass


def quota(cpus: float, groups: str, **files: str) -> Callable[[Hands], None]:
    """Control groups of a container, `GROUP__FILE` in the order of folders."""

    def hand_in(hands: Hands) -> None:
        (hands.folder / "groups").write_text(groups)
        for name, text in files.items():
            path = hands.folder / "fs" / name.replace("__", "/").replace("cpu_", "cpu.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert cpu_quota(hands.folder / "groups", hands.folder / "fs") == cpus

    return hand_in


def memory(limit: int, groups: str, **files: str) -> Callable[[Hands], None]:
    """As `quota`; then what a study without a limit of its own may run at once on 64 CPUs."""

    def hand_in(hands: Hands) -> None:
        place = hands.folder / "fs"
        (hands.folder / "groups").write_text(groups)
        for name, text in files.items():
            path = place / name.replace("__", "/").replace("memory_", "memory.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = memory_limit(hands.folder / "groups", place)
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert found == min(limit, whole)
        hands.patch.setattr(cluster, "memory_limit", lambda: limit)
        small = limit < 2**40
        for config, scarce, plenty in (
            (StudyConfig(), 1, 64), (StudyConfig(workers_per_trial=2), 1, 32),
            (StudyConfig(max_concurrent=8), 8, 8),
        ):  # fmt: skip
            assert cluster.count_at_once(config, [(64, 0)]) == (scarce if small else plenty)

    return hand_in


def few_files(soft: int, hard: int, refused: bool) -> Callable[[Hands], None]:
    def hand_in(hands: Hands) -> None:
        asked: list[Any] = []
        hands.patch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        hands.patch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
        if refused:
            with pytest.raises(UserError, match=f"{hard} files"):
                cluster._allow_open_files()
        else:
            cluster._allow_open_files()
        assert asked == ([] if refused else [(cluster.LEAST_FILES, hard)])

    return hand_in


def full_disk(hands: Hands) -> None:
    from ekd_ray.studies.pipeline import check_writable

    hands.patch.setattr("ekd_ray.studies.pipeline.LEAST_FREE_BYTES", 2**80)
    with pytest.raises(UserError, match="MiB free"):
        check_writable(hands.folder / "run")


def value(given: Any, expected: Any, name: str = "epochs") -> Callable[[Hands], None]:
    def hand_in(hands: Hands) -> None:
        found = DistillConfig.check_value(name, given)
        assert found == expected and type(found) is type(expected)

    return hand_in


def home_in_a_path(hands: Hands) -> Answer:
    study(hands)
    hands.patch.setenv("HOME", str(hands.folder))
    return hands.launch("show", "~/run")


def no_number(given: Any, name: str = "epochs") -> Callable[[Hands], None]:
    def hand_in(hands: Hands) -> None:
        with pytest.raises(UserError, match=name):
            DistillConfig.check_value(name, given)

    return hand_in


def same_fingerprint(hands: Hands) -> None:
    one = StudyConfig(trials=7, distill=DistillConfig(lr=0.5, epochs=20))
    other = StudyConfig(
        trials=np.int64(7), distill=DistillConfig(lr=np.float64(0.5), epochs=np.int32(20))
    )
    assert one == other and one.fingerprint() == other.fingerprint()


def raised_in_a_task(hands: Hands) -> None:
    """Ray's error is of both classes, and its text is a traceback."""
    from ray.exceptions import RayTaskError

    cause = UserError("the folder is none: give another.", keys=("out",))
    error = RayTaskError("f", "Traceback (most recent call last): ...", cause).as_instanceof_cause()
    assert user_error(error) is cause
    wrapped = RuntimeError("Tune failed")
    wrapped.__cause__ = error
    assert user_error(wrapped) is cause
    by_chance = RuntimeError("another error")
    by_chance.__context__ = cause
    assert user_error(by_chance) is None

    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == cause.exit_code


V2 = "0::/box\n"
V1 = "4:cpu,cpuacct:/box\n2:memory:/\n"

CASES = [
    Case(KIND, "HOME is not there", plan_in(HOME="/dev/null/home"), 0, ("resnet8",)),
    Case(KIND, "HOME cannot be written", plan_in(HOME="/proc"), 0, ("resnet8",)),
    Case(KIND, "no HOME", plan_in(HOME=None), 0, ("resnet8",)),
    Case(KIND, "a proxy", plan_in(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9",
         all_proxy="socks5://127.0.0.1:9"), 0, ("resnet8",)),
    Case(KIND, "another time zone", plan_in(TZ="Pacific/Kiritimati"), 0, ("resnet8",)),
    Case(KIND, "LANG=C", plan_in(LANG="C", LC_ALL="C"), 0, ("resnet8",)),
    Case(KIND, "a name that is no UTF-8", no_utf8, 2, ("holds no study",)),
    Case(KIND, "no git", no_git, None),
    Case(KIND, "TMPDIR too long for a socket", long_tmpdir, None),
    Case(KIND, "RAY_TMPDIR too long for a socket", long_ray_tmpdir, None),
    Case(KIND, "RAY_TMPDIR cannot be written", no_ray_tmpdir, None),
    Case(KIND, "2 CPUs of a container", quota(2.0, V2, box__cpu_max="200000 100000"), None),
    Case(KIND, "no limit of a container", quota(1024.0, V2, box__cpu_max="max 100000"), None),
    Case(KIND, "2 CPUs of the group above", quota(2.0, V2, cpu_max="200000 100000"), None),
    Case(KIND, "3 CPUs, groups of version 1", quota(3.0, V1, cpu__box__cpu_cfs_quota_us="300000",
         cpu__box__cpu_cfs_period_us="100000"), None),
    Case(KIND, "no limit, groups of version 1", quota(1024.0, V1, cpu__box__cpu_cfs_quota_us="-1",
         cpu__box__cpu_cfs_period_us="100000"), None),
    Case(KIND, "2 GiB of a container", memory(2 * 2**30, V2, box__memory_max="2147483648"), None),
    Case(KIND, "2 GiB of the group above", memory(2 * 2**30, V2, box__memory_max="max",
         memory_max="2147483648"), None),
    Case(KIND, "no limit on memory", memory(2**62, V2, box__memory_max="max"), None),
    Case(KIND, "2 GiB, groups of version 1", memory(2 * 2**30, V1,
         memory__memory_limit_in_bytes="2147483648"), None),
    Case(KIND, "no limit on memory, groups of version 1", memory(2**62, V1,
         memory__memory_limit_in_bytes="9223372036854771712"), None),
    Case(KIND, "2 GiB and 64 CPUs: the plan", plan_of_2_gib, 0, ("1 trial at once", "2.00 GiB")),
    Case(KIND, "no memory for Ray's store", ray_without_memory, None),
    Case(KIND, "few open files", few_files(256, 65536, False), None),
    Case(KIND, "few open files, and no more allowed", few_files(256, 512, True), None),
    Case(KIND, "full disk", full_disk, None),
    Case(WORDS, "1_000 as a setting", value("1_000", 1000), None),
    Case(WORDS, "1e3 as a whole number", value(1e3, 1000), None),
    Case(WORDS, "a whole number of NumPy", value(np.int64(20), 20), None),
    Case(WORDS, "float32 of NumPy", value(np.float32(0.5), 0.5, "lr"), None),
    Case(WORDS, "True of NumPy", no_number(np.bool_(True)), None),
    Case(WORDS, "a number in words", no_number("many"), None),
    Case(WORDS, "half an epoch", no_number(1.5), None),
    Case(WORDS, "1_00", no_number("1_00"), None),
    Case(WORDS, "scalars of NumPy and the fingerprint", same_fingerprint, None),
    Case(WORDS, "--trials 1e1", plan_with("--trials", "1e1"), 0, ("10",)),
    Case(WORDS, "--trials 1.5", plan_with("--trials", "1.5"), 2, ("1.5",)),
    Case(WORDS, "--set trials=1_000", plan_with("--set", "trials=1_000"), 0, ("1000 trials",)),
    Case(WORDS, "ResNet8", plan_with("--student", "ResNet8"), 2, ("resnet8",)),
    Case(WORDS, "CIFAR-100", lambda hands: hands.launch("tune", "--dataset", "CIFAR-100",
         "--pair", "resnet56-resnet20", "--dry-run"), 2, ("cifar100",)),
    Case(WORDS, "~ in a path", home_in_a_path, 0, ("trial",)),
    Case(WORDS, "a UserError in a task of Ray", raised_in_a_task, None),
]  # fmt: skip
