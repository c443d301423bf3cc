"""The programs in the documents run as they stand there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info, load_dataset
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.teacher.table import list_tables
from ekd_ray.files import write_json
from ekd_ray.models import build_model, save_weights
from ekd_ray.results import Bundle
from ekd_ray.results.bundle_files import FILES, write_manifest
from ekd_ray.results.exports import export_programs
from ekd_ray.results.records import FORMAT_VERSION

DOCS = Path(__file__).parents[1] / "docs"


def programs(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def teacher_of_digits() -> torch.nn.Module:
    """A resnet8 that has learned a little."""
    arrays = load_dataset("digits", "train")
    torch.manual_seed(0)
    model = build_model("resnet8", 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for rows in torch.arange(12 * 48).split(48):
        images = torch.from_numpy(arrays.images[rows]).float() / 255
        labels = torch.from_numpy(arrays.labels[rows])
        optimizer.zero_grad()
        functional.cross_entropy(model((images - 0.5) / 0.5), labels).backward()
        optimizer.step()
    return model.eval()


def test_the_loop_of_the_caches_page_distils_from_an_exported_table(
    launch, monkeypatch, tmp_path
) -> None:
    """Filled, exported, read: its views are those that the teacher saw, and its student learns."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    teacher = teacher_of_digits()
    path = tmp_path / "teacher.safetensors"
    save_weights(
        teacher, path, model_name="resnet8", num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    code, _, error = launch(
        "cache", "fill", "--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8",
        "--teacher-weights", path, "--epochs", 2, "--train-subset", 128, "--method", "kd",
        "--set", "validation_fraction=0.25", "--set", "batch_size=16",
        "--set", "precision=float32", "--quiet",
    )  # fmt: skip
    assert code == 0, error
    (table,) = list_tables()
    code, out, _ = launch("cache", "export", table.folder.name[:14], "--out", "labels.parquet")
    assert code == 0 and out.startswith(f"labels.parquet: {table.filled} rows, ")
    assert launch("cache", "export", "nothing", "--out", "labels.csv")[0] == 2
    (program,) = programs("cache.md")
    found: dict = {}
    torch.manual_seed(0)
    torch.set_warn_always(True)  # else what another test has met is silent here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(program, found)  # our own page
    finally:
        torch.set_warn_always(False)
    pictures = torch.stack([found["make_view"](*row) for row in found["rows"]]) / 255
    with torch.no_grad():
        asked = teacher((pictures - 0.5) / 0.5)
        student = found["student"](pictures)
    assert len(found["rows"]) == table.filled
    np.testing.assert_allclose(found["logits"], asked, rtol=2e-3, atol=2e-3)
    soft = (asked / 4).softmax(1)
    chance, learnt = (
        functional.kl_div(answers, soft, reduction="batchmean").item()
        for answers in (soft.mean(0).log().expand_as(soft), (student / 4).log_softmax(1))
    )
    assert learnt < 0.7 * chance


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A folder with a bundle `best` of digits, its programs, and `picture.png`."""
    home = tmp_path_factory.mktemp("served")
    (home / "best").mkdir()
    config = resolve(DistillConfig(dataset="digits", student="resnet8", method="none"))
    info = dataset_info("digits")
    save_weights(
        build_model("resnet8", 10), home / "best" / WEIGHTS, model_name="resnet8", num_classes=10,
        mean=info.mean, std=info.std,
    )  # fmt: skip
    (home / "best" / "distill.yaml").write_text(config.to_yaml())
    names = list(load_dataset("digits", "test").class_names)
    metrics = {
        "format_version": FORMAT_VERSION, "class_names": names,
        "model": {"test_top1": 0.5}, "test": {}, "workers": 1,
    }  # fmt: skip
    write_json(home / "best" / "metrics.json", metrics)
    for name in FILES[3:]:
        (home / "best" / name).write_text("{}")
    write_manifest(home / "best", FILES)
    bundle = Bundle.load(home / "best")
    export_programs(
        home / "best", ["pt2", "onnx"], bundle.classifier(), bundle.config, bundle.class_names
    )
    picture = load_dataset("digits", "test").images[0].transpose(1, 2, 0)
    Image.fromarray(picture).save(home / "picture.png")
    return home


def serving(part: str) -> str:
    (program,) = [text for text in programs("guide/serving.md") if part in text]
    return program


@pytest.mark.parametrize("part", ["onnxruntime", "torch.export"])
def test_the_exported_programs_say_what_the_bundle_says(part, served, monkeypatch, capsys) -> None:
    monkeypatch.chdir(served)
    expected = Bundle.load("best").predict("picture.png")
    found: dict = {}
    exec(serving(part), found)  # our own page
    probabilities, uncertainty = (np.asarray(found[n]) for n in ("probabilities", "uncertainty"))
    np.testing.assert_allclose(probabilities, expected.probabilities, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(uncertainty, expected.uncertainty, rtol=1e-3, atol=1e-5)
    assert capsys.readouterr().out.split()[0] == expected.names[0]


SERVED = """
import sys, urllib.request
import ray
from ray import serve
port = int(sys.argv[1])
ray.init(num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
serve.start(http_options={{"host": "127.0.0.1", "port": port}})
{program}
picture = open("picture.png", "rb").read()
for _ in range(3):
    print(urllib.request.urlopen(f"http://127.0.0.1:{{port}}/classify", picture).read().decode())
serve.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ray_serve_answers_with_what_the_bundle_says(served) -> None:
    """Two replicas, in Ray of its own, at a free port."""
    pytest.importorskip("grpc_reflection")  # of ray[serve]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    expected = Bundle.load(served / "best").predict(served / "picture.png")
    program = serving("ray import serve").replace("/srv/best", str(served / "best"))
    done = subprocess.run(
        [sys.executable, "-c", SERVED.format(program=program), str(port)], cwd=served, timeout=250,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["name"] for answer in answers] == 3 * [expected.names[0]]
    assert answers[0]["uncertainty"] == pytest.approx(expected.uncertainty.item(), abs=1e-5)
