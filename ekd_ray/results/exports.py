"""A student as a program that runs without this library: torch.export (.pt2) and ONNX."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data.views import short_side
from ekd_ray.engine.resolve import student_size
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.files import atomic_path
from ekd_ray.results.inference import Classifier, Preprocessing, varies_in_size

EXPORTS = {"pt2": "model.pt2", "onnx": "model.onnx"}
OUTPUTS = ("logits", "probabilities", "uncertainty")
FACTS = "ekd_ray.json"  # in a pt2 file
BATCH_AXIS = "batch"
CHECKED_BATCHES = (1, 3, 8)
# Of the logits' size: what a fused or reordered float32 network may differ by.
TOLERANCE = 1e-3
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_exports(formats: Iterable[str]) -> None:
    """Raise `UserError` for an unknown format, or one whose packages are not installed."""
    for name in formats:
        if name not in EXPORTS:
            raise unknown_name("format", name, EXPORTS)
        missing = [p for p in _ONNX_PACKAGES if importlib.util.find_spec(p) is None]
        if name == "onnx" and missing:
            raise UserError(
                f"exporting to ONNX needs {', '.join(missing)}, which is not installed: "
                "pip install 'ekd_ray[onnx]'."
            )


def export_programs(
    folder: Path,
    formats: Sequence[str],
    classifier: Classifier,
    config: DistillConfig,
    class_names: Sequence[str],
    *,
    normalized_input: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write a classifier in each format to `folder`, and compare what was written with it.

    The programs take `images`, float32 [B, 3, S, S] with any B >= 1, in [0, 1] (or normalised,
    with `normalized_input`), and return `OUTPUTS`. They carry `program_facts`: ONNX as metadata,
    pt2 as the extra file `ekd_ray.json`.

    Returns:
        File name -> `normalized_input`, `side` (S), and `largest_difference` of all outputs
        over batches of 1, 3 and 8.

    Raises:
        UserError: the model cannot be exported, or gives something else afterwards.
    """
    side = config.image_size
    facts = program_facts(classifier, config, class_names, normalized_input=normalized_input)
    if normalized_input:
        side = student_size(config)
        classifier = Classifier(
            classifier.student, nn.Identity(), log_prior=classifier.log_prior
        ).eval()
    assert side is not None
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(CHECKED_BATCHES), 3, side, side, generator=generator)
    entries = {}
    for name in formats:
        path = folder / EXPORTS[name]
        with torch.no_grad(), _quiet():
            try:
                with atomic_path(path) as temporary:
                    run = _WRITERS[name](classifier, images, temporary, facts)
            except Exception as error:  # exporters fail in ways of their own
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"{config.student} cannot be exported as {name} ({reason[:200]}): leave "
                    f"{name} out of --format."
                ) from error
            difference = _largest_difference(classifier, run, images, path.name)
        entries[path.name] = {
            "normalized_input": normalized_input,
            "side": side,
            "largest_difference": difference,
        }
    return entries


def program_facts(
    classifier: Classifier,
    config: DistillConfig,
    class_names: Sequence[str],
    *,
    normalized_input: bool,
) -> dict[str, Any]:
    """The facts that a program's user needs to feed and to read it, as plain values for JSON.

    `mean` and `std` of the channels in [0, 1]; `size` of the images in pixels; `crop`, the part of
    a picture that becomes one, "square" (the largest in the centre) or "resize" (the short side to
    `resize_short`, then the centre), by `resample`.
    """
    size, parts = config.image_size, classifier.preprocessing
    assert size is not None and isinstance(parts, Preprocessing)
    margin = varies_in_size(config)
    return {
        "class_names": list(class_names),
        "mean": parts.mean.flatten().tolist(),
        "std": parts.std.flatten().tolist(),
        "normalized_input": normalized_input,
        "size": student_size(config) if normalized_input else size,
        "crop": "resize" if margin else "square",
        "resize_short": short_side(size) if margin else size,
        "resample": "bilinear",
        "log_prior": classifier.log_prior,
    }


Program = Callable[[Tensor], Sequence[Tensor]]


def _write_pt2(classifier: nn.Module, images: Tensor, path: Path, facts: dict[str, Any]) -> Program:
    program = _program(classifier, images)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # paths of this machine
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={FACTS: json.dumps(facts)})
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(
    classifier: nn.Module, images: Tensor, path: Path, facts: dict[str, Any]
) -> Program:
    import onnx
    import onnxruntime

    exported = torch.onnx.export(
        _program(classifier, images),
        input_names=["images"],
        output_names=list(OUTPUTS),
        dynamic_shapes={"images": {0: BATCH_AXIS}},  # which names it in the file
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    # Where in which file each node comes from: paths of this machine.
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    onnx.helper.set_model_props(model, {name: _as_text(value) for name, value in facts.items()})
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {"images": batch.numpy()})]

    return run


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _program(classifier: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    return torch.export.export(classifier, (images[:2],), dynamic_shapes=({0: batch},))


_WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}


def _largest_difference(classifier: nn.Module, run: Program, images: Tensor, name: str) -> float:
    """Compare all outputs over `CHECKED_BATCHES`; raises `UserError` beyond `TOLERANCE`."""
    largest = 0.0
    for count in CHECKED_BATCHES:
        expected, found = classifier(images[:count]), run(images[:count])
        for title, own, other in zip(OUTPUTS, expected, found, strict=True):
            size = max(1.0, float(own.abs().max()))
            gap = float((own - other).abs().max()) if own.shape == other.shape else float("nan")
            if not gap <= TOLERANCE * size:
                raise UserError(
                    f"{name} is not the model it was made from: {title} of a batch of {count} "
                    f"differ by {gap:.2g}; leave that format out, and report it."
                )
            largest = max(largest, gap)
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' notes on themselves, which nobody here can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
