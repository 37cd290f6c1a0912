"""The pictures of analyses inside a page, as SVG in colors that follow its light or dark mode."""

import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.figures import of_analysis
from resnetv2_cli.inventory import Analysis
from resnetv2_cli.plot import COLORS


def embedded(analyses: list[Analysis], room: int) -> list[dict[str, Any]]:
    """Every analysis with the pictures that fit into ``room`` bytes, and the names of others."""
    made = []
    for number, analysis in enumerate(analyses):
        drawn, left_out = [], []
        for topic, svg in pictures(analysis, f"a{number}-"):
            size = len(svg.encode())
            if size <= room:
                room -= size
                drawn.append({"topic": topic, "doc": TOPICS[topic].doc, "svg": svg})
            else:
                left_out.append(topic)
        made.append(
            {
                "networks": [network["label"] for network in analysis.found["networks"]],
                "hardware": analysis.found.get("environment", {}).get("hardware", ""),
                "pictures": drawn,
                "left_out": left_out,
            }
        )
    return made


def pictures(analysis: Analysis, prefix: str) -> list[tuple[str, str]]:
    """Topic and SVG of each picture; ``prefix`` makes the IDs inside unique on the page."""
    style: Any = {"svg.fonttype": "none", "savefig.transparent": True}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(style):
        return [
            (topic, themed(file.read_text(encoding="utf-8"), f"{prefix}{topic}-"))
            for topic, file in of_analysis(analysis, Path(folder), "svg")
        ]


def themed(svg: str, prefix: str) -> str:
    """The bare SVG element, as wide as its container, in the colors of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{i})")
    svg = re.sub(r"#000000|\bblack\b", "currentColor", svg)
    svg = re.sub(r"#ffffff", "var(--card)", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
