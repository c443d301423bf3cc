"""A bundle of a timm model is a weights file of timm's."""

from __future__ import annotations

import re

import pytest
import torch
from report_studies import BASE, final, select

from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.results import export_bundle
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import RunRecord

timm = pytest.importorskip("timm")


def test_timm_itself_loads_the_exported_weights_by_the_cards_own_line(maker, tmp_path):
    """Trained, exported, and built by timm without a line of this library: equal logits."""
    config = resolve(
        BASE.replace(student="timm:test_resnet", epochs=1, validation_fraction=0.0, seed=1)
    )
    study = maker.study(distill=config, confirm_seeds=1)
    folder = maker.path / "confirm" / "final"
    record = RunRecord(folder=folder, stage=RunStage.FINAL, name="trial 0", config=config.to_dict())
    metrics = finish_run(record, distill(config, out=folder, threads=1), data_root=None).metrics
    maker.confirm(
        [
            select("trial 0", 1, 0.4, config.replace(validation_fraction=0.4)),
            final("trial 0", 1, metrics["test_top1"], config, "confirm/final"),
        ]
    )
    bundle = export_bundle(study, tmp_path / "best")
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "\n- timm\n" in card
    (line,) = re.findall(r"`(timm\.create_model\(.*\))`", card)
    line = line.replace("best/", f"{bundle.path}/")
    model = eval(line, {"timm": timm}).eval()  # our own card
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), bundle.model()(images))
        assert not torch.equal(model(images), timm.create_model("test_resnet", num_classes=len(
            bundle.class_names)).eval()(images))  # fmt: skip
