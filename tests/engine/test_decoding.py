"""How many threads decode, and the rate that the plan warns of."""

import time

import pytest
import torch
from miniature import write_miniature

from ekd_ray.cli import plan_text
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.data import staging
from ekd_ray.engine import decoding
from ekd_ray.engine.resolve import resolve
from ekd_ray.scale.trainer import Workers

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """16 cores and 4 GPUs, two threads that compute."""
    monkeypatch.setattr(decoding, "local_cpus", lambda: 16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    yield
    decoding.share_cores(None)


@pytest.mark.parametrize(
    ("asked", "device", "share", "threads"),
    [
        ("auto", CPU, None, 2),
        ("auto", CUDA, None, 4),
        ("auto", CUDA, 7, 7),
        ("auto", CUDA, 1, 2),  # those that compute are there anyway
        (3, CUDA, 7, 3),
        (5, CPU, None, 5),
    ],
)
def test_a_gpu_has_its_cores(machine, asked, device, share, threads):
    decoding.share_cores(share)
    config = DistillConfig(decode_threads=asked)
    assert decoding.decoding_threads(config, device) == threads


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A configuration on pictures that are decoded as they are drawn."""
    root = tmp_path_factory.mktemp("pictures")
    write_miniature(root, classes=4, train_per_class=16, test_per_class=1, size=32)
    (root / "val").rename(root / "test")
    values = {"dataset": f"folder:{root}", "student": "resnet8", "method": "none"}
    return resolve(DistillConfig(**values, image_size=32, batch_size=8, validation_fraction=0.25))


def test_a_run_decodes_with_them(pictures, run_data):
    assert run_data(pictures.replace(decode_threads=5)).images._threads == 5


def test_the_rate_is_that_of_the_threads(pictures, monkeypatch):
    seconds, decode = 0.01, staging.decode_view

    def slow(*args):
        time.sleep(seconds)
        return decode(*args)

    monkeypatch.setattr("ekd_ray.data.staging.decode_view", slow)
    rate = decoding.measure_decoding(pictures, None, 2, seconds=0.05)
    assert 0 < rate <= 2 / seconds


@pytest.mark.parametrize("rate", [1.0, 1e12])
def test_the_plan_warns_of_a_student_that_waits(rate, pictures, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(plan_text, "local_cpus", lambda: 8)
    monkeypatch.setattr(plan_text, "known_nodes", lambda: [(64, 0), (8, 2)])
    monkeypatch.setattr(
        plan_text, "measure_decoding", lambda c, r, threads: asked.append(threads) or rate
    )
    space = {"lr": {"low": 0.01, "high": 0.1}}
    study = StudyConfig(distill=pictures, gpus_per_trial=0.5, space=space)
    workers = Workers(least=2, most=2, cpus=1, gpus=1.0)
    one = plan_text.run_plan(pictures.replace(decode_threads=16), tmp_path, None, workers)
    for plan, threads in ((plan_text.study_plan(study, tmp_path), 2), (one, 16)):
        (line,) = (line for line in plan.splitlines() if line.startswith("reading"))
        assert f" {threads} thread" in line
        assert ("it waits for pictures" in line) == (rate == 1.0)
    assert asked == [4, 2], "no more than the cores that go with a worker's GPU"
    assert f"16 threads of a worker on 4 cores: {rate:,.0f} images/s (measured)" in one


def test_the_plan_says_what_it_has_not_measured(pictures, monkeypatch, tmp_path):
    """Nodes elsewhere may have more cores than this machine."""
    monkeypatch.setattr(plan_text, "local_cpus", lambda: 2)
    monkeypatch.setattr(plan_text, "measure_decoding", lambda *_: 10.0)
    workers = Workers(least=2, most=2, cpus=1, gpus=0.0)
    for nodes, said in (
        (None, "64 threads of a worker: 320 images/s (2 measured here, times 32); "),
        ([(2, 0)], "64 threads of a worker on 1 core: 10 images/s (measured); "),
    ):
        monkeypatch.setattr(plan_text, "known_nodes", lambda nodes=nodes: nodes)
        plan = plan_text.run_plan(pictures.replace(decode_threads=64), tmp_path, None, workers)
        assert said in plan


def test_images_of_one_size_are_not_measured(tmp_path):
    plan = plan_text.run_plan(
        resolve(DistillConfig(dataset="synthetic", student="resnet8", method="none")),
        tmp_path,
        None,
    )
    assert "decoding" not in plan


@pytest.mark.parametrize(("size", "advised"), [(32, False), (96, True)])
def test_a_long_study_is_advised_no_images_that_are_larger(
    size, advised, pictures, monkeypatch, tmp_path
):
    monkeypatch.setattr(plan_text, "core_rate", lambda *_: 1.0)
    study = StudyConfig(
        distill=pictures.replace(image_size=size), gpus_per_trial=0.0,
        space={"lr": {"low": 0.01, "high": 0.1}},
    )  # fmt: skip
    plan = plan_text.study_plan(study, tmp_path)
    assert "for less: " in plan
    assert ("image_size" in plan.partition("for less: ")[2]) == advised
