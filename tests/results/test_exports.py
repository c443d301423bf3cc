"""A student as a program: torch.export and ONNX give what PyTorch gives, at any batch size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ekd_ray.results.exports as exports
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.losses.dirichlet import log_expectation, vacuity
from ekd_ray.models import build_model
from ekd_ray.models.zoo import MODELS
from ekd_ray.results import Bundle, export_bundle
from ekd_ray.results.card import model_card
from ekd_ray.results.exports import EXPORTS, OUTPUTS, export_programs
from ekd_ray.results.inference import Classifier, Preprocessing, classify
from ekd_ray.results.leaderboard import Leaderboard, Row

# An export takes many seconds: EKD_EXPORTS=all is the whole zoo, or names with commas between.
STUDENTS = os.environ.get("EKD_EXPORTS", "resnet8").split(",")
if STUDENTS == ["all"]:
    STUDENTS = sorted(MODELS)
PRIOR = -0.75
NAMES = [f"class {n}" for n in range(10)]


def classifier(name: str = "resnet8") -> Classifier:
    torch.manual_seed(0)
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), size=32)
    return Classifier(build_model(name, 10), preprocessing, log_prior=PRIOR).eval()


def expected(model: Classifier, images: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Logits, probabilities and vacuity by the loss room's formulas."""
    mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        logits = model.student((images - mean) / std)
    found = logits, log_expectation(logits, 1.0, PRIOR).exp(), vacuity(logits, PRIOR)
    return tuple(part.numpy() for part in found)


def in_onnxruntime(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)
    return session.run(None, {"images": images.numpy()})


def check_facts(facts: dict, path: Path) -> None:
    """Both programs say what goes in, and the ONNX one calls its first axis `batch`."""
    import onnx

    model = onnx.load(path)
    props = {entry.key: entry.value for entry in model.metadata_props}
    as_json = {name for name, value in facts.items() if not isinstance(value, str)}
    assert {n: json.loads(v) if n in as_json else v for n, v in props.items()} == facts
    assert facts["class_names"] == NAMES and facts["size"] == 32 and facts["crop"] == "square"
    np.testing.assert_allclose(facts["mean"] + facts["std"], (0.5, 0.4, 0.3, 0.2, 0.25, 0.3))
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_every_batch_size_gives_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    """Read back from disk, at batch sizes that the export's example did not have."""
    model = classifier(name)
    config = DistillConfig(student=name, image_size=32)
    entries = export_programs(tmp_path, ["pt2", "onnx"], model, config, NAMES)
    assert set(entries) == set(EXPORTS.values())
    told = {"ekd_ray.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=told).module()
    check_facts(json.loads(told["ekd_ray.json"]), tmp_path / "model.onnx")
    for count in (1, 3, 8):
        images = torch.rand(count, 3, 32, 32)
        own = expected(model, images)
        onnx = in_onnxruntime(tmp_path / "model.onnx", images)
        pt2 = [part.detach().numpy() for part in program(images)]
        for wanted, first, second in zip(own, pt2, onnx, strict=True):
            np.testing.assert_allclose(first, wanted, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(second, wanted, rtol=1e-3, atol=1e-4)
    here = str(Path(exports.__file__).parent).encode()
    for path in tmp_path.iterdir():
        assert here not in path.read_bytes(), "paths of this machine"


def test_the_bundle_lists_its_programs(real_study, tmp_path) -> None:
    """Checked by the manifest, described in metrics and card, and made again with the bundle."""
    bundle = export_bundle(real_study[0], tmp_path / "b", formats=["pt2"], normalized_input=True)
    assert bundle.verify().ok
    entry = bundle.metrics["exports"]["model.pt2"]
    assert entry["normalized_input"] is True and entry["largest_difference"] < 1e-4
    assert (
        "`model.pt2` | `images` float32 [B, 3, 32, 32], normalised"
        in (bundle.path / "README.md").read_text()
    )
    images = torch.rand(3, 3, 32, 32)
    logits = torch.export.load(bundle.path / "model.pt2").module()(images)[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, bundle.model()(images), rtol=1e-4, atol=1e-5)
    (bundle.path / "model.pt2").write_bytes(b"PK")
    assert [p.split()[0] for p in Bundle.load(bundle.path).verify().problems] == ["model.pt2"]
    again = export_bundle(real_study[0], bundle.path, force=True)  # as a study's end does
    assert again.verify().ok and again.metrics["exports"]["model.pt2"]["normalized_input"]
    without = export_bundle(real_study[0], bundle.path, formats=())
    assert not (without.path / "model.pt2").exists()


def test_a_program_that_gives_something_else_is_refused(monkeypatch, tmp_path) -> None:
    def wrong(model, images, path, facts):
        path.write_bytes(b"program")
        return lambda batch: [part * 1.01 for part in model(batch)]

    monkeypatch.setitem(exports._WRITERS, "pt2", wrong)
    config = DistillConfig(student="resnet8", image_size=32)
    with pytest.raises(UserError, match=r"model\.pt2 is not the model .* logits of a batch of 1"):
        export_programs(tmp_path, ["pt2"], classifier(), config, NAMES)


def test_what_cannot_be_exported_is_one_sentence(monkeypatch, tmp_path) -> None:
    def failing(*_):
        raise RuntimeError("no such operator\nand a page of it")

    monkeypatch.setitem(exports._WRITERS, "pt2", failing)
    config = DistillConfig(student="resnet8", image_size=32)
    with pytest.raises(UserError) as caught:
        export_programs(tmp_path, ["pt2"], classifier(), config, NAMES)
    assert str(caught.value) == (
        "resnet8 cannot be exported as pt2 (no such operator): leave pt2 out of --format."
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_and_unknown_formats_are_refused_first(
    real_study, tmp_path, monkeypatch
) -> None:
    with pytest.raises(UserError, match=r"unknown format 'onx'. Did you mean 'onnx'\?"):
        export_bundle(real_study[0], tmp_path / "b", formats=["onx"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match=r"needs onnxscript, .* pip install 'ekd_ray\[onnx\]'"):
        export_bundle(real_study[0], tmp_path / "b", formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def programmed(real_study, tmp_path_factory):
    """A bundle with an ONNX program, in `best/` of a folder."""
    return export_bundle(real_study[0], tmp_path_factory.mktemp("onnx") / "best", formats=["onnx"])


@pytest.mark.parametrize("crop", ["square", "resize"])
@pytest.mark.parametrize(
    ("size", "kind", "orientation"),
    [((37, 50), "PNG", 1), ((611, 400), "JPEG", 1), ((611, 400), "JPEG", 6)],
)
def test_the_cards_example_gives_what_predict_gives(
    programmed, tmp_path, monkeypatch, crop, size, kind, orientation
):
    """Its own code, on a small picture, a JPEG that is decoded smaller, and one that is turned."""
    import onnx

    config = programmed.config
    if crop == "resize":
        config = config.replace(dataset="folder:cats")
    (tmp_path / "best").mkdir()
    model = onnx.load(programmed.path / "model.onnx")
    facts = exports.program_facts(
        programmed.classifier(), config, programmed.class_names, normalized_input=False
    )
    onnx.helper.set_model_props(model, {k: exports._as_text(v) for k, v in facts.items()})
    onnx.save(model, tmp_path / "best" / "model.onnx")
    board = Leaderboard([Row(name="x", config=config, test=(0.5,))], StudyConfig())
    card = model_card(config, programmed.weights, programmed.metrics, board)
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", card, re.S) if "onnxruntime" in c]
    assert code.count("\n") <= 23
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "picture.jpg", format=kind, exif=exif)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    expected = classify(programmed.classifier(), "picture.jpg", config, programmed.class_names)
    np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-4)
    np.testing.assert_allclose(found["uncertainty"], expected.uncertainty, atol=1e-4)
    assert found["names"][found["probabilities"][0].argmax()] == expected.names[0]


def test_the_card_has_no_example_that_would_be_wrong(programmed):
    """Where the program expects images that were resized to another size before."""
    config, metrics = programmed.config, programmed.metrics
    program = {**metrics["exports"]["model.onnx"], "side": 64, "normalized_input": True}
    other = {**metrics, "exports": {"model.onnx": program}}
    board = Leaderboard([Row(name="x", config=config, test=(0.5,))], StudyConfig())
    assert "onnxruntime" not in model_card(config, programmed.weights, other, board)
