"""Test images in the report: small ones that the final evaluation kept, as parts of the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ekd_ray.engine.measure.gallery import Gallery
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.results.report.content import Content

LOSSLESS = 32  # pixels a side up to which an image is a PNG


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image as a data URI, and what there is to say of it."""

    source: str
    label: str
    said: tuple[str, ...]


def list_images(content: Content) -> dict[str, list[ShownImage]]:
    """By heading, the images of the exported weights; empty where none were kept."""
    found, gallery = content.exported or (None, None)
    if found is None or gallery is None:
        return {}
    shown = {
        "Wrong with the highest confidence": range(gallery.mistakes),
        "Of the others, seen most differently from the teacher": range(
            gallery.mistakes, len(gallery.images)
        ),
    }
    return {
        title: [_show(found, gallery, row) for row in rows] for title, rows in shown.items() if rows
    }


def _show(found: Predictions, gallery: Gallery, row: int) -> ShownImage:
    index, names = int(gallery.images[row]), found.class_names
    confidence = float(found.confidence[index])
    said = [f"student: {names[int(found.predicted[index])]} ({confidence:.0%})"]
    if (taught := int(gallery.teacher[row])) >= 0:
        said.append(f"teacher: {names[taught]}")
        said.append(f"distance: {float(gallery.distances[row]):.2f}")
    return ShownImage(
        source=_data_uri(gallery.thumbnails[row].permute(1, 2, 0).numpy()),
        label=names[int(found.labels[index])],
        said=tuple(said),
    )


def _data_uri(pixels: np.ndarray) -> str:
    kind = "PNG" if pixels.shape[0] <= LOSSLESS else "JPEG"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
