"""The step's milliseconds as a bar chart: `python -m benchmarks.chart RESULT.json OUT.svg`."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from ekd_ray.files import write_text

LABELS = {
    "reference": "published manner",
    "torchdistill": "torchdistill",
    "cold": "ekd_ray, table empty",
    "warm": "ekd_ray, table filled",
    "limit": "student alone, inputs ready",
}
COLOURS = dict(zip(LABELS, ("#9a9a9a", "#c9a66b", "#7fb3d5", "#1f6fb2", "#4a9c6d"), strict=True))
BAR, GAP, LEFT, WIDTH = 16, 22, 190, 760


def chart(result: dict[str, Any]) -> str:
    """SVG of the medians, with whiskers from quartile to quartile, a group of bars per pair."""
    pairs: dict[str, Any] = result["step"]
    longest = max(found[name]["high"] for found in pairs.values() for name in LABELS & found.keys())
    scale = (WIDTH - LEFT - 70) / longest
    parts, y = [], 46
    for pair, found in pairs.items():
        parts.append(f'<text x="8" y="{y - 6}" font-weight="bold">{escape(pair)}</text>')
        for name in LABELS:
            if name not in found:
                continue
            median, low, high = (found[name][key] for key in ("median", "low", "high"))
            end, middle = LEFT + scale * median, y + BAR / 2
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{LABELS[name]}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{scale * median:.1f}" height="{BAR - 3}" '
                f'fill="{COLOURS[name]}"/>',
                f'<line x1="{LEFT + scale * low:.1f}" x2="{LEFT + scale * high:.1f}" '
                f'y1="{middle:.1f}" y2="{middle:.1f}" stroke="#222"/>',
                f'<text x="{max(end, LEFT + scale * high) + 6:.1f}" y="{y + 12}">'
                f"{median:.0f}</text>",
            ]
            y += BAR
        y += GAP
    machine = result["machine"]
    title = (
        f"ms per step of 64 images, median of {next(iter(found.values()))['n']} rounds, "
        f"{machine['processor']}, {machine['threads']} threads, {machine['precision']}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="8" y="18">{escape(title)}'
        "</text>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    write_text(target, chart(json.loads(source.read_text(encoding="utf-8"))))
