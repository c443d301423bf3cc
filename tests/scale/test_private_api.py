"""Each part of Ray and Optuna that they do not promise to keep is still there.

One that fails names what has gone, and with it the function of `ray_private` or
`optuna_private` to mend.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from ekd_ray.scale import optuna_private, ray_private
from ekd_ray.scale.cluster import ENVIRONMENT

PACKAGE = Path(optuna_private.__file__).parents[1]


def test_private_names_stand_in_their_two_modules_alone() -> None:
    private = ("ray._", "ray.train.v2._", "run_metadata", "_trial_id", "._storage", "._study_id",
               "invalidate_cache", "_sync_with_backend", "optuna._",
               "__internal_head__")  # fmt: skip
    found = {path.name for path in PACKAGE.rglob("*.py")
             if any(name in path.read_text(encoding="utf-8") for name in private)}  # fmt: skip
    assert found == {"ray_private.py", "optuna_private.py"}


def source_of(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


# Ray


def test_ray_prints_the_deaths_of_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    notice = {"lines": ["A worker died"], "pid": "raylet", "is_err": False}
    with ray_private.notices_on_stderr():
        worker.print_to_stdstream(notice, ignore_prefix=False)
    printed = capsys.readouterr()
    assert printed.out == "" and "A worker died" in printed.err


def test_ray_can_be_kept_from_forming_clusters() -> None:
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_private.loopback_only():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert "ENABLE_RAY_CLUSTER" in source_of("ray._private.services")


def test_ray_knows_the_processes_that_it_started() -> None:
    from ray._private.node import Node
    from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

    assert {PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET} == ray_private.VITAL_PROCESSES
    assert callable(Node.dead_processes)
    assert {"check_alive", "allow_graceful"} <= set(
        inspect.signature(Node.kill_all_processes).parameters
    )
    assert not ray.is_initialized() and ray_private.dead_vital_processes() == []


def test_a_process_that_ray_ends_for_memory_has_died_for_tune() -> None:
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    heard: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=None)
    task = SimpleNamespace(_tracked_actor=actor, _on_error=lambda actor, error: heard.append(error))
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    low = OutOfMemoryError("a node running low on memory")
    with ray_private.memory_kills_are_deaths():
        fail: Any = RayActorManager._actor_task_failed
        fail(manager, tracked_actor_task=task, exception=low)
    assert isinstance(heard[0], RayActorError) and ray_private.LOW_ON_MEMORY in str(heard[0])
    # Otherwise it ends the search: once it does not, ray_private can forget about it.
    fail = RayActorManager._actor_task_failed
    with pytest.raises(RuntimeError):
        fail(manager, tracked_actor_task=task, exception=low)


def test_ray_train_hands_variables_to_its_workers() -> None:
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    with ray_private.address_for_workers("1.2.3.4:5"):
        assert "RAY_API_SERVER_ADDRESS" in ENV_VARS_TO_PROPAGATE


def test_tune_hands_variables_to_its_trials_unless_it_is_kept_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.tune.execution.class_cache import _ActorClassCache

    class Trainable: ...

    def passed_on() -> str:
        return str(vars(_ActorClassCache().get(Trainable)))

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    with ray_private.no_variables_passed_on():
        assert "canary" not in passed_on() and "runtime_env" in passed_on()
    # Once it is not there, ray_private can forget about it.
    assert "canary" in passed_on()


def test_the_head_has_a_resource_of_its_own() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert ray_private.HEAD_NODE == HEAD_NODE_RESOURCE_NAME


def test_tune_counts_and_writes_the_failures_of_a_trial(tmp_path: Path) -> None:
    storage = SimpleNamespace(trial_driver_staging_path=str(tmp_path))
    trial = Trial("function", stub=True)
    trial.storage = storage
    assert ray_private.last_failure(trial) == ""
    for text in ("first", "second"):
        trial.handle_error(RuntimeError(text))
    assert "second" in ray_private.last_failure(trial)
    assert "first" not in ray_private.last_failure(trial)
    assert trial.num_failures == 2
    ray_private.forgive_failure(trial)
    assert trial.num_failures == 1


@pytest.mark.parametrize("text", [ray_private.NODE_DIED, ray_private.LOW_ON_MEMORY])
def test_ray_says_in_these_words_why_a_process_died(text: str) -> None:
    core = Path(ray.__file__).parent / "core" / "src" / "ray"
    programs = (core / "gcs" / "gcs_server", core / "raylet" / "raylet")
    assert any(text.encode() in path.read_bytes() for path in programs)


READERS = {
    "RAY_AIR_NEW_OUTPUT": "ray.tune.experimental.output",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "ray.tune.utils.callback",
    "TUNE_GLOBAL_CHECKPOINT_S": "ray.tune.execution.tune_controller",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "ray.tune.execution.tune_controller",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "ray.train.constants",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "ray._private.accelerators.accelerator",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "ray.tune.execution.tune_controller",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "ray.train.v2._internal.constants",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "ray.train.v2._internal.constants",
}


@pytest.mark.parametrize(("name", "module"), READERS.items())
def test_ray_reads_the_variables_that_are_set_for_it(name: str, module: str) -> None:
    assert f'"{name}"' in source_of(module)


def test_every_variable_is_looked_at() -> None:
    assert set(ENVIRONMENT) - {"GLIBC_TUNABLES"} <= set(READERS)


# Optuna


def test_optuna_reopens_a_trial_under_its_number() -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage).ask()  # ids of trials are not their numbers
    study = optuna.create_study(storage=storage, study_name="second")
    assert optuna_private.storage_of(study) is storage
    begun = study.ask()
    value = begun.suggest_float("lr", 0, 1)
    again = optuna_private.reopen_trial(study, begun.number)
    assert (again.number, again.suggest_float("lr", 0, 1)) == (0, value)
    study.tell(again, 1.0)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


def test_optuna_locks_a_journal_beside_it(tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    JournalStorage(JournalFileBackend(str(journal)))
    lock = JournalFileSymlinkLock(str(journal))
    assert optuna_private.lock_files(journal) == []
    lock.acquire()
    assert len(optuna_private.lock_files(journal)) == 1
    lock.release()
    assert optuna_private.lock_files(journal) == []
