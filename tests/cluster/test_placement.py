"""How many trials fit on which nodes, who shares a disk, and addresses where nobody is."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from ekd_ray.cli import plan_text
from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale import cluster, fill_tasks, trial_slots
from ekd_ray.scale.schedulers import make_scheduler


@given(
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=5),
    workers=st.integers(1, 4),
    cpus=st.integers(1, 4),
    gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
)
def test_what_fits_can_be_placed_worker_by_worker(
    nodes: list[tuple[int, int]], workers: int, cpus: int, gpus: float
) -> None:
    config = StudyConfig(workers_per_trial=workers, cpus_per_trial=cpus, gpus_per_trial=gpus)
    placed = 0
    for have in nodes:
        left_cpus, left_gpus = have
        while left_cpus >= cpus and left_gpus >= gpus:
            left_cpus, left_gpus, placed = left_cpus - cpus, left_gpus - gpus, placed + 1
    assert cluster.count_trials(config, nodes) == placed // workers


def test_cpus_of_two_nodes_are_no_room_for_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    config = StudyConfig(cpus_per_trial=3)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "live_nodes", lambda: {"a": (2.0, 0.0), "b": (2.0, 0.0)})
    with pytest.raises(UserError, match=r"4 CPU.* on 2 nodes, 2 and 0 on the largest") as refused:
        cluster.check_fits(config)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(cluster, "live_nodes", lambda: {"a": (1.0, 0.0), "b": (3.0, 0.0)})
    cluster.check_fits(config)


def test_a_search_uses_nodes_that_join_and_lets_go_of_those_that_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Endless(Searcher):
        def suggest(self, trial_id: str) -> dict[str, Any]:
            return {"given": trial_id}

        def on_trial_complete(self, *args: Any, **options: Any) -> None: ...

    room, now = [2], [0.0]
    monkeypatch.setattr(trial_slots, "live_nodes", lambda: {"a": (room[0], 0)})
    monkeypatch.setattr(trial_slots, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limited = trial_slots.TrialSlots(Endless(), StudyConfig(), trial_slots.ProcessDeaths())
    running = [name for name in "abcd" if limited.suggest(name)]
    assert running == ["a", "b"]
    room[0] = 3
    assert limited.suggest("c") is None, "nodes are not looked at for every trial"
    now[0] += trial_slots.REFRESH_SECONDS + 1
    assert limited.suggest("c")
    assert limited.suggest("d") is None
    room[0], now[0] = 0, now[0] + trial_slots.REFRESH_SECONDS + 1
    assert limited.suggest("d") is None
    for name in "abc":
        limited.on_trial_complete(name)
    assert limited.suggest("d"), "a search must not end because its nodes are all gone for now"


def test_a_cluster_that_can_grow_sees_a_few_trials_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, asked, workers, expected in (
        ("h:1", 64, 1, 10), ("h:1", 9, 1, 9), ("h:1", None, 1, 8), ("h:1", 64, 2, 8),
        ("", 64, 1, 8),
    ):  # fmt: skip
        room = {"a": (8 * workers, 0)}
        monkeypatch.setattr(trial_slots, "live_nodes", lambda room=room: room)
        monkeypatch.setenv("RAY_ADDRESS", address)
        config = StudyConfig(max_concurrent=asked, workers_per_trial=workers)
        assert trial_slots.max_concurrent_trials(config) == expected


def failed(path: Path, *reasons: str) -> Any:
    path.write_text("".join(f"Failure # {i} (occurred at x)\n{r}\n" for i, r in enumerate(reasons)))
    return SimpleNamespace(
        trial_id="t",
        error_file=str(path),
        run_metadata=SimpleNamespace(num_failures=len(reasons), invalidate_cache=lambda: None),
    )


def test_the_loss_of_a_node_does_not_count_against_a_trial(tmp_path: Path) -> None:
    lost = "The actor died because its node has died. Node Id: 1"
    for reasons, counted in (((lost,), 0), (("killed",), 1), (("killed", lost), 1),
                             ((lost, "killed"), 2)):  # fmt: skip
        trial = failed(tmp_path / "error.txt", *reasons)
        trial_slots.ProcessDeaths().on_trial_recover(1, [trial], trial)
        assert trial.run_metadata.num_failures == counted, reasons


def test_a_process_that_was_ended_for_memory_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes to the searcher with the trial that failed."""
    monkeypatch.setattr(trial_slots, "live_nodes", lambda: {"a": (1, 0)})
    low = "The worker was killed because its node was running low on memory."
    for reasons, known in (((low,), True), (("killed",), False), ((low, "killed"), False)):
        deaths, trial = trial_slots.ProcessDeaths(), failed(tmp_path / "error.txt", *reasons)
        deaths.on_step_begin(1, [trial])
        assert ("lower --max-concurrent" in str(deaths.reason("t"))) == known
        assert deaths.reason("another") is None
        searcher = Mock(spec=Searcher, metric="val_top1", mode="max")
        slots = trial_slots.TrialSlots(searcher, StudyConfig(max_concurrent=1), deaths)
        slots.suggest("t")
        slots.on_trial_complete("t", error=True)
        result = searcher.on_trial_complete.call_args.kwargs["result"]
        assert result == {trial_slots.DEATH_REASON: deaths.reason("t")}


def test_a_trial_that_ends_one_node_after_the_other_fails_at_last(tmp_path: Path) -> None:
    trial = failed(tmp_path / "error.txt", "its node has died")
    callback = trial_slots.ProcessDeaths()
    for _ in range(trial_slots.NODE_LOSSES):
        callback.on_trial_recover(1, [trial], trial)
        trial.run_metadata.num_failures += 1
    callback.on_trial_recover(1, [trial], trial)
    assert trial.run_metadata.num_failures == 1


def test_nodes_with_one_disk_share_the_filling_of_it() -> None:
    slots_of = {"a": 2, "b": 1, "c": 3}
    assert fill_tasks.take_turns(slots_of, {"a": "x", "b": "y", "c": "x"}) == [
        ["a", "c", "a", "c", "c"],
        ["b"],
    ]


def test_a_cache_folder_is_known_again_by_all_who_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "one"))
    found: list[str] = []
    askers = [
        threading.Thread(target=lambda: found.append(fill_tasks.name_cache_folder()))
        for _ in range(8)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [path.name for path in (tmp_path / "one").iterdir()] == [fill_tasks.IDENTITY]
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "two"))
    assert fill_tasks.name_cache_folder() != found[0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "file" / "no"))
    assert fill_tasks.name_cache_folder() != fill_tasks.name_cache_folder()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "http://127.0.0.1:8265",
                "127.0.0.1:no", "127.0.0.1:99999999", "no.such.host.invalid:6379"],
)  # fmt: skip
def test_an_address_where_no_cluster_is(
    address: str, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by a launcher before anything is written, with exit code 2 and one sentence."""
    monkeypatch.setenv("RAY_ADDRESS", "")  # what the launcher sets is taken back
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = address.format(port=closed.getsockname()[1])
        code, out, error = launch(
            "tune_cifar", "--dataset", "digits", "--pair", "resnet20-resnet8",
            "--address", address, "--out", tmp_path / "run",
        )  # fmt: skip
    assert (code, out) == (2, "")
    assert error.startswith(f"error: cannot join the Ray cluster at {address} (")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "none"])
def test_the_scheduler_moves_no_trial_away_from_the_process_that_starts_for_it(name: str) -> None:
    """Tune pickles its scheduler, and asks it for a trial to give to any process that is free."""
    waiting = SimpleNamespace(status="PENDING", placement_group_factory=None)
    controller = SimpleNamespace(get_trials=lambda: [waiting])
    scheduler = make_scheduler(StudyConfig(scheduler=name))
    assert FIFOScheduler().choose_trial_to_run(controller) is waiting, "why ours differ"
    assert cloudpickle.loads(cloudpickle.dumps(scheduler)).choose_trial_to_run(controller) is None


def test_processes_of_a_ray_of_our_own_use_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is read when a process starts: it must be there before Ray is."""
    import ray

    seen: list[str | None] = []
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.environ["GLIBC_TUNABLES"]))
    del os.environ["GLIBC_TUNABLES"]
    with cluster.connected(StudyConfig()):
        pass
    monkeypatch.setenv("GLIBC_TUNABLES", "the user's")
    with cluster.connected(StudyConfig()):
        pass
    assert seen == ["glibc.malloc.hugetlb=1", "the user's"]


def test_nodes_that_do_not_see_the_folder_are_named_in_one_sentence(tmp_path):
    nodes = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}

    def sees(node, path):
        assert cluster.file_is_seen(path)
        return node == "b"

    with pytest.raises(UserError, match=r"on 2 node\(s\) of the cluster \(10.0.0.1, 10.0.0.3\)"):
        cluster.check_seen(tmp_path, nodes, sees)
    cluster.check_seen(tmp_path, {"b": "10.0.0.2"}, sees)
    assert list(tmp_path.iterdir()) == [], "the probe is left"
    assert not cluster.file_is_seen(str(tmp_path / "other" / ".probe.tmp"))


CPUS, MIXED, GPUS = [(4.0, 0.0)], [(8.0, 0.0), (4.0, 2.0)], [(8.0, 4.0)]


def test_auto_is_a_gpu_for_each_trial_where_the_cluster_has_any() -> None:
    auto = StudyConfig()
    for nodes, gpus, trials in ((CPUS, 0.0, 4), (MIXED, 1.0, 2), (GPUS, 1.0, 4)):
        assert cluster.gpus_per_worker(auto.gpus_per_trial, nodes) == gpus
        assert cluster.count_trials(auto, nodes) == trials
    for asked, trials in ((0.25, 4), (0.5, 4), (2.0, 1), (0.0, 12)):
        assert cluster.gpus_per_worker(asked, MIXED) == asked
        assert cluster.count_trials(auto.replace(gpus_per_trial=asked), MIXED) == trials


def test_a_study_file_of_before_auto_means_what_it_meant() -> None:
    for asked in (0.0, 0.25, 1):
        config = StudyConfig.from_dict({"gpus_per_trial": asked})
        assert config.gpus == asked and config.fingerprint() == StudyConfig().fingerprint()
    assert StudyConfig.from_dict({"gpus_per_trial": "auto"}) == StudyConfig()
    with pytest.raises(UserError, match="gpus_per_trial must be a number or auto, got 'all'"):
        StudyConfig.from_dict({"gpus_per_trial": "all"})


def test_plan_refusal_and_trials_know_the_same_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the Ray that is connected, of this machine before, of none before it is joined."""
    import ray

    config, nodes = StudyConfig(), {"a": (8.0, 0.0), "b": (4.0, 2.0)}
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setattr(cluster, "local_cpus", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert cluster.known_nodes() == GPUS and cluster.with_gpus(config).gpus == 1.0
    assert "4 trials at once here, each with 1 CPU and 1 GPU" in plan_text._at_once(config)
    assert plan_text._used(config) == (4, 4.0)
    hidden = config.replace(gpus_per_trial=0.0)
    assert plan_text._at_once(hidden) == (
        "8 trials at once here, each with 1 CPU and no GPU (all are hidden, as asked)"
    )
    monkeypatch.setenv(cluster.ADDRESS, "head:1")
    assert cluster.known_nodes() is None
    cluster.check_fits(config.replace(gpus_per_trial=64.0))
    assert plan_text._at_once(config) == (
        "as many trials at once as fit on head:1, each with 1 CPU and "
        "1 GPU (none if the cluster has none)"
    )
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "live_nodes", lambda: nodes)
    assert cluster.known_nodes() == MIXED and cluster.with_gpus(config).gpus == 1.0
    assert "2 trials at once here" in plan_text._at_once(config)
    with pytest.raises(UserError, match=r"1 CPU and 2 GPUs for each of 2 workers \(there are"):
        cluster.check_fits(config.replace(gpus_per_trial=2.0, workers_per_trial=2))


@pytest.mark.parametrize(("workers", "gpus", "refused"), [
    (1, 0.25, None), (2, 1.0, None), (2, 0.0, None), (2, "auto", None), (1, 2.0, None),
    (2, 0.5, "got 0.5 GPU"), (4, 0.25, "NCCL takes no GPU for two"), (1, 1.5, "got 1.5"),
    (1, 0.00009, "got 9e-05"),
])  # fmt: skip
def test_ranks_on_fractions_of_a_gpu_are_refused(
    workers: int, gpus: Any, refused: str | None
) -> None:
    if refused is None:
        cluster.check_gpus(gpus, workers)
        return
    with pytest.raises(UserError, match=refused) as raised:
        cluster.check_fits(StudyConfig(workers_per_trial=workers, gpus_per_trial=gpus))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=refused) as raised:
        cluster.check_gpus(gpus, workers)
    assert "\n" not in str(raised.value)


def test_a_ray_of_our_own_has_the_gpus_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    seen: list[Any] = []
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options["num_gpus"]))
    with cluster.connected():
        pass
    assert seen == [3]


@pytest.mark.parametrize(
    "said", ["The current node timed out", "\nThe last 20 lines of dashboard.log"]
)
def test_a_ray_that_is_late_is_one_sentence(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise Exception(said)

    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setattr(ray, "init", late)
    with (
        pytest.raises(UserError, match="run the same command again") as raised,
        cluster.connected(),
    ):
        pass
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(ray, "init", Mock(side_effect=RuntimeError("of ours")))
    with pytest.raises(RuntimeError, match="of ours"), cluster.connected():
        pass
